"""Rows of `test_transforms`: times drawn and spaced, and how losses are weighted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rows_schedules import REAL
from transforms import LINEAR, B, Row, T, each

from diffusion_jax import continuous, grids, timesteps, weightings

KEY, VP = jax.random.key(5), continuous.vp()
SHARES = np.arange(1, T + 1) / (T * (T + 1) / 2)
WEIGHTINGS = ("simple", "min_snr", "p2", "sigmoid", "edm", "x0", "v", "velocity")


def _drawn(index: jax.Array) -> Any:
    u = timesteps.uniform(KEY, index)
    return {
        "uniform": u,
        "low_discrepancy": timesteps.low_discrepancy(KEY, index % B, B),
        "antithetic": timesteps.antithetic(KEY, index % B, B),
        "steps": timesteps.steps(u, T),
        "log_normal": timesteps.log_normal(u, VP),
    }


def _of_numbers(u: jax.Array) -> Any:
    return {
        "times": timesteps.times(u),
        "logit_normal": timesteps.logit_normal(u),
        "importance": timesteps.importance(u, SHARES),
        "slope, vp": weightings.slope(VP, u),
        "slope, steps": weightings.slope(REAL, T * u),
        "quadratic": u * grids.quadratic(LINEAR, 4)[0],
        "logsnr": u * grids.logsnr(REAL, 4)[2],
        "karras": u * grids.karras(REAL, 4)[2],
    }


def _recorded(t: jax.Array, index: jax.Array) -> Any:
    """A history for each example, of its loss and of one that all have."""

    def one(t: jax.Array, index: jax.Array) -> Any:
        past = timesteps.history(T, length=1)
        loss = jnp.stack([index, index + 1]).astype(jnp.float32)
        past = timesteps.record(past, jnp.stack([t, t % T + 1]), loss)
        return *past, timesteps.probabilities(past)

    return jax.vmap(one)(t, index), weightings.slope(LINEAR, t)


ROWS = [
    Row(
        "timesteps.uniform timesteps.low_discrepancy timesteps.antithetic "
        "timesteps.steps timesteps.log_normal",
        _drawn,
        "index",
    ),
    Row(
        "timesteps.times timesteps.logit_normal timesteps.importance weightings.slope "
        "grids.quadratic grids.logsnr grids.karras",
        _of_numbers,
        "u",
    ),
    Row(
        "timesteps.record timesteps.history timesteps.probabilities",
        _recorded,
        "t index",
    ),
    Row(
        " ".join(f"weightings.{name}" for name in WEIGHTINGS),
        each(lambda name, level: getattr(weightings, name)()(level.logsnr), WEIGHTINGS),
        "level",
    ),
]
