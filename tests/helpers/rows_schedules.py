"""Rows of `test_transforms`: the schedules of other papers, and the learned one."""

from typing import Any

import jax
import jax.numpy as jnp
from transforms import Row, T

from diffusion_jax import continuous, learned, schedule

with jax.enable_x64(True):
    PARAMS = learned.init(jax.random.key(0), width=8)
MOVED = continuous.shifted(continuous.interpolate(schedule.linear(T)), -1.0)


def _init(keys: jax.Array) -> Any:
    return jax.vmap(lambda key: learned.init(key, width=8))(keys).interior.offset


def _losses(u: jax.Array, x0: jax.Array, x: jax.Array) -> Any:
    def each(level: schedule.NoiseLevel, slope: jax.Array) -> Any:
        level = level.like(x0)
        rest = jnp.sin(level.alpha * x0 + level.sigma * x) - x
        return -slope * (rest**2).mean((1, 2, 3)), level.alpha[:, 0, 0, 0]

    return learned.minimise_variance(PARAMS, u, each, has_aux=True)


ROWS = [
    Row("schedule.sigmoid", lambda t: tuple(schedule.sigmoid(T)(t)), "t"),
    Row("schedule.preserving", lambda u: tuple(schedule.preserving(6 * u - 3)), "u"),
    Row("schedule.real_time", schedule.real_time, "u"),
    Row("schedule.real_data", schedule.real_data, "x"),
    Row("continuous.cosine", lambda u: tuple(continuous.cosine()(u)), "u"),
    Row("continuous.flow", lambda u: tuple(continuous.flow()(u)), "u"),
    Row("continuous.shifted", lambda u: tuple(MOVED(T * u)), "u"),
    Row("learned.init", _init, "keys"),
    Row("learned.schedule", lambda u: tuple(learned.schedule(PARAMS)(u)), "u"),
    Row("learned.minimise_variance", _losses, "u x0 x"),
]
