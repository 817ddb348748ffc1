"""A network's prediction at x_t, and the variance of the reverse step from there.

The variance of p(x_s | x_t), with D = logsnr_t - logsnr_s and c0 = alpha_s (1 - e^D):

  small     sigma_s^2 (1 - e^D), the posterior's          Sec. 3.2, Ho et al. 2020
  large     sigma_t^2 (1 - e^D) = beta_t                  Sec. 3.2
  learned   the network's                                 Table 2
  range     large^f small^(1 - f)                         Eq. 15, Nichol, Dhariwal 2021
  analytic  small + c0^2 Var[x0 | x_t]                    Theorem 1, Bao et al. 2022

The last is the best one for a given mean: to the posterior's own variance it adds that
of its mean c0 x0 + ct x_t, of which x_t leaves x0 open. Bao et al. write it with
Gamma = E||score||^2 / d, lambda^2 = small, b_t = sigma_t^2 and a = alpha_t / alpha_s:

  lambda^2 + (sqrt(b_t) / a - sqrt(b_s - lambda^2))^2 (1 - b_t Gamma)

b_s - lambda^2 is sigma_s^2 e^D and sigma_s e^(D / 2) = a sigma_s^2 / sigma_t, so that
the square is (sigma_t^2 - a^2 sigma_s^2)^2 / (a sigma_t)^2 = (c0 sigma_t / alpha_t)^2,
and (sigma_t / alpha_t)^2 (1 - b_t Gamma) is Var[x0 | x_t] / d: see `analytic`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.errors import raise_unknown
from diffusion_jax.schedule import NoiseLevel

VARIANCES = ("small", "large", "learned", "range", "analytic")


class Prediction(NamedTuple):
    """A network's prediction at x_t, as x0 and as eps.

    n parameterisations need n readers (`gaussian.predict`), not n^2 converters.
    """

    x0: jax.Array
    """The clean data, [B, ...]."""
    eps: jax.Array
    """The noise, [B, ...]."""
    log_variance: jax.Array | None = None
    """Log of the learned reverse variance, [B, ...], where there is one."""
    fraction: jax.Array | None = None
    """Where that log is learned between small (0) and large (1), [B, ...], without
    bounds: f of "range"."""
    x0_variance: jax.Array | None = None
    """Var[x0 | x_t] where it is known, [B, ...] or [B, 1, ...]: see `analytic`."""


Denoiser = Callable[[jax.Array, jax.Array], Prediction]
JumpDenoiser = Callable[[jax.Array, jax.Array, jax.Array], Prediction]


def reverse_variance(kind: str, level: NoiseLevel, prev_level: NoiseLevel) -> jax.Array:
    """Returns a fixed variance for p(x_s | x_t), of the shape of the levels.

    "small" is the variance of the posterior, Eq. 7 of Ho et al. 2020, right for data
    that are one point; "large" is beta_t, right for standard normal data (Sec. 3.2).
    The paper's CIFAR-10 samples use large, its 256x256 samples small.

    >>> from diffusion_jax import schedule
    >>> lin = schedule.linear()
    >>> print(reverse_variance("large", lin(1000), lin(999)).round(4))
    0.02
    """
    if kind not in ("small", "large"):
        raise_unknown("fixed variance", kind, ("small", "large"))
    sigma = prev_level.sigma if kind == "small" else level.sigma
    return sigma**2 * -jnp.expm1(level.logsnr - prev_level.logsnr)


def log_variance(
    kind: str,
    pred: Prediction,
    level: NoiseLevel,
    prev_level: NoiseLevel,
    *,
    log_small: jax.Array | None = None,
) -> jax.Array:
    """Returns the log of the variance of p(x_s | x_t), for any jump t -> s.

    By the equations above; on coarser grids all are those of the jump. "small" and
    "large" are the logs of `reverse_variance`, "learned" is the network's own.

    Args:
      kind: one of VARIANCES.
      pred: the prediction at x_t, with the field that the kind reads: log_variance
        ("learned"), fraction ("range") or x0_variance ("analytic").
      level: noise level at t, [B] or scalar.
      prev_level: noise level at s < t, [B] or scalar.
      log_small: what stands for the log of small at s = 0, where it is -inf; it
        broadcasts against x_t. As in the official codes the fixed "large" takes it
        there too, while the large end of "range" stays beta_1. When not given,
        "small" and "range" are -inf.

    Returns:
      An array that broadcasts against x_t.

    Raises:
      ValueError: an unknown kind, or a prediction without what it needs.

    >>> from diffusion_jax import schedule
    >>> lin, x = schedule.linear(), jnp.zeros([1, 1])
    >>> pred = Prediction(x, x, fraction=x + 0.5, x0_variance=x + 0.1)
    >>> for kind in ("range", "analytic"):
    ...     print(f"{jnp.exp(log_variance(kind, pred, lin(900), lin(600)))[0, 0]:.3f}")
    0.977
    0.967
    """
    if kind not in VARIANCES:
        raise_unknown("variance", kind, VARIANCES)
    if kind == "learned":
        return _field_of(pred, kind, "log_variance")
    level, prev_level = level.like(pred.x0), prev_level.like(pred.x0)
    if kind == "analytic":
        gone = -jnp.expm1(level.logsnr - prev_level.logsnr)
        c0 = prev_level.alpha * gone
        known = _field_of(pred, kind, "x0_variance")
        total = prev_level.sigma**2 * gone + c0**2 * known
        # Both may be 0 at s = 0, where log has no gradient.
        some = total > 0
        return jnp.where(some, jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    gap = jnp.log(-jnp.expm1(level.logsnr - prev_level.logsnr))
    large = 2 * level.log_alpha - level.logsnr + gap
    small = 2 * prev_level.log_alpha - prev_level.logsnr + gap
    last = jnp.isposinf(prev_level.logsnr)
    if kind == "range":
        share = _field_of(pred, kind, "fraction")
        # Anything finite for small will do at s = 0: -inf has no gradient.
        end = large if log_small is None else log_small
        mixed = share * large + (1 - share) * jnp.where(last, end, small)
        return jnp.where(last, -jnp.inf, mixed) if log_small is None else mixed
    chosen = small if kind == "small" else large
    return chosen if log_small is None else jnp.where(last, log_small, chosen)


def _field_of(pred: Prediction, kind: str, name: str) -> jax.Array:
    value = getattr(pred, name)
    if value is None:
        use = f"Build the denoiser with variance={kind!r}."
        if kind == "analytic":
            use = "Use analytic.attach(denoise, table)."
        raise ValueError(
            f"variance={kind!r} must come with a prediction that has its {name}; got "
            f"none. {use}"
        )
    return value
