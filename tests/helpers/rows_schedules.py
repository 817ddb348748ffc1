"""Rows of `test_transforms`: schedules, discrete, continuous and learned."""

from typing import Any

import jax
import jax.numpy as jnp
from transforms import LINEAR, Row, T

from diffusion_jax import continuous, learned, schedule

# Not functions of arrays: they raise and do no more.
NOT_OF_ARRAYS = {
    "errors.counted",
    "errors.first_of",
    "errors.needs",
    "errors.raise_unknown",
    "losses.check_values",
    "schedule.check_num_steps",
}

with jax.enable_x64(True):
    PARAMS = learned.init(jax.random.key(0), width=8)
REAL = continuous.interpolate(LINEAR)
MOVED = continuous.shifted(REAL, -1.0)
DISCRETE = {
    **{
        f"schedule.{name}": getattr(schedule, name)(T)
        for name in ("linear", "quad", "const", "jsd", "warmup", "cosine", "sigmoid")
    },
    "schedule.from_betas": schedule.from_betas([0.1] * T),
    "schedule.from_tables schedule.tables": schedule.from_tables(
        *schedule.tables(LINEAR)
    ),
    "continuous.discretize": continuous.discretize(continuous.vp(), T),
}
CONTINUOUS = {
    **{
        f"continuous.{name}": getattr(continuous, name)()
        for name in ("vp", "sub_vp", "ve", "cosine", "flow")
    },
    "learned.schedule": learned.schedule(PARAMS),
}


def _of_real_time(u: jax.Array) -> Any:
    return {
        **{name: made(u) for name, made in CONTINUOUS.items()},
        "interpolate": REAL(T * u),
        "shifted": MOVED(T * u),
        "time_of": continuous.time_of(REAL, 6 * u - 3),
        "preserving": schedule.preserving(6 * u - 3),
        "real_time": schedule.real_time(u),
        "real_data": schedule.real_data(u),
    }


def _facts(u: jax.Array) -> Any:
    """What is known of a schedule beside its levels."""
    return [
        u * fact
        for fact in (
            continuous.last_time(REAL),
            continuous.counts_steps(REAL),
            schedule.is_discrete(REAL),
            schedule.timed(REAL).last,
            schedule.num_steps(LINEAR),
        )
    ]


def _init(keys: jax.Array) -> Any:
    return jax.vmap(lambda key: learned.init(key, width=8))(keys).interior.offset


def _losses(u: jax.Array, x0: jax.Array, x: jax.Array) -> Any:
    def of(level: schedule.NoiseLevel, slope: jax.Array) -> Any:
        level = level.like(x0)
        rest = jnp.sin(level.alpha * x0 + level.sigma * x) - x
        return -slope * (rest**2).mean((1, 2, 3)), level.alpha[:, 0, 0, 0]

    return learned.minimise_variance(PARAMS, u, of, has_aux=True)


ROWS = [
    Row(
        " ".join(DISCRETE), lambda t: {k: made(t) for k, made in DISCRETE.items()}, "t"
    ),
    Row(
        f"{' '.join(CONTINUOUS)} continuous.interpolate continuous.shifted "
        "continuous.time_of schedule.preserving schedule.real_time schedule.real_data",
        _of_real_time,
        "u",
    ),
    Row(
        "continuous.last_time continuous.counts_steps schedule.is_discrete "
        "schedule.timed schedule.num_steps",
        _facts,
        "u",
    ),
    Row("learned.init", _init, "keys"),
    Row("learned.minimise_variance", _losses, "u x0 x"),
]
