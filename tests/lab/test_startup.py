"""What a command does before its first step: little is loaded, and little compiled."""

import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from diffusion_jax.lab.schema.config import Config, Data, Diffusion, Net
from diffusion_jax.lab.training import beginning
from diffusion_jax.lab.wiring import learning
from diffusion_jax.training import parallel

pytestmark = pytest.mark.optimised

COMMANDS = [
    "train",
    "sample",
    "edit",
    "eval_fid",
    "eval_nll",
    "compare_samplers",
    "compare_diffusers",
    "ablation",
    "legibility",
    "convert",
    "checkpoints",
    "train_classifier",
    "train_noisy_classifier",
    "bench",
    "compiled",
]
SLOW = [
    "orbax",
    "tensorstore",
    "sklearn",
    "scipy",
    "matplotlib",
    "tensorflow",
    "tensorflow_datasets",
    "diffrax",
    "grain",
    "torch",
    "huggingface_hub",
]

SMALL = Config(
    data=Data(image_size=8, channels=1),
    net=Net(channels=8, multipliers=(1,), blocks=1, attention=(), groups=4),
)


def loaded_by(code):
    """The packages that a process has loaded after some code."""
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_the_package_alone_loads_nothing():
    assert not {"jax", "numpy", "flax"} & loaded_by("import diffusion_jax")


def test_commands_load_what_is_slow_only_where_they_use_it():
    modules = ", ".join(f"experiments.{name}" for name in COMMANDS)
    loaded = loaded_by(f"import {modules}")
    assert "jax" in loaded
    assert not loaded & set(SLOW)


@pytest.mark.parametrize("package", ["", ".training", ".evaluation"])
def test_modules_are_there_by_name(package):
    name = f"diffusion_jax{package}"
    code = (
        f"import {name} as p; assert set(p.__all__) <= set(dir(p)); "
        "assert all(getattr(p, name).__name__.endswith(name) for name in p.__all__); "
        "assert not hasattr(p, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("of", [{"classes": 3}, {}])
def test_the_first_state_is_that_of_the_seed_to_the_bit(of):
    net = replace(SMALL.net, **of)
    learned = Diffusion(schedule="cosine" if of else "learned")
    config = Config(data=SMALL.data, net=net, diffusion=learned)
    whole, mesh = learning.init_state(config), parallel.make_mesh(1)
    first = beginning.first_state(config, mesh)
    assert_same(first, learning.as_trained(config, whole, mesh))


def assert_same(one, other):
    def plain(tree):
        return jax.tree.map(
            lambda x: (
                jax.random.key_data(x)
                if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
                else x
            ),
            tree,
        )

    jax.tree.map(np.testing.assert_array_equal, plain(one), plain(other))
