"""Configurations: what fits passes, what does not is named before any work."""

import dataclasses
import json
import math
import re
import typing

import numpy as np
import pytest

from diffusion_jax import errors
from diffusion_jax.lab.schema import checks, config, facts
from diffusion_jax.lab.training import arguments
from diffusion_jax.lab.wiring import learning
from experiments.configs import EXPERIMENTS, cifar10, cifar10_official


def parse(*argv):
    return arguments.parse(argv, EXPERIMENTS, prog="python -m experiments.train")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid_survives_json_and_says_what_it_takes(name):
    chosen, doc = EXPERIMENTS[name]
    checks.validate(chosen)
    assert config.from_dict(json.loads(json.dumps(config.to_dict(chosen)))) == chosen
    assert chosen.name == name
    command = "make train" + f" EXP={name}" * (name != "digits")
    for word in ("Command", "Hardware", "Time", "Expected", command):
        assert word in doc, word
    # Networks of large machines run in the fast form.
    official = name.startswith("table2") or name == "cifar10_official"
    of_cpu = name.startswith("digits") or name == "fashion_mnist_latent"
    assert chosen.net.dtype == ("float32" if official or of_cpu else "bfloat16")
    assert chosen.optimizer.preset == ("official" if official else "modern")


def test_cifar10_is_the_paper_to_the_constant():
    """Section 4 and Appendix B of Ho et al. 2020, and the official code."""
    c = cifar10_official.CONFIG
    net = config.Net(128, (1, 2, 2, 2), 2, (16,), 0.1, 32, "float32")
    adam = config.Optimizer(
        "official", 2e-4, 5000, "constant", 0.999, 1.0, 8, (0.9999,)
    )
    assert (c.net, c.optimizer) == (net, adam)
    d = c.diffusion
    assert d == config.Diffusion("linear", 1000, 1e-4, 0.02, variance="large")
    assert (d.prediction, d.loss) == ("eps", "eps")
    assert (c.train.steps, c.train.batch_size) == (800_000, 128)
    assert (c.data.flip, c.data.image_size, c.sample.steps) == (True, 32, None)


def test_the_authors_arithmetic_is_one_flag_of_any_experiment():
    official = dataclasses.replace(cifar10_official.CONFIG, name="cifar10")
    assert parse("cifar10", "--official") == official
    # A flag still says more than the experiment.
    found = parse("fashion_mnist", "--official", "--net.dtype", "bfloat16")
    assert (found.optimizer.preset, found.net.dtype) == ("official", "bfloat16")


LARGE = {
    "celebahq256": (128, 500_000),
    "lsun_church256": (128, 1_200_000),
    "lsun_cat256": (128, 1_800_000),
    "lsun_bedroom256": (128, 2_400_000),
    "lsun_bedroom256_large": (192, 1_150_000),
}


def test_the_large_images_are_the_paper_to_the_constant():
    assert LARGE.keys() == {n for n in EXPERIMENTS if n.endswith(("256", "ge"))}
    for name, (channels, steps) in LARGE.items():
        c = EXPERIMENTS[name].config
        net = (c.net.channels, c.net.multipliers, c.net.attention, c.net.dropout)
        assert net == (channels, (1, 1, 2, 2, 4, 4), (16,), 0.0)
        assert (c.net.blocks, c.train.batch_size, c.train.steps) == (2, 64, steps)
        assert (c.diffusion.variance, c.optimizer.learning_rate) == ("small", 2e-5)
        assert c.data.flip == ("bedroom" not in name)


BAD = {
    "--diffusion.num-steps 1": "diffusion.num_steps must be from 2 to 1000000; got 1",
    "--net.channels 12": "must be a multiple of net.groups = 8; got 12",
    "--net.attention 5": r"among the resolutions \[4, 8\]; got 5",
    "--data.image-size 9": "data.image_size must be a multiple of 2.*; got 9",
    "--data.channels 2": "data.channels must be 1 or 3; got 2",
    "--diffusion.beta-end 1": "0 < start <= end < 1; got 0.0001 and 1.0",
    "--diffusion.variance learned": "diffusion.loss must be vlb",
    "--optimizer.ema-decay 1": "optimizer.ema_decay must be at least 0",
    "--train.measure-every 7": "a multiple of train.checkpoint_every, 1000; got 7",
    "--train.epochs 2 --train.steps 9": "must be left out with train.epochs.*; got 9",
    "--optimizer.preset official --train.batch-size 20": "a multiple of 8; got 20",
    "--optimizer.preset official --train.accumulate 2": "train.accumulate must be 1",
    "--train.accumulate 3": "train.batch_size must be a multiple of 3; got 64",
    "--diffusion.loss hybrid": "diffusion.variance must be learned or range",
    "--diffusion.weighting p2": "diffusion.loss must be eps with the weighting p2",
    "--diffusion.weighting edm --diffusion.loss eps --diffusion.schedule jsd": (
        "diffusion.schedule must be another with the weighting edm"
    ),
    "--diffusion.weighting-value 3": "weighting_value must be left out",
    "--diffusion.schedule learned": "diffusion.loss must be vlb with a learned",
    "--diffusion.schedule flow --diffusion.prediction mean": "other than mean",
    "--diffusion.schedule vp --diffusion.density importance": "log_normal or logit",
    "--diffusion.density log_normal": "uniform or importance with the discrete",
    "--diffusion.schedule ve --diffusion.logsnr-shift 1": "logsnr_shift must be 0",
    "--diffusion.sigma-min 90": "0 < min < max; got 90.0 and 80.0",
    "--net.classes 10 --net.label-dropout 0 --sample.guidance 2": "must be left out",
    "--net.classes 10 --sample.label 10": "must be below 10, the number of classes",
    "--net.classes 10 --sample.sampler ode": "must be given with the sampler ode",
    "--diffusion.loss vlb --diffusion.variance learned": "steps must be 1000, all",
    "--sample.variance analytic": "it is estimated afterwards; got analytic",
    "--sample.classifier-guidance 2": "the classifier is trained afterwards; got 2",
    "--sample.variance range": "must be one that the network was trained with",
    "--diffusion.schedule learned --diffusion.loss vlb --sample.sampler heun": (
        "sample.grid must be uniform or quadratic"
    ),
    "--sample.threshold 0.9 --sample.label 1 --sample.classifier-guidance 1": (
        "sample.threshold must be left out with classifier guidance"
    ),
    "--optimizer.ema-snapshots 5": "optimizer.ema_lengths must be given",
    "--optimizer.ema-lengths 0.5": "must be above 0 and at most 0.28; got 0.5",
    "--optimizer.ema-decay 0.9 0.9": "must be different from each other",
    "--name a/b": "name must be a plain folder name; got 'a/b'",
    f"--name {'n' * 201}": "name must be at most 200 bytes long; got 201",
    "--net.multipliers": "since there are 0 levels; got 8",
    "--net.multipliers 0": "must be a multiple of net.groups = 8; got 0",
    "--train.seed 4294967296": "from 0 to 4294967295; got 4294967296",
    "--data.image-size 8 2": r"height and width, from 4 to 4096; got \(8, 2\)",
    "--data.image-size 8 16 --net.attention 16": r"resolutions \[4, 8\]; got 16",
    "--net.multipliers 1 8192": "net.multipliers must be at most 65536; got 1310",
    f"--net.multipliers {'1 ' * 13}": "at most 12 entries; got 13",
    "--net.fourier 24": "net.fourier must be from 0 to 23; got 24",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_values_are_named(flags):
    with pytest.raises(errors.ConfigError, match=BAD[flags]) as caught:
        parse("digits", *flags.split())
    # Three parts: what must hold, what was got, what to do.
    assert " must be " in str(caught.value)
    assert "Change it with --" in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "flip", "said"),
    [
        ("cifar10", True, ""),
        ("cifar10 --data.source mnist", False, "not mirrored, as those of cifar10 are"),
        ("cifar10 --data.source npz:x --data.flip", True, "32x32x3, mirrored, with"),
        ("digits --data.source npz:x", False, "images of npz:x as 8x8x1, with"),
    ],
)
def test_images_of_ones_own_are_mirrored_only_when_asked(argv, flip, said, capsys):
    assert parse(*argv.split()).data.flip == flip
    shown = capsys.readouterr().out
    assert said in shown if said else not shown


def test_a_short_run_has_a_short_warm_up():
    rate = learning.rate(config.replace(cifar10.CONFIG, "train", steps=100))
    seen = [float(rate(n)) for n in (0, 10, 25, 90)]
    assert seen == pytest.approx([0, 8e-5, 2e-4, 2e-4])


def test_help_explains_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        parse("cifar10", "--help-all")
    shown = capsys.readouterr().out
    # Texts are wrapped once.
    assert re.search(r"Refuse to go on \(resume\).*\n.*from the newest that ver", shown)
    shown = " ".join(shown.replace("│", " ").split())
    assert "make train EXP=cifar10" in shown
    for key, hint in HINTS.items():
        if not dataclasses.is_dataclass(hint):
            flag = f"--{key.replace('_', '-')}"
            assert flag in shown or flag.replace(".", ".no-") in shown
    for word in ("(sampler, scheduler)", "(NFE)", "(CFG)", "(EMA)"):
        assert word in shown


def test_what_may_differ_when_a_run_goes_on():
    old = EXPERIMENTS["digits"].config
    fine = config.replace(old, "train", steps=9000, devices=2, stop_at=7)
    assert config.differences(old, config.replace(fine, "sample", steps=50)) == []
    other = config.replace(config.replace(old, "net", channels=64), "train", seed=1)
    said = ["net.channels: 16 -> 64", "train.seed: 0 -> 1"]
    assert config.differences(old, other) == said
    longer = config.replace(old, "train", steps=9000)
    assert config.changed(old, longer) == {"train.steps": (5000, 9000)}


SIZES = {"16": (16, 16), "16 16": (16, 16), "8 16": ((8, 16), [8, 16])}


@pytest.mark.parametrize("flag", SIZES)
def test_a_size_is_a_side_or_height_and_width(flag):
    """Read back it is the same; that of a square is one number, as it always was."""
    chosen = parse("digits", "--data.image-size", *flag.split(), "--net.attention", "8")
    size, in_json = SIZES[flag]
    assert chosen.data.image_size == size
    assert chosen.data.shape == (*np.broadcast_to(size, 2), 1)
    written = json.loads(json.dumps(config.to_dict(chosen)))
    assert written["data"]["image_size"] == in_json
    assert config.from_dict(written) == chosen


MARKS = {
    facts.FREE: """name output data.path data.download net.conv net.remat sample
        train.stop_at train.parallel train.devices train.fsdp train.input
        train.log_every train.tensorboard train.checkpoint_every train.keep
        train.keep_every train.max_skipped train.deterministic train.epochs
        train.measure_every train.measure_count""",
    facts.SHAPE: """data.channels net.channels net.multipliers net.blocks net.groups
        net.classes net.label_dropout net.variant net.fourier autoencoder.kind
        autoencoder.channels autoencoder.multipliers autoencoder.blocks
        autoencoder.latent autoencoder.attention autoencoder.middle_attention
        autoencoder.groups autoencoder.quant""",
    facts.HOW: "net.dtype net.conv net.remat",
}


def test_what_a_change_of_a_field_changes_is_said_of_each():
    """One mark too many lets a run go on, or start, with what it cannot have."""
    for mark, names in MARKS.items():
        assert sorted(facts.marked(config.Config, mark)) == sorted(names.split())


def test_a_file_of_another_version_is_read_or_refused():
    """A field that it lacks has its default; one that is unknown is named."""
    values = config.to_dict(cifar10.CONFIG)
    with pytest.raises(errors.ConfigError, match=r"must be among .*; got flavour"):
        config.from_dict(values | {"flavour": "sweet"})
    del values["diffusion"]["schedule"]
    assert config.from_dict(values) == cifar10.CONFIG


def hints(kind=config.Config, prefix=""):
    """All fields and sections, as ('section.field', type)."""
    for name, hint in typing.get_type_hints(kind).items():
        yield prefix + name, hint
        if dataclasses.is_dataclass(hint):
            yield from hints(hint, f"{prefix}{name}.")


HINTS = dict(hints())


def of(hint):
    """The type of a field, or of the entries of its list, without None."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    several = parts and typing.get_origin(hint) is not typing.Literal
    return of(parts[0]) if several else hint


NUMBERS = [(10**30, int), (-(10**30), int), (math.nan, float), (math.inf, float)]


@pytest.mark.parametrize(("number", "kind"), NUMBERS)
def test_numbers_that_no_field_can_have_are_refused(number, kind):
    """Of every field of the type, as a flag may give them."""
    keys = [key for key, hint in HINTS.items() if of(hint) is kind]
    assert len(keys) > 20
    for key in keys:
        section, name = key.split(".")
        several = (number,) * (2 if name == "guidance_interval" else 1)
        value = several if "tuple" in str(HINTS[key]) else number
        changed = config.replace(EXPERIMENTS["digits"].config, section, **{name: value})
        with pytest.raises(errors.ConfigError, match=r" must be .*; got .+\. .+"):
            checks.validate(changed)


# Values that no field of a type can have, as a damaged file may hold them.
WRONG = {
    int: ("a whole number", [None, 2.5, "2", True, math.inf]),
    int | None: ("null or a whole number", [2.5, False]),
    float: ("a finite number", [None, "x", True, -math.inf, math.nan, 10**400]),
    float | None: ("null or a finite number", ["x", math.inf]),
    bool: ("true or false", [None, "x", 0]),
    str: ("text", [None, 5, []]),
    str | None: ("null or text", [5, {}]),
    tuple[int, ...]: ("a list of whole numbers", [None, "x", 5, [1.0], [True], [[1]]]),
    tuple[float, ...]: ("a list of finite numbers", [0.9, [None], [math.nan]]),
    tuple[float, float] | None: (
        "null or a list of 2 finite numbers",
        ["ab", [1.0], [1.0, 2.0, 3.0], [1.0, math.inf]],
    ),
    int | tuple[int, int]: (
        "a whole number or a list of 2 whole numbers",
        [None, 2.5, "8", True, [8], [8, 1.5]],
    ),
}
NAME = ("(null or )?one of [^;]+", [5, [], {}, "cos"])


def damaged(changes):
    """A configuration as JSON has it, with the values of some fields changed."""
    values = config.to_dict(cifar10.CONFIG)
    for key, value in changes.items():
        *section, name = key.split(".")
        (values[section[0]] if section else values)[name] = value
    return values


@pytest.mark.parametrize("turn", range(6))
def test_all_values_of_other_types_are_named_at_once(turn):
    """In every field, of each type one after the other."""
    kinds = {
        key: WRONG.get(hint, NAME)
        for key, hint in HINTS.items()
        if not dataclasses.is_dataclass(hint)
    }
    changes = {k: values[turn % len(values)] for k, (_, values) in kinds.items()}
    with pytest.raises(errors.ConfigError, match=" must be of ") as caught:
        config.from_dict(damaged(changes))
    for key, (kind, _) in kinds.items():
        said = rf" {re.escape(key)} [^;]*, not {kind}(;|\. Correct)"
        assert re.search(said, str(caught.value)), key


def test_what_is_no_object_is_refused(refuses):
    sections = [key for key, hint in HINTS.items() if dataclasses.is_dataclass(hint)]
    for value in (None, 5, []):
        with refuses("the whole"):
            config.from_dict(value)
        for key in sections:
            with refuses(f"{key} {json.dumps(value)}, not an object with fields"):
                config.from_dict(damaged({key: value}))


def test_a_whole_number_is_a_number_too():
    given = {"diffusion.sigma_data": 1, "sample.guidance_interval": [0, 2]}
    found = config.from_dict(damaged(given))
    assert isinstance(found.diffusion.sigma_data, float)
    assert (found.diffusion.sigma_data, found.sample.guidance_interval) == (1.0, (0, 2))
