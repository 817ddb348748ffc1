"""Rows of `test_transforms`: how times are drawn, and how losses are weighted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transforms import B, Row, T

from diffusion_jax import continuous, schedule, timesteps, weightings

KEY = jax.random.key(5)
VP, REAL = continuous.vp(), continuous.interpolate(schedule.linear(T))
SHARES = np.arange(1, T + 1) / (T * (T + 1) / 2)


def _spread(make: Callable) -> Callable:
    return lambda index: make(KEY, index % B, B)


def _drawn(index: jax.Array) -> jax.Array:
    return timesteps.uniform(KEY, index)


def _recorded(t: jax.Array, index: jax.Array) -> Any:
    """A history for each example, of its loss and of one that all have."""

    def one(t: jax.Array, index: jax.Array) -> Any:
        past = timesteps.history(T, length=1)
        loss = jnp.stack([index, index + 1]).astype(jnp.float32)
        past = timesteps.record(past, jnp.stack([t, t % T + 1]), loss)
        return *past, timesteps.probabilities(past)

    return jax.vmap(one)(t, index)


def _weight(make: Callable) -> Callable:
    return lambda level: make()(level.logsnr)


ROWS = [
    Row("timesteps.uniform", _drawn, "index"),
    Row("timesteps.low_discrepancy", _spread(timesteps.low_discrepancy), "index"),
    Row("timesteps.antithetic", _spread(timesteps.antithetic), "index"),
    Row("timesteps.steps", lambda index: timesteps.steps(_drawn(index), T), "index"),
    Row("timesteps.times", timesteps.times, "u"),
    Row(
        "timesteps.log_normal",
        lambda index: timesteps.log_normal(_drawn(index), VP),
        "index",
    ),
    Row("timesteps.logit_normal", timesteps.logit_normal, "u"),
    Row("timesteps.importance", lambda u: timesteps.importance(u, SHARES), "u"),
    Row(
        "timesteps.record timesteps.history timesteps.probabilities",
        _recorded,
        "t index",
    ),
    *(
        Row(f"weightings.{name}", _weight(getattr(weightings, name)), "level")
        for name in ("simple", "min_snr", "p2", "sigmoid", "edm", "x0", "v", "velocity")
    ),
    Row("weightings.slope", lambda u: weightings.slope(VP, u), "u", "vp"),
    Row("weightings.slope", lambda u: weightings.slope(REAL, T * u), "u", "steps"),
    Row(
        "weightings.slope", lambda t: weightings.slope(schedule.linear(T), t), "t", "t"
    ),
]
