"""What is handed to a pure function in another type: right, or refused in three parts.

Everything is computed in the default floating-point type, and one key draws the same
noise for images of every type. Whole numbers are values of 0 to 255 that nobody scaled.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows_core
import rows_guidance
import rows_kinds
import rows_losses
import rows_times
from transforms import inputs

IMAGES = ("x0", "x", "y", "u")
BORDERS = [
    *("gaussian.q_sample", "gaussian.p_sample-large", "gaussian.denoiser-clip"),
    *("samplers.ddpm-large", "samplers.ddim-0.5", "samplers.padded", "samplers.sample"),
    *("solvers.edm", "langevin.langevin", "langevin.predictor_corrector", "ode.ode"),
    *("editing.vary", "editing.interpolate", "editing.encode", "editing.slerp"),
    *("analytic.x0_variance", "guidance.classifier", "losses.weighted"),
    *("losses.diffusion", "timesteps.logit_normal"),
]
# What tells 256 values apart.
FINE = [
    *("losses.vlb-large", "losses.decoder-tanh", "losses.reconstruction"),
    *("likelihood.bound", "likelihood.continuous_bound", "likelihood.ode_bits_per_dim"),
]
ROWS = {
    row.id: row
    for file in (rows_core, rows_guidance, rows_kinds, rows_losses, rows_times)
    for row in file.ROWS
}


def result(name, cast):
    found, row = inputs(), ROWS[name]
    args = [cast(found[k]) if k in IMAGES else found[k] for k in row.inputs.split()]
    return jax.tree.leaves(row.fn(*args))


@pytest.mark.parametrize("name", BORDERS)
def test_bfloat16_gives_what_its_values_give(name):
    rounded = result(name, lambda a: jnp.asarray(a, jnp.bfloat16))
    exact = result(name, lambda a: a.astype(jnp.bfloat16).astype(jnp.float32))
    for a, b in zip(rounded, exact, strict=True):
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        assert np.max(np.abs(a - b) / (1 + np.abs(b))) < 0.01


@pytest.mark.parametrize("name", [*BORDERS, *FINE])
def test_float32_gives_what_its_values_give_in_double_precision(name, x64):
    for a, b in zip(
        result(name, lambda a: a.astype(jnp.float32)),
        result(name, lambda a: a.astype(jnp.float32).astype(jnp.float64)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, jnp.uint8) for n in [*BORDERS, *FINE] if n != "timesteps.logit_normal"]
    + [(n, jnp.float16) for n in FINE],
)
def test_what_cannot_be_right_is_refused(name, dtype, refuses):
    with refuses(re.sub("<class .*[.]|'>", "", str(dtype))):
        result(name, lambda a: jnp.asarray(100 * jnp.abs(a), dtype))


def test_a_batch_of_numpy_is_as_good():
    """As data sets give it: float64, whatever JAX computes in."""
    for name in ("samplers.sample", "likelihood.bound"):
        plain = result(name, np.asarray)
        for a, b in zip(plain, result(name, jnp.asarray), strict=True):
            np.testing.assert_array_equal(a, b)
