"""Kernels and bytes, read off compiled programs and off written ones."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax.lab.speed import compiled_program
from diffusion_jax.training import parallel

pytestmark = pytest.mark.optimised

WRITTEN = (Path(__file__).parent / "step.hlo").read_text()


def test_a_written_program_is_read_line_by_line():
    found = {kernel.name: kernel for kernel in compiled_program.kernels(WRITTEN)}
    assert {name: (k.kind, k.moved, k.times) for name, k in found.items()} == {
        # Ten of the thousand numbers, ten others, and ten half as wide.
        "cut": ("elementwise", 40 + 40 + 20, 1),
        "y": ("product", 3 * 256, 7),  # without its scratch
        "conv": ("convolution", 40 + 16, 1),
        "all-reduce-start": ("collective", 40, 1),
        "all-gather-start": ("collective", 20 + 160, 1),
        "copy-start": ("copy", 20 + 20, 1),
        "window": ("dynamic-slice", 40 + 40, 1),
        "narrow": ("my_convert", 40 + 10, 1),
        "copy": ("copy", 40, 1),
        "sum.1": ("reduction", 20 + 4, 1),
    }
    assert found["cut"].source == "jit(step)/slice"


SIZES = {
    "pred[3]{0}": 3,
    "(bf16[2,3]{1,0:T(8,128)(2,1)}, s64[2])": 28,
    "f8e4m3fn[10]{0}": 10,
    "(s4[3], c64[2])": 3 + 16,
    "token[]": 0,
}


def test_sizes_of_shapes(refuses):
    assert {shape: compiled_program.size(shape) for shape in SIZES} == SIZES
    with refuses("'hello'"):
        compiled_program.kernels("hello")


def kinds(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    return [kernel.kind for kernel in compiled_program.kernels(text)]


def test_convolutions_and_reductions_are_told_apart():
    x, kernel = jnp.ones((8, 16, 16, 32)), jnp.ones((3, 3, 32, 32))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert kinds(convolve, x, kernel) == ["convolution"]
    assert kinds(lambda x: jnp.square(x).sum((1, 2)), x) == ["reduction"]
    assert kinds(lambda x: jnp.tanh(x) + 1, x) == ["elementwise"]


def test_what_devices_tell_each_other_is_the_gradient():
    mesh = parallel.make_mesh(8)
    whole, cut = parallel.replicated(mesh), NamedSharding(mesh, PartitionSpec("data"))
    w, x = np.ones((32, 48), np.float32), np.ones((64, 32), np.float32)
    grad = jax.grad(lambda w, x: jnp.square(x @ w).mean())
    lowered = jax.jit(grad, in_shardings=(whole, cut), out_shardings=whole).lower(w, x)
    found = compiled_program.kernels(lowered.compile().as_text())
    told = [kernel.moved for kernel in found if kernel.kind == "collective"]
    assert told == [2 * w.nbytes]
