"""What a step is made of, for the devices of this machine and for others."""

import contextlib
import io
import json
import shlex
from pathlib import Path

import jax
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.speed import targets
from diffusion_jax.lab.wiring import learning
from experiments import compiled
from experiments.configs import EXPERIMENTS

SMALL = shlex.split(
    "--net.channels 8 --net.multipliers 1 --net.blocks 1 --net.attention "
    "--net.groups 4 --train.batch-size 16"
)


def run(tmp_path, *flags):
    out = tmp_path / "found.json"
    assert compiled.main(["digits", *SMALL, *flags, "--out", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a step is made of, what a chain's evaluation is, what was shown of one."""
    folder = tmp_path_factory.mktemp("found")
    more = ["--text", str(folder / "step.hlo"), "--largest", "2"]
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        step = run(folder, *more)
    assert (folder / "step.hlo").read_text().startswith("HloModule")
    return step, run(folder, "--what", "sample"), screen.getvalue()


def test_a_step_is_counted_and_shown(found):
    step, _, printed = found
    assert "digits, train, batch 16 on 8 x cpu, float32; compiled in" in printed
    kernels = f"{sum(step['kernels'].values()):,}"
    assert any(line.split()[:2] == ["all", kernels] for line in printed.splitlines())
    assert sum(" MB  " in line for line in printed.splitlines()) == 2
    # Eight devices tell each other the gradient, and hold the state each.
    assert step["kernels"]["collective"] >= 1
    size = size_of_state()
    assert size <= step["memory"]["arguments"] <= 1.1 * size + 10_000
    assert "model" not in step  # of devices whose speed is not known


def size_of_state(*flags):
    argv = ["digits", *SMALL, *flags]
    parsed = compiled.arguments.parse(argv, EXPERIMENTS, prog="test")
    state = learning.state_shapes(parsed)._replace(key=())
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_devices_that_share_a_state_hold_less(tmp_path):
    wide = ["--net.channels", "32"]
    cut = run(tmp_path, *wide, "--train.fsdp", "8")
    assert 1 / 8 < cut["memory"]["arguments"] / size_of_state(*wide) < 1 / 4


def test_an_evaluation_of_the_network_is_less_than_a_third_of_a_step(found):
    step, one, _ = found
    assert 0.3 < one["flops"] / step["flops"] < 0.36
    assert sum(one["kernels"].values()) < sum(step["kernels"].values())


@pytest.mark.parametrize("strategy", ["shard_map", "pmap"])
def test_steps_of_each_device_are_compiled_too(strategy, tmp_path):
    found = run(tmp_path, "--train.parallel", strategy, "--train.devices", "2")
    assert found["kernels"]["collective"] >= 1


def test_parameters_are_cast_once_before_a_chain(found, tmp_path):
    _, wide, _ = found
    half = run(tmp_path, "--what", "sample", "--net.dtype", "bfloat16")
    assert half["memory"]["arguments"] < 0.75 * wide["memory"]["arguments"]


def test_the_model_gives_each_kernel_its_start():
    speed = targets.Speed(
        convolutions=1e12, memory=1e9, start=1e-6, convolution_start=5e-6
    )
    found = {
        "kernels": {"convolution": 100, "reduction": 300, "collective": 2},
        "bytes": {"convolution": 7e9, "reduction": 3e6, "collective": 5e9},
        "flops": 9e9,
        "convolution_flops": 2e9,
    }
    parts = compiled.model(found, speed)
    assert parts == pytest.approx({"convolution": 2 + 0.5, "reduction": 3 + 0.3})


# What was counted for forms of the network of CIFAR-10 that ran on an H200.
COUNTED = json.loads(
    (Path(__file__).parents[1] / "golden/compiled_h100.json").read_text()
)


@pytest.mark.parametrize("row", COUNTED["rows"], ids=lambda row: row["flags"])
def test_the_model_is_near_what_was_measured(row):
    parts = compiled.model(row, targets.H200_SPEED)
    assert sum(parts.values()) == pytest.approx(row["measured_ms"], rel=0.05)


def test_the_model_is_near_each_kind_that_was_measured():
    parts = compiled.model(COUNTED["rows"][0], targets.H200_SPEED)
    parts["elementwise"] += parts.pop("copy")  # told apart otherwise where it ran
    assert parts == pytest.approx(COUNTED["kinds_ms_of_first"], rel=0.1)


def test_operations_of_convolutions_are_told_apart():
    parsed = compiled.arguments.parse(["digits", *SMALL], EXPERIMENTS, prog="test")
    mesh = compiled.parallel.make_mesh(1)
    _, found = compiled.sampling(parsed, mesh)
    # 3x3 at 64 pixels of 16 images: in, two each of three blocks of 8 to 8 channels,
    # 16 to 8 and 8 to 8 in two more; the last is a product. Of one pixel, which are
    # convolutions on GPUs: two shortcuts, and two products of one attention.
    weights = 9 * (8 + 6 * 64 + 2 * (128 + 64)) + 2 * 128 + 2 * 64
    assert found["convolution_flops"] == 2 * 16 * 64 * weights < found["flops"]


REFUSED = {
    "--target moon": "target must be here, h100:8, h200:8 or.*; got 'moon'",
    "--target h100 --train.devices 2": "train.devices must be left out",
    "--out /nowhere/x": "the folder of /nowhere/x must be there; got none",
    "--target h100:12": "target must be.*a host; got 'h100:12'",
    "--train.fsdp 3": "fsdp must divide.*; got 3",
    "--train.batch-size 12": "must be a multiple of the number of devices, 8",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_compiled_for_is_refused(flags):
    with pytest.raises(ValueError, match=REFUSED[flags]):
        compiled.main(["digits", *SMALL, *flags.split()])


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", missing)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    said = r"got topology not implemented for cuda\. Say: pip install 'jax\[cuda12\]'"
    with pytest.raises(ConfigError, match=said):
        targets.aim("h100")
