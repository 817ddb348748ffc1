"""All is computed in the default type; whole numbers that nobody scaled are refused."""

import re

import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import CALLS

# Modules, and functions of others, that are given no images.
WITHOUT = ("schedule", "continuous", "learned", "weightings", "timesteps", "latents")
# The ends of paths of the last are predictions, held to that when they were made.
WITHOUT += ("solvers.phi", "gaussian.normal", "distillation")
WITHOUT += ("prediction.reverse_variance", "analytic.bounded", "losses.normal_kl")
WITHOUT += ("sde.coefficients", "samplers.each_key", "samplers.fold")
WITHOUT += ("autoencoding.kl", "autoencoding.hinge", "autoencoding.adversarial")
WITHOUT += ("autoencoding.perceptual",)
IMAGES = [n for n in CALLS if not n.startswith(WITHOUT) or n == "schedule.real_data"]
# What tells 256 values apart.
FINE = ["losses.vlb", "losses.hybrid", "losses.decoder", "losses.reconstruction"]
FINE += ["autoencoding.elbo"]
FINE += [name for name in CALLS if name.startswith("likelihood.")]
# What moves numbers and computes none, and calls of what is looked into by itself.
MOVES = {"reshape", "broadcast_in_dim", "squeeze", "slice", "transpose", "rev"}
MOVES |= {"concatenate", "dynamic_slice", "gather", "pjit", "jit"}


def images(change):
    """Inputs whose images are changed."""
    a = calls.inputs()
    return a._replace(x0=change(a.x0), x=change(a.x), y=change(a.y))


@pytest.mark.parametrize("name", IMAGES)
def test_nothing_is_computed_in_a_coarser_type_or_it_is_as_good(name, x64):
    coarse, short = (jnp.float32, "f32") if name in FINE else (jnp.bfloat16, "bf16")
    low = images(lambda x: x.astype(coarse))
    program = str(jax.make_jaxpr(CALLS[name])(low))
    assert f":{short}[8,2,2,1]" in program
    if not set(re.findall(rf":{short}\[[^\]]*\] = ([a-z_]+)", program)) <= MOVES:
        bound = 1e-5 if name in FINE else 0.01
        wide = images(lambda x: x.astype(coarse).astype(float))
        leaves = (jax.tree.leaves(CALLS[name](a)) for a in (low, wide))
        for x, y in zip(*leaves, strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            np.testing.assert_allclose(x, y, rtol=bound, atol=bound)


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
    given = images(lambda x: np.asarray(x, np.float64)), calls.inputs()
    jax.tree.map(np.testing.assert_array_equal, *map(CALLS[name], given))
