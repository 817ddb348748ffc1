"""Configurations that make no sense: flags, config.json of a run, words of networks."""

import dataclasses
import json
import typing

import hypothesis
import nonsense
import pytest
from hypothesis import strategies as st
from nonsense import cases, refuse

from experiments import (
    ablation,
    bench,
    compare_samplers,
    compiled,
    config,
    convert,
    edit,
    eval_fid,
    eval_nll,
    legibility,
    sample,
    train,
    train_classifier,
)

HUGE = 10**30


def fields(kind=config.Config, prefix=""):
    """All fields of a configuration, as ('section.field', type)."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


FIELDS = dict(fields())


def of(hint):
    """The type of a field, or of the entries of its list, without None."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is tuple or type(None) in typing.get_args(hint):
        return of(parts[0])
    return hint


def flag(key, *values):
    return [f"--{key.replace('_', '-')}", *map(str, values)]


def wrong_flags():
    for key, hint in FIELDS.items():
        one = of(hint)
        if one is str:
            continue
        many = 2 if "guidance_interval" in key else 1
        yield f"{key} is a word", flag(key, *["nonsense"] * many)
        if one is int:
            yield f"{key} is huge", flag(key, HUGE)
            yield f"{key} is far below 0", flag(key, -HUGE)
            yield f"{key} is a fraction", flag(key, 1.5)
        if one is float:
            yield f"{key} is nan", flag(key, *["nan"] * many)
            yield f"{key} is infinite", flag(key, *["inf"] * many)


TRAIN = {
    "unknown flag": ["--no-such-flag", "1"],
    "flag of another section": ["--channels", "1"],
    "flag without a value": ["--train.steps"],
    "flag in a wrong place": ["cifar10", "digits"],
    "unknown experiment": ["imagenet"],
    "experiment that is a path": ["../digits"],
    "empty experiment": [""],
    "name with a slash": flag("name", "a/b"),
    "name that climbs": flag("name", ".."),
    "name that is hidden": flag("name", ".git"),
    "name that is empty": flag("name", ""),
    "name too long for a disk": flag("name", "n" * 300),
    "name with bytes of no text": ["--name", "\udcff" * 300],
    "output that is a file": flag("output", "file"),
    "output inside a file": flag("output", "file/deeper"),
    "source without a kind": flag("data.source", ""),
    "source of no kind": flag("data.source", "imagenet"),
    "source nearly spelt": flag("data.source", "cifar-10"),
    "source with a colon too many": flag("data.source", "digits:x"),
    "folder without a path": flag("data.source", "folder:"),
    "folder that is a file": flag("data.source", "folder:file"),
    "folder that is not there": flag("data.source", "folder:/no/such"),
    "folder too long": flag("data.source", "folder:" + "f" * 5000),
    "npz without a path": flag("data.source", "npz"),
    "npz that is a folder": flag("data.source", "npz:."),
    "npz that is a device": flag("data.source", "npz:/dev/zero"),
    "npz that is a pipe": flag("data.source", "npz:pipe"),
    "idx that is a pipe": flag("data.source", "idx:pipe"),
    "idx that is a folder": flag("data.source", "idx:."),
    "idx with a missing comma": flag("data.source", "idx:file file"),
    "tfds without a name": flag("data.source", "tfds:"),
    "tfds of a network": flag("data.source", "tfds:huggingface:mnist"),
    "tfds that climbs": flag("data.source", "tfds:../../etc"),
    "tfds that is a path": flag("data.source", "tfds:/etc"),
    "tfds of a remote store": ["--data.source", "tfds:x", "--data.path", "gs://x"],
    "path of data that have none": flag("data.path", "."),
    "cifar10 at a file of text": ["cifar10", "--data.path", "file"],
    "cifar10 at nothing": ["cifar10", "--data.path", "/no/such"],
    "cifar10 without network": ["cifar10", "--no-data.download"],
    "mnist at nothing": ["--data.source", "mnist", "--data.path", "."],
    "start from nothing": flag("init_from", "/no/such"),
    "start from a file of text": flag("init_from", "file"),
    "start from a folder of nothing": flag("init_from", "."),
    "start from a device": flag("init_from", "/dev/zero"),
    "no multipliers": ["--net.multipliers"],
    "multipliers of 0": flag("net.multipliers", 0),
    "multipliers below 0": flag("net.multipliers", 1, -1),
    "groups that do not divide": flag("net.groups", 7),
    "images of one pixel": flag("data.image_size", 1),
    "images of 5 channels": flag("data.channels", 5),
    "T of 1": flag("diffusion.num_steps", 1),
    "beta that falls": flag("diffusion.beta_start", 0.9),
    "beta of 2": flag("diffusion.beta_end", 2),
    "log-SNR beyond numbers": flag("diffusion.logsnr_shift", 1e30),
    "dropout of all": flag("net.dropout", 1),
    "average that never moves": flag("optimizer.ema_decay", 1),
    "average twice": flag("optimizer.ema_decay", 0.9, 0.9),
    "length of nothing": flag("optimizer.ema_lengths", 0),
    "rate of 0": flag("optimizer.learning_rate", 0),
    "seed that others have too": flag("train.seed", 2**32),
    "seed below 0": flag("train.seed", -1),
    "more steps than there are": flag("sample.steps", 5000),
    "option of another rule": flag("sample.eta", 0.5),
    "eta of 2": ["--sample.sampler", "ddim", "--sample.eta", "2"],
    "order of another rule": ["--sample.sampler", "unipc", "--sample.order", "SDE"],
    "batch of nobody": flag("train.batch_size", 0),
    "batch that is not cut": flag("train.accumulate", 7),
    "a million million images a step": flag("train.batch_size", 10**12),
    "devices of another machine": flag("train.devices", 100_000),
    "hosts of nobody": ["--hosts", "0"],
    "hosts that are a word": ["--hosts", "many"],
    "host that is not among them": ["--hosts", "2", "--host", "5"],
}
CASES = [
    *cases("flag of a wrong type or range", dict(wrong_flags())),
    *cases("flag that fits nothing", TRAIN),
]
RUNS = (sample, eval_fid, eval_nll, compare_samplers, legibility)
SAMPLING = {
    "a rule of no name": ["--sampler", "euler"],
    "an option of another rule": ["--eta", "1"],
    "steps of 0": ["--steps", "0"],
    "steps beyond T": ["--steps", "9999"],
    "a fraction of a step": ["--steps", "2.5"],
    "a label of nobody": ["--label", "3"],
    "guidance of nobody": ["--guidance", "2"],
    "guidance nan": ["--classifier-guidance", "nan"],
    "an average of no run": ["--average", "0.5"],
    "a step of no run": ["--step", "7"],
    "a seed of too many bits": ["--seed", str(2**32)],
    "a seed of far too many bits": ["--seed", str(HUGE)],
    "a seed below 0": ["--seed", "-1"],
    "a count of 0": ["--count", "0"],
    "a count below 0": ["--count", "-5"],
    "a count beyond all disks": ["--count", str(HUGE)],
    "a flag of no name": ["--colour", "red"],
    "two runs": ["another"],
}
LACKING = {
    legibility: ["batch"],
    eval_nll: ["rule", "option", "step", "label", "guidance", "count", "fraction"],
    compare_samplers: ["rule", "option", "steps", "label", "guidance", "fraction"],
}
COMMANDS = {
    f"{module.__name__.partition('.')[2]} with {name}": (module, ["NET", *argv])
    for module in RUNS
    for name, argv in SAMPLING.items()
}
COMMANDS |= {
    "sample of no run": (sample, ["no-such-run"]),
    "sample of a folder": (sample, ["."]),
    "sample of a text": (sample, ["file"]),
    "sample of a device": (sample, ["/dev/zero"]),
    "sample of a pipe": (sample, ["pipe"]),
    "sample with no columns": (sample, ["NET", "--columns", "0"]),
    "sample in batches of 0": (sample, ["NET", "--batch-size", "0"]),
    "sample of a figure of no name": (sample, ["NET", "--figure", "9"]),
    "sample to a format of no name": (sample, ["NET", "--format", "jpg"]),
    "eval_fid of no extractor": (eval_fid, ["NET", "--extractor", "vgg"]),
    "eval_fid of samples of no kind": (
        eval_fid,
        ["NET", "--data", "digits", "--samples", "x"],
    ),
    "eval_fid of samples nowhere": (
        eval_fid,
        ["NET", "--data", "digits", "--samples", "npz:none"],
    ),
    "eval_fid of data nobody named": (eval_fid, ["NET", "--data", "x"]),
    "eval_fid in 0 sets": (eval_fid, ["NET", "--data", "digits", "--seeds", "0"]),
    "eval_fid of no weights": (
        eval_fid,
        ["NET", "--data", "digits", "--weights", "none"],
    ),
    "eval_fid of no reference": (
        eval_fid,
        ["NET", "--data", "digits", "--reference", "none"],
    ),
    "eval_nll of no split": (eval_nll, ["NET", "--split", "half"]),
    "eval_nll of no tolerance": (eval_nll, ["NET", "--tolerance", "0"]),
    "eval_nll of a tolerance nan": (eval_nll, ["NET", "--tolerance", "nan"]),
    "eval_nll of the tolerance inf": (eval_nll, ["NET", "--tolerance", "inf"]),
    "eval_nll by 0 probes": (eval_nll, ["NET", "--probes", "0"]),
    "eval_nll by both ways": (eval_nll, ["NET", "--ode", "--rate-distortion"]),
    "compare_samplers of no rule": (compare_samplers, ["NET", "--rules", "euler"]),
    "compare_samplers of no rules": (compare_samplers, ["NET", "--rules"]),
    "compare_samplers of 0 evaluations": (
        compare_samplers,
        ["NET", "--evaluations", "0"],
    ),
    "legibility of few": (legibility, ["NET", "--count", "5"]),
    "legibility in 0 halves": (legibility, ["NET", "--splits", "0"]),
    "edit by nothing": (edit, ["NET", "smudge"]),
    "edit of nothing": (edit, ["NET"]),
    "edit of no image": (edit, ["NET", "vary", "none.png"]),
    "edit of a folder": (edit, ["NET", "vary", "."]),
    "edit of a device": (edit, ["NET", "vary", "/dev/zero"]),
    "edit of a text": (edit, ["NET", "vary", "file"]),
    "edit at depth 0": (edit, ["NET", "vary", "image.png", "--depth", "0"]),
    "edit beyond T": (edit, ["NET", "vary", "image.png", "--depth", "1001"]),
    "edit of a count of 0": (edit, ["NET", "vary", "image.png", "--count", "0"]),
    "edit with a seed of too many bits": (
        edit,
        ["NET", "vary", "image.png", "--seed", str(HUGE)],
    ),
    "edit to a text": (edit, ["NET", "vary", "image.png", "--out", "x.txt"]),
    "edit of colours of grey": (edit, ["NET", "colorize", "image.png"]),
    "inpaint without a mask": (edit, ["NET", "inpaint", "image.png"]),
    "inpaint by a black mask": (edit, ["NET", "inpaint", "image.png", "image.png"]),
    "inpaint with no resamples": (
        edit,
        ["NET", "inpaint", "image.png", "white.png", "--resamples", "0"],
    ),
    "inpaint back by no steps": (
        edit,
        ["NET", "inpaint", "image.png", "white.png", "--jump", "0"],
    ),
    "coarse-to-fine below 0": (
        edit,
        ["NET", "coarse-to-fine", "image.png", "white.png", "--depths", "-1"],
    ),
    "slerp with noise": (
        edit,
        ["NET", "slerp", "image.png", "white.png", "--sampler", "ddpm"],
    ),
    "convert nothing": (convert, ["none", "out.safetensors"]),
    "convert to a pickle": (convert, ["NET", "out.pkl"]),
    "convert over a file": (convert, ["NET", "file"]),
    "convert over itself": (convert, ["NET", "NET"]),
    "convert with a choice": (convert, ["NET", "o.safetensors", "--step", "3"]),
    "convert to be of no data": (convert, ["NET", "o.safetensors", "--data", "x"]),
    "convert an experiment": (
        convert,
        ["NET", "o.safetensors", "--experiment", "cifar10"],
    ),
    "convert from an address": (
        convert,
        ["http://x.org/a", "o.safetensors", "--download"],
    ),
    "convert from above": (convert, ["../../a/b", "o.safetensors", "--download"]),
    "train_classifier of no experiment": (train_classifier, ["imagenet"]),
    "train_classifier of 0 steps": (train_classifier, ["digits", "--steps", "0"]),
    "train_classifier of a huge seed": (
        train_classifier,
        ["digits", "--seed", str(HUGE)],
    ),
    "train_classifier of data nowhere": (
        train_classifier,
        ["cifar10", "--path", "none"],
    ),
    "bench of no batch": (bench, ["digits", "--batch-sizes", "0"]),
    "bench of no batches": (bench, ["digits", "--batch-sizes"]),
    "bench of nothing": (bench, ["digits", "--what"]),
    "bench of no steps": (bench, ["digits", "--steps", "0"]),
    "bench of weights": (bench, ["digits", "--init-from", "file"]),
    "compiled for no machine": (compiled, ["digits", "--target", "abacus:4"]),
    "compiled for no GPUs": (compiled, ["digits", "--target", "h100:0"]),
    "compiled for half a slice": (compiled, ["digits", "--target", "v5e:4xx4"]),
    "compiled of nothing": (compiled, ["digits", "--what", "dream"]),
    "compiled of a list below 0": (compiled, ["digits", "--largest", "-1"]),
    "ablation of no steps": (ablation, ["digits", "--train.steps", "0"]),
}
CASES += cases("option of a command", COMMANDS)


def damaged(key, value):
    """A configuration as JSON has it, with the value of a field changed."""
    values = config.to_dict(nonsense.SMALL)
    *section, name = key.split(".")
    (values[section[0]] if section else values)[name] = value
    return values


def wrong_values():
    for key, hint in FIELDS.items():
        one = of(hint)
        yield f"{key} is an object", damaged(key, {"a": 1})
        yield f"{key} is a list of lists", damaged(key, [[1]])
        if one is int:
            yield f"{key} is huge in JSON", damaged(key, HUGE)
            yield f"{key} is a fraction in JSON", damaged(key, 2.5)
        elif one is float:
            yield f"{key} is too large for a float", damaged(key, 10**400)
        else:
            yield f"{key} is a number in JSON", damaged(key, 5.5)


WHOLE = json.dumps(config.to_dict(nonsense.SMALL))
TEXTS = {
    "empty": b"",
    "a space": b" ",
    "null": b"null",
    "a list": b"[]",
    "a number": b"5",
    "a text": b'"config"',
    "no text at all": bytes(range(128, 256)),
    "text in 16 bits": WHOLE.encode("utf-16"),
    "zeros": bytes(1000),
    "a comment": b"// config\n" + WHOLE.encode(),
    "a comma too many": WHOLE.encode()[:-1] + b",}",
    "two configurations": WHOLE.encode() * 2,
    "nested without end": b'{"net": ' + b"[" * 100_000,
    "nested beyond all stacks": b'{"diffusion": ' * 200_000,
    "a number of a million digits": b'{"diffusion": ' + b"9" * 10**6 + b"}",
    "a key twice": b'{"name": "a", ' + WHOLE.encode()[1:],
    "a section twice": WHOLE.encode()[:-1] + b', "net": {}}',
    "a key of no field": b'{"__class__": "os.system", "diffusion": {}}',
    "a key of no section": b'{"diffusion": {"__init__": 1}}',
    "NaN": json.dumps(damaged("diffusion.sigma_data", float("nan"))).encode(),
    "Infinity": json.dumps(damaged("net.dropout", float("inf"))).encode(),
    "true for a number": json.dumps(damaged("net.blocks", True)).encode(),
    "a path with a zero byte": json.dumps(
        damaged("data.source", "npz:a\0b") | {"seed": 1}
    ).encode(),
    "larger than any configuration": WHOLE.encode() + b" " * 2**25,
}
CASES += cases("value in config.json", dict(wrong_values()))
CASES += cases("text of config.json", TEXTS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network, images and files of nothing, which all cases share."""
    import os

    from PIL import Image

    folder = tmp_path_factory.mktemp("config")
    nonsense.write_network(folder / "net.safetensors")
    (folder / "file").write_text("nothing of the kind\n")
    Image.new("L", (8, 8)).save(folder / "image.png")
    Image.new("L", (8, 8), 255).save(folder / "white.png")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture(autouse=True)
def nowhere_else(place, monkeypatch):
    """No cache or data of this machine's is reached, nor a job of several hosts."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(place / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def of_kind(*kinds):
    return [case for case in CASES if case.kind in kinds]


@pytest.mark.parametrize(
    "case", of_kind("flag of a wrong type or range", "flag that fits nothing"), ids=str
)
def test_flags_are_refused(case, place):
    argv = case.make
    first = [] if argv and not argv[0].startswith("-") else ["digits"]
    refuse(train.main, [*first, *argv], place, several=True)


@pytest.mark.parametrize("case", of_kind("option of a command"), ids=str)
def test_options_are_refused(case, place):
    module, argv = case.make
    net = place / "net.safetensors"
    several = module in (sample, eval_fid)
    argv = [net if word == "NET" else word for word in argv]
    refuse(module.main, argv, place, several=several)


def run_of(folder, content):
    """A run whose configuration is some text."""
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "config.json").write_bytes(content)
    return folder / "run"


def refused_as_a_run(content, folder, number):
    """By each command in its turn, since all read it alike."""
    run = run_of(folder, content)
    readers = {
        0: (sample.main, [run]),
        1: (eval_fid.main, [run]),
        2: (eval_nll.main, [run]),
        3: (edit.main, [run, "vary", "image.png"]),
        4: (convert.main, [run, "out.safetensors"]),
        5: (compare_samplers.main, [run]),
        6: (legibility.main, [run]),
        7: (train.main, ["digits", "--init-from", run]),
    }
    main, argv = readers[number % len(readers)]
    return refuse(main, argv, folder)


@pytest.mark.parametrize("case", of_kind("value in config.json"), ids=str)
def test_values_in_a_run_are_refused(case, tmp_path):
    content = json.dumps(case.make).encode()
    refused_as_a_run(content, tmp_path, len(case.name))


@pytest.mark.parametrize("case", of_kind("text of config.json"), ids=str)
def test_texts_of_a_run_are_refused(case, tmp_path):
    refused_as_a_run(case.make, tmp_path, len(case.name))


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
    except config.ConfigError as error:
        nonsense.check_words(f"error: {error}")
    else:
        same = dict(config.flat(config.to_dict(found)))
        given = config.flat(values)
        assert same.keys() == given.keys()
        assert all(same[name] == given[name] for name in same)


@nonsense.PROFILE
@hypothesis.given(cut=st.integers(1, len(WHOLE) - 1))
def test_a_configuration_cut_off_is_refused(cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    refused_as_a_run(WHOLE[:cut].encode(), folder, cut)
