"""Rows of `test_transforms`: kinds of prediction, reverse variances, Analytic-DPM."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transforms import Row, T, network, wide_network

from diffusion_jax import analytic, continuous, gaussian, prediction, schedule

PAIR = "level prev_level"


def _log_variance(kind: str) -> Callable:
    def fn(x, log, level, prev_level):
        said = jax.nn.sigmoid(log)
        pred = gaussian.Prediction(x, x, log, said, jnp.exp(log))
        small = jnp.full_like(log, -4.0)
        return prediction.log_variance(kind, pred, level, prev_level, log_small=small)

    return fn


def _denoise(kind: str, made: Any, **options: Any) -> Callable:
    net = wide_network if "variance" in options else network

    def fn(x: jax.Array, t: jax.Array) -> Any:
        pred = gaussian.denoiser(net, made, kind, **options)(x, t)
        return tuple(field for field in pred if field is not None)

    return fn


def _x0_variance(keys: jax.Array, x0: jax.Array) -> jax.Array:
    """Of each example by itself, since the table has no batch."""
    made = schedule.linear(2)
    denoise = gaussian.denoiser(network, made, "v")
    return jax.vmap(
        lambda key, one: analytic.x0_variance(key[None], denoise, made, one[None])
    )(keys, x0)


def _bounded(log: jax.Array) -> jax.Array:
    made = schedule.linear(3)
    rows = jnp.exp(log).reshape(len(log), 4) * 0.01
    return jax.vmap(lambda row: analytic.bounded(row, made))(rows)


def _attach(x: jax.Array, t: jax.Array) -> Any:
    denoise = gaussian.denoiser(network, schedule.linear(T), "v")
    return tuple(
        field
        for field in analytic.attach(denoise, np.linspace(0, 1, T + 1))(x, t)
        if field is not None
    )


LINEAR = schedule.linear(T)
ROWS = [
    *(
        Row("prediction.log_variance", _log_variance(kind), f"x log {PAIR}", kind)
        for kind in gaussian.VARIANCES
    ),
    *(
        Row("gaussian.denoiser", _denoise(kind, LINEAR), "x t", kind)
        for kind in ("score", "edm", "velocity")
    ),
    Row("gaussian.denoiser", _denoise("edm", continuous.ve()), "x u", "edm-ve"),
    Row("gaussian.denoiser", _denoise("v", LINEAR, variance="range"), "x t", "range"),
    Row("analytic.x0_variance", _x0_variance, "keys x0"),
    Row("analytic.bounded", _bounded, "log"),
    Row("analytic.attach", _attach, "x t"),
]
