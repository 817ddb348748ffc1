"""What a command does before its first step: little is loaded, and little compiled."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import experiments
from diffusion_jax.checkpoints import manifest
from diffusion_jax.lab.schema.config import Config, Data, Diffusion, Net
from diffusion_jax.lab.training import beginning
from diffusion_jax.lab.wiring import learning
from diffusion_jax.training import parallel

pytestmark = pytest.mark.optimised

ROOT = Path(experiments.__file__).parent
COMMANDS = sorted(path.stem for path in ROOT.glob("[a-z]*.py"))
SLOW = (
    "orbax tensorstore sklearn scipy matplotlib tensorflow tensorflow_datasets "
    "diffrax grain torch huggingface_hub pyarrow"
)

SMALL = Config(
    data=Data(image_size=8, channels=1),
    net=Net(channels=8, multipliers=(1,), blocks=1, attention=(), groups=4),
)


def loaded_by(code):
    """The packages that a process has loaded after some code."""
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_the_package_alone_loads_nothing():
    assert not {"jax", "numpy", "flax"} & loaded_by(
        "import diffusion_jax, experiments.__main__"
    )


def test_commands_load_what_is_slow_only_where_they_use_it():
    modules = ", ".join(f"experiments.{name}" for name in COMMANDS)
    loaded = loaded_by(f"import {modules}")
    assert len(COMMANDS) >= 15
    assert "jax" in loaded
    assert not loaded & set(SLOW.split())
    light = "import experiments.train, experiments.edit, experiments.codec"
    assert "flax" not in loaded_by(light)


def test_modules_are_there_by_name():
    code = (
        "import importlib\n"
        "for package in '', '.training', '.evaluation':\n"
        "    p = importlib.import_module(f'diffusion_jax{package}')\n"
        "    assert set(p.__all__) <= set(dir(p))\n"
        "    assert all(getattr(p, n).__name__.endswith(n) for n in p.__all__)\n"
        "    assert not hasattr(p, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_first_state_is_that_of_the_seed_to_the_bit():
    diffusion, net = Diffusion(schedule="learned"), replace(SMALL.net, classes=3)
    config = Config(data=SMALL.data, net=net, diffusion=diffusion)
    whole, mesh = learning.init_state(config), parallel.make_mesh(1)
    first = beginning.first_state(config, mesh)
    one, other = (
        jax.tree.map(manifest.stored, state)
        for state in (first, learning.as_trained(config, whole, mesh))
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
