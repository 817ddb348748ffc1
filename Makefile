# Every target sets itself up: .venv, with the versions of constraints.txt.
PYTHON ?= python3
EXP ?= digits
RUN ?= runs/$(EXP)
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SITE := .venv-site

.DEFAULT_GOAL := help
.PHONY: help train distil sample eval report samplers ablation legibility codec \
	playground test torture mutations lint format docs clean

help:  ## show this
	@echo "usage: make TARGET [EXP=experiment] [ARGS=\"--flag value ...\"] [PYTHON=python3]"
	@echo
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | \
		awk 'BEGIN {FS = ":.*## "} {printf "  %-11s %s\n", $$1, $$2}'
	@echo
	@$(PYTHON) -c "from experiments.configs import table; print(table())"
	@echo
	@echo "main flags:  make train EXP=digits ARGS=--help (all: ARGS=--help-all)"

train: $(READY)  ## train EXP (digits by default); again: go on (resume)
	$(PY) -m experiments.train $(EXP) $(ARGS)

distil: $(READY)  ## train a student of EXP that draws in one or two steps
	$(PY) -m experiments.distil $(RUN) $(ARGS)

sample: $(READY)  ## draw images from the newest checkpoint of EXP
	$(PY) -m experiments.sample $(RUN) $(ARGS)

eval: $(READY)  ## measure EXP: distance of its samples from the data, bits/dim
	$(PY) -m experiments.eval_nll $(RUN) --max-images 256 --rate-distortion
	$(PY) -m experiments.eval_fid $(RUN) $(ARGS)

report: $(READY)  ## write what RUN (or RUN="a b") came to as one page, report.html
	$(PY) -m experiments.report $(RUN) $(ARGS)

samplers: $(READY)  ## compare all sampling rules on EXP: quality by NFE
	$(PY) -m experiments.compare_samplers $(RUN) $(ARGS)

ablation: $(READY)  ## train every objective on the data of EXP, and compare them
	$(PY) -m experiments.ablation $(EXP) $(ARGS)

legibility: $(READY)  ## measure whether the samples of EXP can be read
	$(PY) -m experiments.legibility $(RUN) $(ARGS)

codec: $(READY)  ## compress the images of EXP, beside PNG, WebP and JPEG XL
	$(PY) -m experiments.codec fit $(RUN)
	$(PY) -m experiments.codec compare $(RUN) $(ARGS)

# The newest run where none is named, or the digits that come with the package.
playground: NAMED = $(if $(filter-out file,$(origin RUN) $(origin EXP)),$(RUN))
playground: $(READY)  ## open RUN, or the newest run, in the browser
	$(PY) -m experiments.playground $(NAMED) $(ARGS)

test: $(READY)  ## run all tests and doctests
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

torture: $(READY)  ## kill runs, fill their disks, damage their files: 40 minutes
	$(PY) -m tests.torture $(ARGS)

mutations: $(READY)  ## break the code in 217 ways; each must be noticed: 20 minutes
	$(PY) -m tests.mutations $(ARGS)

lint: $(READY)  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)  ## format the code
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

docs: $(SITE)/.ready  ## make a site of the pages and all functions in site/
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --quiet
	@echo "site/index.html; with its search: $(PYTHON) -m http.server --directory site"

clean:  ## remove .venv and caches; runs stay
	rm -rf $(VENV) $(SITE) site .cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info

$(SITE)/.ready: docs/site/requirements.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Installed once, and again only when what to install has changed.
$(READY): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "PYTHON must be 3.11 or newer; got $$($(PYTHON) --version 2>&1)." \
			"Name another: make PYTHON=python3.12" >&2; exit 2; }
	@echo "setting up $(VENV): about a minute, once"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
