"""Continuous time: the forward SDE, its reverse, and the probability flow.

  (1)  dx = f x dt + g dw                        forward, Eq. 5, Song et al. 2021
  (2)  dx = (f x - g^2 score) dt + g dw          reverse, Eq. 6
  (3)  dx/dt = f x - g^2 score / 2               probability flow, Eq. 13

f and g are functions of time, and follow from the level of any continuous schedule:

  f   = d log alpha / dt
  g^2 = d sigma^2 / dt - 2 f sigma^2 = -sigma^2 d logsnr / dt

The last expression is the one computed: nothing cancels in it. The score is that of
x_t, grad log p_t(x), and a network that tells the noise tells it: -eps / sigma.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax import gaussian
from diffusion_jax.schedule import NoiseLevel, Schedule, is_discrete, num_steps

Field = Callable[[jax.Array, ArrayLike], jax.Array]


class Coefficients(NamedTuple):
    """Those of the forward equation (1), each of the shape of the time."""

    drift: jax.Array
    """f, in 1 / unit of time."""
    diffusion: jax.Array
    """g, in 1 / sqrt(unit of time)."""


def coefficients(schedule: Schedule, t: ArrayLike) -> Coefficients:
    """Returns drift and diffusion of the forward equation (Eq. 5, Song et al. 2021).

    f = d log alpha / dt and g^2 = -sigma^2 d logsnr / dt, by differentiating the
    schedule.

    Args:
      schedule: a continuous schedule, or a discrete one through
        `continuous.interpolate`, for which g^2 is about beta_t.
      t: times at which sigma is above 0, of any shape.

    Raises:
      ValueError: the schedule is discrete, or sigma is 0 at a t that is known. Where
        t is traced, g is nan there.

    >>> from diffusion_jax import continuous
    >>> f, g = coefficients(continuous.vp(), 0.5)  # beta(0.5) = 10.05
    >>> print(f"{f:.3f} {g**2:.3f}")
    -5.025 10.050
    """
    level, slope = _with_slope(schedule, t)
    return Coefficients(slope.log_alpha, level.sigma * jnp.sqrt(-slope.logsnr))


def score(pred: gaussian.Prediction, level: NoiseLevel) -> jax.Array:
    """Returns the gradient of log p_t at x_t, [B, ...]: -eps / sigma.

    Args:
      pred: the prediction at x_t.
      level: noise level at t, sigma above 0, [B] or scalar.

    >>> from diffusion_jax import continuous
    >>> pred = gaussian.Prediction(jnp.zeros([1, 2]), jnp.ones([1, 2]))
    >>> print(score(pred, continuous.ve()(0.5)).round(3))
    [[-1.414 -1.414]]
    """
    return -pred.eps / level.like(pred.eps).sigma


def reverse_drift(denoise: gaussian.Denoiser, schedule: Schedule) -> Field:
    """Returns the drift of the reverse equation, f x - g^2 score (Eq. 6).

    Args:
      denoise: the network's prediction as a function of (x_t, t), t real.
      schedule: its continuous schedule.

    Returns:
      A function of x_t [B, ...] and t, [B] or scalar. With time falling,
      x_{t-h} = x_t - h drift + sqrt(h) g z, where g is that of `coefficients`.

    >>> from diffusion_jax import continuous
    >>> vp = continuous.vp()
    >>> drift = reverse_drift(gaussian.denoiser(lambda x, t: 0 * x, vp, "eps"), vp)
    >>> print(drift(jnp.ones([1, 2]), 0.5).round(3))
    [[-5.025 -5.025]]
    """
    return _field(denoise, schedule, 1.0)


def flow(denoise: gaussian.Denoiser, schedule: Schedule) -> Field:
    """Returns the probability flow's field, f x - g^2 score / 2 (Eq. 13).

    What moves along it has the marginals of the diffusion at every time, without
    drawing noise.

    Args, Returns: as `reverse_drift`.

    >>> from diffusion_jax import continuous
    >>> ve = continuous.ve()
    >>> field = flow(gaussian.denoiser(lambda x, t: x, ve, "eps"), ve)
    >>> print(f"{field(jnp.ones([1, 1]), 0.5)[0, 0]:.3f}")  # d sigma / dt
    6.023
    """
    return _field(denoise, schedule, 0.5)


def prior_logp(x: jax.Array, level: NoiseLevel) -> jax.Array:
    """Returns the log density of the prior at x in nats, [B].

    The prior is N(0, std^2 I) with std = max(1, sigma): what keeps its variance (vp,
    sub_vp and DDPM's) is taken to end in a unit normal, as in
    `losses.prior`, and what explodes in its own noise.

    Args:
      x: the end of the noising, [B, ...].
      level: noise level there, a scalar or [B].

    >>> from diffusion_jax import continuous
    >>> print(f"{prior_logp(jnp.zeros([1, 2]), continuous.vp()(1.0))[0]:.4f}")
    -1.8379
    """
    std = jnp.maximum(1.0, level.like(x).sigma)
    each = jax.scipy.stats.norm.logpdf(x / std) - jnp.log(std)
    return each.sum(axis=tuple(range(1, x.ndim)))


def _field(denoise: gaussian.Denoiser, schedule: Schedule, share: float) -> Field:
    _check_continuous(schedule)

    def field(x: jax.Array, t: ArrayLike) -> jax.Array:
        level, slope = _with_slope(schedule, t)
        level, slope = level.like(x), slope.like(x)
        # g^2 score = sigma (d logsnr / dt) eps: no division by sigma.
        pull = share * level.sigma * slope.logsnr
        return slope.log_alpha * x - pull * denoise(x, jnp.asarray(t)).eps

    return field


def _with_slope(schedule: Schedule, t: ArrayLike) -> tuple[NoiseLevel, NoiseLevel]:
    """Returns the level at t and its derivative in t, field by field."""
    _check_continuous(schedule)
    t = jnp.asarray(t, jnp.result_type(float))
    schedule(t)  # a t that is known is checked here: under jvp it is not
    level, slope = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
    if not isinstance(level.logsnr, jax.core.Tracer) and np.any(level.sigma == 0):
        raise ValueError(
            "t must be a time at which sigma is above 0; got one without noise, "
            f"where g is not defined, in {np.asarray(t)}. Begin at 1e-5, or at 1 "
            "where times count steps."
        )
    return level, slope


def _check_continuous(schedule: Schedule) -> None:
    if is_discrete(schedule):
        raise ValueError(
            f"schedule must be continuous; got one of {num_steps(schedule)} whole "
            "steps. Pass continuous.interpolate(schedule)."
        )
