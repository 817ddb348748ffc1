"""A run that is killed at any moment ends as if nothing had been.

The quick part: two kills. The rest, with a disk that fills and the like, is `make
torture`: see tests/torture.
"""

import random

import conftest
import numpy as np
import processes
import pytest
from torture import kills, trainings

from diffusion_jax.data import datasets

STEPS = 180
# As the tests around it are: with few optimisations, and what was compiled once.
OPTIONS = {
    "cache": conftest.CACHE,
    "command": ["-c", processes.TRAIN],
    "extra": {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": processes.QUICK_XLA,
    },
}
AIMS = [kills.at_commit, kills.at_save]


@pytest.mark.usefixtures("small_network")
def test_a_killed_run_loses_little_and_ends_as_the_undisturbed_one(tmp_path):
    whole, killed = tmp_path / "whole" / "digits", tmp_path / "killed" / "digits"
    # Of images in a file: to load those of scikit-learn takes a second a process.
    source = tmp_path / "images.npz"
    np.savez(source, images=datasets.load("digits").images[:64])
    flags = ["--train.steps", STEPS, "--data.source", f"npz:{source}"]
    trainings.finish(whole, *flags, log=tmp_path / "whole.log", **OPTIONS)
    rng, logs = random.Random(0), tmp_path / "logs"
    done = list(kills.disturbed(killed, flags, AIMS, rng, logs, **OPTIONS))
    assert len(done) == len(AIMS)
    hit = {name for kill in done for name in kill.hit}
    assert {"a save", "a grid", "a deletion", "a step"} & hit
    assert any(kill.resumed for kill in done)
    for kill in done:
        kills.lost_little(kill)
    trainings.same_end(killed, whole, STEPS)
    kills.nothing_left(killed)
