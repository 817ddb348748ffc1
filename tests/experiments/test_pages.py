"""README and docs: links lead somewhere, and what one is told to type exists."""

import fnmatch
import importlib
import os
import re
import shlex
import subprocess

import pytest
from processes import ROOT

from diffusion_jax.errors import ConfigError, MissingError
from diffusion_jax.lab.process import entry, joining
from diffusion_jax.lab.training import arguments
from experiments.__main__ import COMMANDS
from experiments.configs import EXPERIMENTS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
FENCED = re.compile(r"^```.*?^```", re.M | re.S)


def anchors(page):
    """Those that GitHub gives to the headings of a page."""
    found = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in found}


def links(page):
    """Where a page leads to within the repository: (file, anchor)."""
    for to in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if "://" not in to:
            path, _, anchor = to.partition("#")
            yield (page.parent / path if path else page).resolve(), anchor


def lines(page):
    """What a page says to type, in blocks and between backticks."""
    text = page.read_text()
    blocks = "\n".join(FENCED.findall(text)).replace("\\\n", " ")
    within = [
        " ".join(x.split()) for x in re.findall(r"`([^`]+)`", FENCED.sub("", text))
    ]
    for line in [*blocks.split("\n"), *within]:
        line = re.sub(r"\s+#.*", "", line).removeprefix("srun ")
        if re.match(r"make \S|diffusion-jax \S|python -m experiments\.", line):
            yield line


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_links_and_pictures_lead_somewhere(page):
    for path, anchor in links(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path.name}#{anchor}"


def test_readme_is_short_and_leads_to_every_page_which_lead_back():
    readme, *pages = PAGES
    assert len(readme.read_text().splitlines()) <= 160
    assert {path for path, _ in links(readme)} >= set(pages)
    for page in pages:
        assert readme in {path for path, _ in links(page)}, page.name


def test_readme_names_the_experiments():
    said = PAGES[0].read_text().split("\n## Experiments\n")[1].split("\n## ")[0]
    named = re.findall(r"`([^`]+)`", said)
    for name in named:
        assert fnmatch.filter(EXPERIMENTS, name), name
    for name in EXPERIMENTS:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in named), name


def parse(name, argv):
    """As the command does, before it looks at any file."""
    module = importlib.import_module(f"experiments.{name}")
    _, argv = joining.split(argv)
    if "--init-from" in argv:  # whose file is looked at with the arguments
        at = argv.index("--init-from")
        del argv[at : at + 2]
    if name == "distil":
        arguments.parse_training(module.split(argv)[1], EXPERIMENTS, prog=name)
    elif name == "train":
        arguments.parse_training(argv, EXPERIMENTS, prog=name)
    elif name == "compiled":
        of = module.Options
        arguments.parse_with(of, argv, EXPERIMENTS, prog=name, description=None)
    elif hasattr(module, "parse"):
        module.parse(argv)
    else:
        entry.parse(module.Options, argv, name, None)


def commands(line):
    """The commands of ours that a line runs: their arguments, the name first."""
    if line.startswith("make"):  # what it would do, by the Makefile
        told = ["make", "-n", *shlex.split(line)[1:]]
        # Without what a make that runs the tests was told.
        own = {
            k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "ARGS"))
        }
        done = subprocess.run(
            told, cwd=ROOT, env=own, capture_output=True, text=True, check=True
        )
        line = done.stdout
    for found in re.findall(r"(?:-m experiments\.|^diffusion-jax )(.*)", line):
        yield [x for x in shlex.split(found) if x != "..." and x != "[RUN]"]


def test_what_one_is_told_to_type_exists(capsys):
    """Each target, command and flag; without arguments a command is only named."""
    given = {tuple(c) for page in PAGES for line in lines(page) for c in commands(line)}
    assert len(given) > 40
    for name, *argv in sorted(given):
        assert name in COMMANDS
        try:
            if argv:
                parse(name, argv)
        except MissingError:  # the flags were read, and ask for what is not installed
            pass
        except (SystemExit, ConfigError) as error:
            if getattr(error, "code", 2):
                said = capsys.readouterr()
                pytest.fail(f"{name} {shlex.join(argv)}: {error} {said.err}")
