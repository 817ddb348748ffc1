"""Rows of `test_transforms`: the objectives beside the paper's own."""

from typing import Any

import jax
import jax.numpy as jnp
from transforms import Row, T, network

from diffusion_jax import continuous, gaussian, likelihood, losses, schedule

VE = continuous.ve(sigma_min=0.05, sigma_max=2.0)


def _weighted(x: jax.Array, y: jax.Array, level: schedule.NoiseLevel) -> jax.Array:
    return losses.weighted(gaussian.Prediction(y, y), x, level, jax.nn.sigmoid)


def _hybrid(x0: jax.Array, x: jax.Array, y: jax.Array, log: jax.Array, t: jax.Array):
    # The x0 predicted is fixed in the bound, which finite differences would not know.
    pred = gaussian.Prediction(jnp.full_like(x0, 0.3), y, log)
    made = schedule.linear(T)
    return losses.hybrid(pred, x0, x, x0, made, t, variance="learned")


def _diffusion(x: jax.Array, y: jax.Array, u: jax.Array) -> jax.Array:
    return losses.diffusion(gaussian.Prediction(y, y), x, u)


def _reconstruction(x0: jax.Array, x: jax.Array, u: jax.Array) -> jax.Array:
    level = schedule.NoiseLevel(-0.1 * u, 2 + 8 * u)
    return losses.reconstruction(x0, x0 + 0.1 * x, level)


def _continuous_bound(keys: jax.Array, x0: jax.Array) -> Any:
    denoise = gaussian.denoiser(network, VE, "v")
    return tuple(likelihood.continuous_bound(keys, denoise, VE, x0, draws=3, chunk=2))


ROWS = [
    Row("losses.weighted", _weighted, "x y level"),
    Row("losses.hybrid", _hybrid, "x0 x y log t"),
    Row("losses.diffusion", _diffusion, "x y u"),
    Row("losses.reconstruction", _reconstruction, "x0 x u"),
    Row("likelihood.continuous_bound", _continuous_bound, "keys x0"),
]
