"""What is handed to a pure function in another type: right, or refused in three parts.

Everything is computed in the default floating-point type, and one key draws the same
noise for images of every type. Whole numbers are values of 0 to 255 that nobody scaled.
"""

import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import CALLS

# Modules, and functions of others, that are given no images.
WITHOUT = (
    "schedule",
    "continuous",
    "learned",
    "weightings",
    "timesteps",
    "solvers.phi",
    "latents",
    # Whose ends of paths are predictions, which were held to that when they were made.
    "distillation",
)
WITHOUT += tuple(
    f"autoencoding.{name}" for name in ("kl", "hinge", "adversarial", "perceptual")
)
WITHOUT += ("gaussian.normal", "prediction.reverse_variance", "analytic.bounded")
WITHOUT += (
    "losses.normal_kl",
    "sde.coefficients",
    "samplers.each_key",
    "samplers.fold",
)
IMAGES = [n for n in CALLS if not n.startswith(WITHOUT) or n == "schedule.real_data"]
# What tells 256 values apart.
FINE = ["losses.vlb", "losses.hybrid", "losses.decoder", "losses.reconstruction"]
FINE += ["autoencoding.elbo"]
FINE += [name for name in CALLS if name.startswith("likelihood.")]
# Solved to a tolerance of double precision.
EXACT = ["ode.ode", "likelihood.ode_bits_per_dim"]


def images(change):
    """Inputs whose images are changed."""
    a = calls.inputs()
    return a._replace(x0=change(a.x0), x=change(a.x), y=change(a.y))


def hold_same(name, a, b, bound):
    one, other = (jax.tree.leaves(CALLS[name](inputs)) for inputs in (a, b))
    for x, y in zip(one, other, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", [n for n in IMAGES if n not in EXACT])
def test_a_coarser_type_gives_what_its_values_give_in_double_precision(name, x64):
    coarse, bound = (jnp.float32, 1e-5) if name in FINE else (jnp.bfloat16, 0.01)
    low = images(lambda x: x.astype(coarse))
    hold_same(name, low, images(lambda x: x.astype(coarse).astype(float)), bound)


@pytest.mark.parametrize("name", IMAGES)
def test_whole_numbers_and_what_cannot_tell_256_values_apart_are_refused(name, refuses):
    with refuses("uint8"):
        CALLS[name](images(lambda x: (30 * x + 128).astype(jnp.uint8)))
    if name in FINE:
        with refuses("float16"):
            CALLS[name](images(lambda x: x.astype(jnp.float16)))


@pytest.mark.parametrize("name", ["samplers.sample", "likelihood.bound"])
def test_a_batch_of_numpy_is_as_good(name):
    """As data sets give it: float64, whatever JAX computes in."""
    hold_same(name, images(lambda x: np.asarray(x, np.float64)), calls.inputs(), 0)
