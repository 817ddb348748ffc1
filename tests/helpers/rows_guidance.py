"""Rows of `test_transforms`: guidance."""

from typing import Any

import jax
import jax.numpy as jnp
from transforms import Row, T, network

from diffusion_jax import gaussian, guidance, schedule

LIN = schedule.linear(T)


def _labelled(x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
    return network(x, t) * jnp.cos(label)[:, None, None, None]


def _free(active: Any = None) -> Any:
    def fn(x: jax.Array, t: jax.Array, index: jax.Array) -> Any:
        apply = guidance.classifier_free(
            _labelled, index, 7, scale=0.1 * index + 2, active=active
        )
        pred = gaussian.denoiser(apply, LIN, "v")(x, t)
        return pred.x0, pred.eps

    return fn


def _classifier(clip: bool) -> Any:
    def fn(x: jax.Array, t: jax.Array, u: jax.Array) -> Any:
        def log_prob(x_t: jax.Array, t: jax.Array) -> jax.Array:
            return jnp.cos(x_t * network(x_t, t)).sum(axis=(1, 2, 3))

        plain = gaussian.denoiser(network, LIN, "v")
        pred = guidance.classifier(plain, log_prob, LIN, scale=u, clip=clip)(x, t)
        return pred.x0, pred.eps

    return fn


ROWS = [
    Row("guidance.classifier_free", _free(), "x t index"),
    Row(
        "guidance.classifier_free guidance.within",
        _free(guidance.within(LIN, 0.1, 0.3)),
        "x t index",
        "within",
    ),
    Row("guidance.classifier", _classifier(False), "x t u"),
    Row("guidance.classifier", _classifier(True), "x t u", "clip"),
]
