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
FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": processes.QUICK_XLA}
AIMS = [kills.at_commit, kills.at_save]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was killed again and again, the kills, and the run undisturbed."""
    folder = tmp_path_factory.mktemp("kills")
    whole, killed = folder / "whole" / "digits", folder / "killed" / "digits"
    options = {"cache": conftest.CACHE, "extra": FAST}
    # Of images in a file: to load those of scikit-learn takes a second a process.
    images = datasets.load("digits").images[:64]
    np.savez(folder / "images.npz", images=images)
    source = f"npz:{folder / 'images.npz'}"
    flags = ["--train.steps", STEPS, "--data.source", source]
    trainings.finish(whole, *flags, log=folder / "whole.log", **options)
    rng = random.Random(0)
    loop = kills.disturbed(killed, flags, AIMS, rng, folder / "logs", **options)
    return killed, list(loop), whole


def test_it_was_killed_at_work_and_lost_little(runs):
    _, done, _ = runs
    assert len(done) == len(AIMS)
    assert {"a save", "a grid", "a deletion", "a step"} & {
        name for kill in done for name in kill.hit
    }
    assert any(kill.resumed for kill in done)
    for kill in done:
        kills.lost_little(kill)


def test_a_killed_run_ends_as_the_undisturbed_one(runs):
    killed, _, whole = runs
    trainings.same_end(killed, whole, STEPS)
    kills.nothing_left(killed)
