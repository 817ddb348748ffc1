"""Losses of networks that draw in one to four steps: distilled, consistent, mean flow.

All are told a path through x_t by its two ends, a `Prediction`: either data and the
noise they were mixed with, or what a teacher sees at x_t, which is the tangent of its
probability flow. With angle = atan(sigma / alpha), so that x_t / sqrt(alpha^2 +
sigma^2) = cos x0 + sin eps, a prediction is f = x0 and F = cos eps - sin x0:

  (1)  max(1, SNR) ||x0 - x0_hat||^2                Eq. 9, Salimans and Ho 2022
  (2)  g = cos df/dangle                            Eq. 6, Lu and Song 2024
  (3)  ||F - sg(F) - g / (|g| + c)||^2              Eq. 8 without its weighting network
  (4)  g = cos (f_t - f_s) / (angle_t - angle_s)    the limit in Geng et al. 2024 (ECT)
  (5)  ||u - sg(v - (t - s) du/dt)||^2              Eq. 11, Geng et al. 2025 (MeanFlow)

where sg stops the gradient. With data of standard deviation S along each axis, the flow
scales x by the root of its variance, and so a perfect network gives

  consistency   f = x_t S / sqrt(alpha^2 S^2 + sigma^2)
  mean flow     u = (x_t - x_s) / (t - s),  x_s = x_t sqrt(variance_s / variance_t)
  progressive   the x0 from which one jump of DDIM ends where two of the teacher do
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax import gaussian
from diffusion_jax.prediction import Denoiser, JumpDenoiser, Prediction
from diffusion_jax.schedule import NoiseLevel, Schedule, widened


def two_steps(
    denoise: Denoiser,
    x_t: jax.Array,
    schedule: Schedule,
    t: jax.Array,
    middle: jax.Array,
    s: jax.Array,
) -> jax.Array:
    """Returns the x0 whose one DDIM jump t -> s ends where two jumps do, [B, ...].

    (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t) (App. G,
    Salimans and Ho 2022): what the student learns to predict, without a gradient.

    Args:
      denoise: the teacher.
      x_t: noisy data at t, [B, ...].
      schedule: of the teacher.
      t, middle, s: falling times of the two jumps, [B].

    >>> from diffusion_jax import schedule
    >>> lin, x = schedule.linear(), jnp.ones([1, 2])
    >>> denoise = gaussian.denoiser(lambda x, t: 0 * x, lin, "x0")
    >>> x0 = two_steps(denoise, x, lin, *jnp.array([[900], [600], [300]]))
    >>> bool((abs(x0) < 1e-6).all())
    True
    """
    x_s, now = x_t, t
    for then in (middle, s):
        pred = denoise(x_s, now)
        x_s, now = gaussian.q_sample(pred.x0, pred.eps, schedule(then)), then
    level, prev = schedule(t).like(x_t), schedule(s).like(x_t)
    # sigma_s / sigma_t is (alpha_s / alpha_t) e^half.
    half = 0.5 * (level.logsnr - prev.logsnr)
    kept = jnp.exp(prev.log_alpha - level.log_alpha + half)
    x0 = (x_s - kept * x_t) / (prev.alpha * -jnp.expm1(half))
    return jax.lax.stop_gradient(x0)


def progressive(pred: Prediction, x0: jax.Array, level: NoiseLevel) -> jax.Array:
    """Returns the loss of progressive distillation, equation (1), [B].

    Args:
      pred: the student's prediction at x_t.
      x0: of `two_steps`, [B, ...].
      level: noise level at t, [B].

    >>> from diffusion_jax import schedule
    >>> level, zero = schedule.NoiseLevel(0.0, jnp.ones(1)), jnp.zeros([1, 2])
    >>> print(progressive(Prediction(zero + 1, zero), zero, level))
    [2.7182817]
    """
    return jnp.exp(jnp.maximum(level.logsnr, 0)) * _mean(jnp.square(pred.x0 - x0))


def tangent(
    denoise: Denoiser,
    ends: Prediction,
    schedule: Schedule,
    t: jax.Array,
    *,
    warmup: ArrayLike = 1.0,
) -> jax.Array:
    """Returns how the end of a network's path moves along the path, (2), [B, ...].

    g = cos^2 (v - F) - warmup cos (sin x + dF/dangle), where x = cos x0 + sin eps and
    v = cos eps - sin x0 are of the path (Eq. 6, Lu and Song 2024); 0 where the network
    is consistent. It has no gradient.

    Args:
      denoise: the network; at noise 0 its x0 must be x.
      ends: of the path through x_t, [B, ...].
      schedule: continuous, or discrete through `continuous.interpolate`.
      t: real times, [B].
      warmup: share of the second term, rising from 0 to 1 early in training: its
        derivative is what makes training unstable (Sec. 4.1).

    >>> from diffusion_jax import continuous
    >>> cosine, one = continuous.cosine(), jnp.ones([1, 2])
    >>> denoise = gaussian.denoiser(lambda x, t: 0 * x, cosine, "v")
    >>> g = tangent(denoise, Prediction(0 * one, one), cosine, jnp.array([0.5]))
    >>> bool((abs(g) < 1e-5).all())  # cos^3 - cos sin^2 = 0
    True
    """

    def turned(t: jax.Array) -> jax.Array:
        level = schedule(t)
        pred = denoise(gaussian.q_sample(ends.x0, ends.eps, level), t)
        return across(pred, level)

    level, slope = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
    now, change = derivative(turned, t)
    cos, sin = (widened(part, ends.x0) for part in _turn(level))
    # dangle/dt is -cos sin dlogsnr/dt / 2: written so, nothing is divided by 0.
    rate = widened(-2 / slope.logsnr, ends.x0)
    x = cos * ends.x0 + sin * ends.eps
    fixed = cos**2 * (across(ends, level) - now)
    moving = cos * sin * x + rate * change
    return jax.lax.stop_gradient(fixed - warmup * moving)


def difference(
    denoise: Denoiser, ends: Prediction, schedule: Schedule, t: jax.Array, s: jax.Array
) -> jax.Array:
    """Returns the tangent as a difference of the ends seen from t and s, (4), [B, ...].

    Its error falls with t - s: "easy consistency tuning" begins with large steps and
    ends with small ones (Sec. 3.2, Geng et al. 2024). It has no gradient.

    Args:
      denoise, ends, schedule, t: as in `tangent`.
      s: real times before t, [B].

    >>> from diffusion_jax import continuous
    >>> cosine, one, t = continuous.cosine(), jnp.ones([1, 2]), jnp.array([0.5])
    >>> denoise = gaussian.denoiser(lambda x, t: 0 * x, cosine, "v")
    >>> ends = Prediction(0 * one, one)
    >>> print(abs(difference(denoise, ends, cosine, t, t - 0.01)) < 0.02)
    [[ True  True]]
    """
    level, prev = schedule(t), schedule(s)
    late, early = (
        denoise(gaussian.q_sample(ends.x0, ends.eps, at), time).x0
        for at, time in ((level, t), (prev, s))
    )
    angle, before = (jnp.arctan(jnp.exp(-0.5 * at.logsnr)) for at in (level, prev))
    rate = widened(_turn(level)[0] / (angle - before), ends.x0)
    return jax.lax.stop_gradient(rate * (late - early))


def consistency(
    pred: Prediction, tangent: jax.Array, level: NoiseLevel, *, floor: float = 0.1
) -> jax.Array:
    """Returns the loss of consistency models, equation (3), [B].

    The tangent is normalised, g / (|g| + c) with |g| the root of its mean square, so
    that no time outweighs the others (Sec. 4.1, Lu and Song 2024).

    Args:
      pred: the network's prediction at x_t.
      tangent: of `tangent` or `difference` there, [B, ...].
      level: noise level at t, [B].
      floor: c, in the unit of the data: 0.1 in the paper.

    >>> from diffusion_jax import schedule
    >>> pred = Prediction(jnp.ones([1, 2]), jnp.ones([1, 2]))
    >>> level = schedule.NoiseLevel(jnp.zeros(1), jnp.zeros(1))
    >>> print(consistency(pred, jnp.full([1, 2], 0.1), level))
    [0.25]
    """
    size = jnp.sqrt(_mean(jnp.square(tangent)))
    step = jax.lax.stop_gradient(tangent / widened(size + floor, tangent))
    turned = across(pred, level)
    return _mean(jnp.square(turned - jax.lax.stop_gradient(turned) - step))


def mean_flow(
    denoise: JumpDenoiser,
    ends: Prediction,
    schedule: Schedule,
    t: jax.Array,
    s: jax.Array,
    *,
    floor: float = 1e-2,
) -> jax.Array:
    """Returns the loss of MeanFlow, equation (5), [B].

    u(x_t, t, s) is the mean of the velocity over the path from t to s: of a straight
    path, d alpha/dt x0 + d sigma/dt eps of the prediction. Each example's error is
    divided by itself plus a floor, without a gradient (Eq. 22, Geng et al. 2025).

    Args:
      denoise: the network: x0 and eps as the straight line from x_t to x_s has them.
      ends: of the path through x_t, [B, ...].
      schedule: with straight paths: `continuous.flow`.
      t: real times, [B].
      s: real times, at most t, [B].
      floor: of the division.

    >>> from diffusion_jax import continuous
    >>> flow, one, t = continuous.flow(), jnp.ones([1, 2]), jnp.array([0.5])
    >>> ends = Prediction(0 * one, one)
    >>> print(mean_flow(lambda x, t, s: ends, ends, flow, t, t - 0.2))
    [0.]
    """
    level, slope = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
    alpha = level.alpha * slope.log_alpha
    sigma = level.sigma * (slope.log_alpha - 0.5 * slope.logsnr)

    def velocity(pred: Prediction) -> jax.Array:
        return widened(alpha, pred.x0) * pred.x0 + widened(sigma, pred.x0) * pred.eps

    def mean(t: jax.Array) -> jax.Array:
        x_t = gaussian.q_sample(ends.x0, ends.eps, schedule(t))
        return velocity(denoise(x_t, t, s))

    change = derivative(mean, t)[1]
    aim = velocity(ends) - widened(t - s, change) * change
    square = _mean(jnp.square(mean(t) - jax.lax.stop_gradient(aim)))
    return square / (jax.lax.stop_gradient(square) + floor)


def across(pred: Prediction, level: NoiseLevel) -> jax.Array:
    """Returns F = cos eps - sin x0 of a prediction, [B, ...]; its "v" at unit variance.

    >>> from diffusion_jax import schedule
    >>> pred = Prediction(jnp.ones([1, 2]), jnp.zeros([1, 2]))
    >>> print(across(pred, schedule.NoiseLevel(jnp.zeros(1), jnp.zeros(1))).round(4))
    [[-0.7071 -0.7071]]
    """
    cos, sin = (widened(part, pred.x0) for part in _turn(level))
    return cos * pred.eps - sin * pred.x0


def derivative(
    function: Callable[[jax.Array], jax.Array], t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns a function's value at t and its derivative, each [B, ...].

    `jax.jvp` of networks that have only a backward derivative: the derivative is linear
    in what is pulled back, and the pullback of that is the push forward.

    Args:
      function: of t, each example by its own.
      t: [B].

    >>> print(derivative(lambda t: t[:, None] ** 2, jnp.array([3.0])))
    (Array([[9.]], dtype=float32), Array([[6.]], dtype=float32))
    """
    value, pull = jax.vjp(function, t)
    _, push = jax.vjp(lambda cotangent: pull(cotangent)[0], jnp.zeros_like(value))
    return value, push(jnp.ones_like(t))[0]


def _turn(level: NoiseLevel) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of atan(sigma / alpha)."""
    half = 0.5 * jax.nn.log_sigmoid(level.logsnr)
    return jnp.exp(half), jnp.exp(half - 0.5 * level.logsnr)


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))
