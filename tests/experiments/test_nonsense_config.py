"""Configurations that make no sense: flags, config.json of a run.

Of each kind of mistake one is given to the command: test_config.py has every field, and
the tests of each command what it says of its own options.
"""

import json
import os

import hypothesis
import nonsense
import pytest
from hypothesis import strategies as st
from PIL import Image

from diffusion_jax import errors
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import config

FIELDS = config.flat(config.to_dict(nonsense.SMALL))
# net is a file of a network, file one of text, and pipe has no end.
# By command, what is wrong after it.
MISTAKES = {
    "train": "../digits; --net.groups=7; cifar10 digits; cifar10 --data.no-download",
    "train digits": f"""
        --no-such-flag 1; --train.steps; --train.steps nonsense; --train.steps 1.5;
        --train.steps {10**30}; --train.steps {-(10**30)}; --diffusion.beta-start nan;
        --diffusion.beta-start inf; --name ''; --name .git; --name {chr(0xDCFF) * 300};
        --output file; --init-from file; --init-from none; --train.devices 100000;
        --train.devices 3;
        --hosts 2 --host 5; --data.path .; --data.channels 3; --data.source folder:file;
        --data.source folder:{"f" * 5000}; --data.source npz:pipe;
        --data.source idx:pipe; --data.source nothing; --data.source tfds:../../etc;
        --data.source tfds:huggingface:mnist; --data.source tfds:x --data.path gs://x;
        --data.source mnist --data.path .""",
    "sample": "no-such-run; file; pipe",
    "sample net": f"""
        another; --colour red; --sampler euler; --eta 1; --steps 9999; --label 3;
        --guidance 2; --classifier-guidance nan; --classifier-guidance -1;
        --average 0.5; --seed -1; --count {10**30}; --columns 0; --batch-size 0""",
    "eval_fid net --data digits": "--data x; --reference none",
    "eval_nll net": "--tolerance nan",
    "compare_samplers net": "--rules euler; --evaluations 0",
    "legibility net": "--count 5; --splits 0",
    "edit net": """
        vary pipe; vary image.png --seed 4294967296; inpaint image.png;
        vary image.png --depth 0""",
    "convert": "none out; net net; http://x.org/a out --download",
    "train_classifier": """
        imagenet; digits --steps 0; digits --seed 4294967296; cifar10 --path none""",
    "bench digits": "--batch-sizes; --what; --init-from file",
    "compiled digits": "--target h100:0; --target v5e:4xx4; --largest -1",
}
LINES = [
    f"{command} {' '.join(flags.split())}"
    for command, several in MISTAKES.items()
    for flags in several.split(";")
] + [
    f"{command} net {flags}"
    for command in ("sample", "eval_fid", "eval_nll", "compare_samplers", "legibility")
    for flags in ("--steps 0", "--step 7", "--count 0", "--seed 4294967296")
]


def damaged(key, value):
    """A configuration as JSON has it, with the value of a field changed."""
    values = config.to_dict(nonsense.SMALL)
    *section, name = key.split(".")
    (values[section[0]] if section else values)[name] = value
    return values


WHOLE = json.dumps(config.to_dict(nonsense.SMALL))
TEXTS = {
    "empty": b"",
    "null": b"null",
    "text in 16 bits": WHOLE.encode("utf-16"),
    "a comma too many": WHOLE.encode()[:-1] + b",}",
    "nested without end": b'{"net": ' + b"[" * 100_000,
    "a number of a million digits": b'{"diffusion": ' + b"9" * 10**6 + b"}",
    "a key twice": b'{"name": "a", ' + WHOLE.encode()[1:],
    "a key of no field": b'{"__class__": "os.system", "diffusion": {}}',
    "NaN": json.dumps(damaged("diffusion.sigma_data", float("nan"))).encode(),
    "larger than any configuration": WHOLE.encode() + b" " * 2**25,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network, images and files of nothing, which all cases share."""
    folder = tmp_path_factory.mktemp("config")
    nonsense.write_network(folder / "net")
    (folder / "file").write_text("nothing of the kind\n")
    Image.new("L", (8, 8)).save(folder / "image.png")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("line", LINES, ids=lambda line: ascii(line[:60]))
def test_arguments_are_refused(line, place, monkeypatch):
    nonsense.alone(monkeypatch, place)
    nonsense.refuse_line(line, place)


def refuse_run(content, folder):
    """As the configuration of a run."""

    def read(run):
        runs.read_config(runs.find(str(run)))

    nonsense.refuse_file(read, content, folder / "run" / "config.json", folder / "run")


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_a_run_are_refused(name, tmp_path):
    refuse_run(TEXTS[name], tmp_path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@nonsense.PROFILE
@hypothesis.given(key=st.sampled_from(sorted(FIELDS)), value=JSON)
def test_any_value_is_taken_or_refused_by_name(key, value):
    """What is taken, is what JSON gives back: nothing is bent to fit."""
    values = damaged(key, value)
    try:
        found = config.from_dict(values)
    except errors.ConfigError as error:
        nonsense.check_words(f"error: {error}")
    else:
        same = dict(config.flat(config.to_dict(found)))
        given = config.flat(values)
        assert same.keys() == given.keys()
        assert all(same[name] == given[name] for name in same)


@nonsense.PROFILE
@hypothesis.given(cut=st.integers(1, len(WHOLE) - 1))
def test_a_configuration_cut_off_is_refused(cut, tmp_path_factory):
    refuse_run(WHOLE[:cut].encode(), tmp_path_factory.mktemp("cut"))
