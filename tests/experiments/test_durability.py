"""What a run is made of: nothing can be left out, and other devices make the same."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from processes import ROOT, no_file_beyond
from small_run import digests, restored, state_digests, train_small

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.training import compilation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


# Neither the grid of the last step is drawn, nor a program for it made.
UNTIL = ("--train.stop-at", "11")


@pytest.fixture(scope="module")
def half(folder):
    return train_small(folder, "half", "--train.stop-at", "7")


def copy_of(run, name):
    shutil.copytree(run.folder, run.folder.with_name(name))
    return runs.Run(run.folder.with_name(name))


@pytest.fixture(scope="module")
def whole(folder):
    return train_small(folder, "whole", *UNTIL)


def test_a_run_that_moves_between_devices_is_the_same_within_1e_5(folder, whole, half):
    moved = copy_of(half, "moved")
    for devices, until in ((8, 9), (1, 11)):
        flags = ("--train.stop-at", str(until), "--train.devices", str(devices))
        train_small(folder, "moved", *flags)
    one, other = restored(whole).state, restored(moved).state
    assert int(one.step) == int(other.step) == 11
    for name in ("params", "averages", "opt_state"):
        leaves = jax.tree_util.tree_leaves_with_path(getattr(one, name))
        others = jax.tree.leaves(getattr(other, name))
        for (path, a), b in zip(leaves, others, strict=True):
            # But for the bias of the keys in attention, whose gradient is zero: Adam
            # follows its rounding error.
            if not jax.tree_util.keystr(path).endswith("['key']['bias']"):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    logs = [[json.loads(line) for line in run.metrics.open()] for run in (whole, moved)]
    assert [line["step"] for line in logs[0]] == [5, 10]
    for a, b in zip(*logs, strict=True):
        assert a["step"] == b["step"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


def test_a_disk_that_fills_during_a_run_costs_nothing_but_time(folder, whole, half):
    run = copy_of(half, "full")
    before = state_digests(run)
    # Enough for every small file, too little for a checkpoint's.
    with no_file_beyond(20_000), pytest.raises(checkpoint.CheckpointError) as caught:
        train_small(folder, "full", *UNTIL)
    assert str(run.checkpoints) in str(caught.value)
    assert "File too large" in str(caught.value)
    real = runs.append_line

    def append(path, values):
        real(pathlib.Path("/dev/full"), values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "append_line", append)
        with pytest.raises(OSError, match="No space left on device") as other:
            train_small(folder, "full", *UNTIL)
    assert other.value.filename == "/dev/full"
    assert state_digests(run) == before
    train_small(folder, "full", *UNTIL)
    assert digests(run) == digests(whole)
    assert not [path for path in run.folder.rglob("*") if "tmp" in path.name]


FLAG = f"{compilation.FLAG}=true"
# What JAX has read by the time that it has devices: XLA ends a process whose flags it
# does not know.
LOOK = """
import os, sys
import jax
from diffusion_jax.training import compilation
from diffusion_jax.lab.process import stopping
from experiments import train

def look():
    assert not compilation._started()
    print(os.environ.get("XLA_FLAGS"))
    print(jax.device_count(), compilation._started())
    sys.exit(0)

stopping.requests = look
train.main(["digits", *sys.argv[1:]])
"""


def test_the_flag_is_there_before_jax_looks_for_devices(tmp_path):
    flags = ["--train.deterministic", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *flags],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_dump_to="},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    given, devices = done.stdout.splitlines()
    assert given == f"--xla_dump_to= {FLAG}"
    assert devices.endswith(" True")


def test_the_flag_is_given_once_and_not_against_another():
    env = {"XLA_FLAGS": FLAG}
    compilation.ask(env)
    assert env == {"XLA_FLAGS": FLAG}
    with pytest.raises(ValueError, match=r"must not forbid .*; got .*=false\. Take"):
        compilation.ask({"XLA_FLAGS": f"{compilation.FLAG}=false"})


def test_a_gpu_that_was_found_without_the_flag_is_refused(monkeypatch):
    jax.devices()
    compilation.ask({})  # of a CPU nothing is asked
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="got a GPU that was found without it"):
        compilation.ask({})
