"""Rows of `test_transforms`: the Gaussian algebra, losses, guidance, fields."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transforms import LINEAR, PAIR, Row, T, denoiser, each, network

from diffusion_jax import (
    analytic,
    continuous,
    gaussian,
    guidance,
    losses,
    prediction,
    schedule,
    sde,
)

VP, VE = continuous.vp(), continuous.ve()
DENOISERS = {
    **{kind: denoiser(kind) for kind in ("eps", "score", "edm", "velocity")},
    "clip": denoiser("x0", clip=True),
    "learned": denoiser("mean", variance="learned"),
    "range": denoiser(variance="range"),
    "attach": analytic.attach(denoiser(), np.linspace(0, 1, T + 1)),
}


def _predict(kind: str, y: jax.Array, x: jax.Array, *levels: Any) -> Any:
    return {
        "predict": gaussian.predict(kind, y, x, *levels),
        "target": gaussian.target(kind, y, x, *levels),
    }


def _known(x0: jax.Array, eps: jax.Array, log: jax.Array) -> gaussian.Prediction:
    return gaussian.Prediction(x0, eps, log, jax.nn.sigmoid(log), jnp.exp(log))


def _variances(kind: str, keys, x0, x, log, *levels) -> Any:
    pred, small = _known(x0, x0, log), jnp.full_like(log, -4.0)
    of = prediction.log_variance(kind, pred, *levels, log_small=small)
    return of, gaussian.p_sample(keys, pred, x, *levels, variance=kind)


def _algebra(keys, x0, x, level, prev_level) -> Any:
    return {
        "q_sample": gaussian.q_sample(x0, x, level),
        "q_step": gaussian.q_step(keys, x, prev_level, level, noise=1.1),
        "q_posterior": gaussian.q_posterior(x0, x, level, prev_level),
        "small": gaussian.reverse_variance("small", level, prev_level),
        "large": gaussian.reverse_variance("large", level, prev_level),
        "normal": gaussian.normal(keys, (len(keys), 3)),
    }


def _vlb(variance: str, x0, x, y, log, t) -> Any:
    pred = _known(x0 + 0.05 * y, x0, log)
    return losses.vlb(pred, x0, x, LINEAR, t, variance=variance)


def _other_losses(x0, x, y, log, t, u, level) -> Any:
    # The x0 predicted is fixed in the bound, which finite differences would not know.
    fixed, both = jnp.full_like(x0, 0.3), gaussian.Prediction(y, y)
    hybrid, wide = (
        gaussian.Prediction(fixed, y, log),
        schedule.NoiseLevel(-0.1 * u, 2 + 8 * u),
    )
    return {
        "hybrid": losses.hybrid(hybrid, x0, x, x0, LINEAR, t, variance="learned"),
        "weighted": losses.weighted(both, x, level, jax.nn.sigmoid),
        "diffusion": losses.diffusion(both, x, u),
        "reconstruction": losses.reconstruction(x0, x0 + 0.1 * x, wide),
        "prior": losses.prior(x0, level),
        "normal_kl": losses.normal_kl(x, log, y, log),
        "tanh": losses.decoder(x0, y, log),
        "exact": losses.decoder(x0, y, log, exact=True),
    }


def _simple(space: str, x0, x, y, *levels) -> jax.Array:
    return losses.simple(gaussian.Prediction(y, x), x0, x, *levels, space=space)


def _fields(x, y, u, level) -> Any:
    denoise = denoiser(made=VP)
    return {
        "coefficients": sde.coefficients(VP, u),
        "score": sde.score(gaussian.Prediction(y, y), level),
        "reverse_drift": sde.reverse_drift(denoise, VP)(x, u),
        "flow": sde.flow(denoise, VP)(x, u),
        "prior_logp": sde.prior_logp(x, level),
        "edm of ve": denoiser("edm", VE)(x, u),
    }


def _labelled(x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
    return network(x, t) * jnp.cos(label)[:, None, None, None]


def _guided(x, t, index, u) -> Any:
    def free(active: Any) -> Any:
        apply = guidance.classifier_free(
            _labelled, index, 7, scale=0.1 * index + 2, active=active
        )
        return gaussian.denoiser(apply, LINEAR, "v")(x, t)

    def log_prob(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.cos(x_t * network(x_t, t)).sum(axis=(1, 2, 3))

    def by_classifier(clip: bool) -> Any:
        plain, options = denoiser(), {"scale": u, "clip": clip}
        return guidance.classifier(plain, log_prob, LINEAR, **options)(x, t)

    interval = guidance.within(LINEAR, 0.1, 0.3)
    return free(None), free(interval), by_classifier(False), by_classifier(True)


def _x0_variance(keys: jax.Array, x0: jax.Array, log: jax.Array) -> Any:
    """Of each example by itself, since a table has no batch."""
    made = schedule.linear(2)
    table = jax.vmap(
        lambda key, one: analytic.x0_variance(
            key[None], denoiser(made=made), made, one[None]
        )
    )(keys, x0)
    rows = jnp.exp(log).reshape(len(log), 4) * 0.01
    return table, jax.vmap(lambda row: analytic.bounded(row, schedule.linear(3)))(rows)


ROWS = [
    Row(
        "gaussian.q_sample gaussian.q_posterior gaussian.reverse_variance "
        "gaussian.normal gaussian.q_step",
        _algebra,
        f"keys x0 x {PAIR}",
    ),
    Row(
        "gaussian.predict gaussian.target",
        each(_predict, gaussian.KINDS),
        f"x0 x {PAIR}",
    ),
    Row(
        "gaussian.p_sample prediction.log_variance",
        each(_variances, gaussian.VARIANCES),
        f"keys x0 x log {PAIR}",
    ),
    Row(
        "gaussian.denoiser analytic.attach",
        lambda x, t: {name: denoise(x, t) for name, denoise in DENOISERS.items()},
        "x t",
    ),
    Row("losses.simple", each(_simple, gaussian.KINDS), f"x0 x y {PAIR}"),
    Row("losses.vlb", each(_vlb, gaussian.VARIANCES), "x0 x y log t"),
    Row(
        "losses.hybrid losses.weighted losses.diffusion losses.reconstruction "
        "losses.prior losses.normal_kl losses.decoder",
        _other_losses,
        "x0 x y log t u level",
    ),
    Row(
        "sde.coefficients sde.score sde.reverse_drift sde.flow sde.prior_logp",
        _fields,
        "x y u level",
    ),
    Row(
        "guidance.classifier_free guidance.within guidance.classifier",
        _guided,
        "x t index u",
    ),
    Row("analytic.x0_variance analytic.bounded", _x0_variance, "keys x0 log"),
]
