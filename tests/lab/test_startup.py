"""What a command does before its first step: little is loaded, and little compiled."""

import importlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from processes import ROOT

from diffusion_jax import lab
from diffusion_jax.checkpoints import manifest
from diffusion_jax.lab.schema.config import Config, Data, Diffusion, Net
from diffusion_jax.lab.training import beginning
from diffusion_jax.lab.wiring import learning
from diffusion_jax.training import parallel

pytestmark = pytest.mark.optimised

COMMANDS = {f"experiments.{p.stem}" for p in (ROOT / "experiments").glob("[a-z]*.py")}
SLOW = (
    "orbax tensorstore sklearn scipy matplotlib tensorflow tensorflow_datasets "
    "diffrax grain torch huggingface_hub pyarrow"
)

# What is loaded after the package alone, after some commands and after all; and that
# notebooks have names of modules before these are loaded.
STAGES = f"""
import sys
import diffusion_jax, experiments.__main__
from diffusion_jax import lab
print(*sys.modules)
print(*dir(lab))
import experiments.train, experiments.edit, experiments.codec
print(*sys.modules)
import {", ".join(COMMANDS)}
print(*sys.modules)
"""


def test_packages_are_loaded_where_they_are_used():
    command = [sys.executable, "-c", STAGES]
    lines = subprocess.check_output(command, text=True).splitlines()
    bare, face, light, whole = (set(line.split()) for line in lines)
    assert not {"jax", "numpy", "flax"} & bare
    assert "diffusion_jax.lab" in bare
    assert face == set(lab.__all__)
    assert "flax" not in light
    assert "jax" in whole
    assert not whole & set(SLOW.split())


def test_modules_are_there_by_name():
    for package in ("", ".training", ".evaluation"):
        found = importlib.import_module(f"diffusion_jax{package}")
        assert set(found.__all__) <= set(dir(found))
        assert all(getattr(found, n).__name__.endswith(n) for n in found.__all__)
        assert not hasattr(found, "nothing")


def test_the_first_state_is_that_of_the_seed_to_the_bit():
    config = Config(
        data=Data(image_size=8, channels=1),
        net=Net(
            channels=8, multipliers=(1,), blocks=1, attention=(), groups=4, classes=3
        ),
        diffusion=Diffusion(schedule="learned"),
    )
    mesh = parallel.make_mesh(1)
    states = (
        beginning.first_state(config, mesh),
        learning.as_trained(config, learning.init_state(config), mesh),
    )
    one, other = (jax.tree.map(manifest.stored, state) for state in states)
    jax.tree.map(np.testing.assert_array_equal, one, other)
