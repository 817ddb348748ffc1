"""The Gaussian algebra of diffusion: noising, its posterior, and one reverse step.

Notation, fixed once (DDPM's own alpha_t = 1 - beta_t never gets a name):

  alpha, sigma   x_t = alpha x0 + sigma eps; in DDPM sqrt(abar_t), sqrt(1 - abar_t)
  logsnr         2 (log alpha - log sigma)
  t, s           times with s < t: a reverse step goes from t to s (DDPM: s = t - 1)

The equations that the code below refers to, with D = logsnr_t - logsnr_s <= 0:

  (1)  x_t = alpha_t x0 + sigma_t eps                     Eq. 4, Ho et al. 2020
  (2)  q(x_s | x_t, x0) = N(c0 x0 + ct x_t, var)          Eqs. 6, 7
         c0 = alpha_s (1 - e^D)
         ct = (alpha_s / alpha_t) e^D
         var = sigma_s^2 (1 - e^D)
  (3)  x0 = (x_t - sigma_t eps) / alpha_t                 Eq. 15
  (4)  v  = alpha_t eps - sigma_t x0                      Sec. 4, Salimans and Ho 2022
  (5)  var_large = sigma_t^2 (1 - e^D) = beta_t             Sec. 3.2, Ho et al. 2020
  (6)  score = grad log p_t(x_t) = -eps / sigma_t         Sec. 2, Song et al. 2021
  (7)  velocity = eps - x0                                minus Eq. 1, Liu et al. 2022
  (8)  x0 = c_skip x + c_out F, x = x_t / alpha_t         Eq. 7, Karras et al. 2022

(2) and (5) are DDPM's expressions in terms of log-SNR: 1 - e^D is an expm1, which
keeps its digits where (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) loses them, and it
holds for any two times, so that a chain may skip steps. `Prediction` and the variances
that are read off it are those of `prediction`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax.continuous import counts_steps
from diffusion_jax.errors import check_positive, raise_unknown
from diffusion_jax.prediction import (
    VARIANCES,
    Denoiser,
    Prediction,
    log_variance,
    reverse_variance,
)
from diffusion_jax.schedule import PURE_NOISE, NoiseLevel, Schedule, real_data, widened

KINDS = ("eps", "x0", "v", "score", "mean", "edm", "velocity")


def q_sample(x0: jax.Array, eps: jax.Array, level: NoiseLevel) -> jax.Array:
    """Returns x_t drawn from q(x_t | x0), by equation (1).

    Args:
      x0: clean data, [B, ...], scaled to [-1, 1].
      eps: standard normal noise of the same shape.
      level: noise level at t, [B] or scalar.

    Returns:
      x_t, [B, ...].

    >>> from diffusion_jax import schedule
    >>> x_t = q_sample(jnp.ones([1, 2]), jnp.zeros([1, 2]), schedule.linear()(1000))
    >>> print(x_t.round(5))
    [[0.00635 0.00635]]
    """
    level = level.like(x0)
    return level.alpha * x0 + level.sigma * eps


def q_posterior(
    x0: jax.Array, x_t: jax.Array, level: NoiseLevel, prev_level: NoiseLevel
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of q(x_s | x_t, x0), by equation (2).

    Args:
      x0: clean data, [B, ...].
      x_t: noisy data at t, [B, ...].
      level: noise level at t, [B] or scalar.
      prev_level: noise level at s < t, [B] or scalar.

    Returns:
      The mean, [B, ...], and the variance, [B, 1, ...] (zero at s = 0).
    """
    c0, ct = _posterior_coefficients(level.like(x0), prev_level.like(x0))
    variance = reverse_variance("small", level.like(x0), prev_level.like(x0))
    return c0 * x0 + ct * x_t, variance


def q_step(
    key: jax.Array,
    x_s: jax.Array,
    level: NoiseLevel,
    next_level: NoiseLevel,
    *,
    noise: float = 1.0,
) -> jax.Array:
    """Returns x_t drawn from q(x_t | x_s), the forward process (Eq. 2, Ho et al. 2020).

    x_t = a x_s + b z with a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2.

    Args:
      key: one key, or a key an example, [B].
      x_s: data at s, [B, ...].
      level: noise level at s, [B] or scalar.
      next_level: that at t, noisier, [B] or scalar.
      noise: standard deviation of z.

    >>> from diffusion_jax import schedule
    >>> lin, x = schedule.linear(), jnp.ones([1, 2])
    >>> print(q_step(jax.random.key(0), x, lin(0), lin(1000), noise=0.0).round(5))
    [[0.00635 0.00635]]
    """
    level, next_level = level.like(x_s), next_level.like(x_s)
    kept = jnp.exp(next_level.log_alpha - level.log_alpha)
    added = next_level.sigma * jnp.sqrt(-jnp.expm1(next_level.logsnr - level.logsnr))
    return kept * x_s + noise * added * normal(key, x_s.shape)


def predict(
    kind: str,
    output: jax.Array,
    x_t: jax.Array,
    level: NoiseLevel,
    prev_level: NoiseLevel | None = None,
    *,
    sigma_data: float = 0.5,
) -> Prediction:
    """Returns the x0 and eps that a network's output stands for.

    "velocity", equation (7), is that of a straight path from data to noise, and is
    read at any level: x0 = (x_t - sigma u) / (alpha + sigma), eps = (x_t + alpha u) /
    (alpha + sigma). "edm", equation (8), is read as the rotation that it is: with
    r^2 = sigma^2 + alpha^2 sd^2, c = alpha sd / r and q = sigma / r,

      x0 = sd (c x_t / r + q F),    eps = q x_t / r - c F

    which is Table 1 of Karras et al. 2022 at s = sigma / alpha, and cancels nowhere.

    Args:
      kind: what the output stands for: "eps" (the paper's choice), "x0", "v"
        (equation 4), "score" (6), "mean" (of q(x_s | x_t, x0), the paper's
        mu-tilde), "edm" (8) or "velocity" (7).
      output: the network's output, [B, ...].
      x_t: noisy data at t, [B, ...].
      level: noise level at t, [B] or scalar.
      prev_level: noise level at s; only for "mean".
      sigma_data: sd, the standard deviation of the data; only for "edm".

    Returns:
      A prediction with x_t = alpha x0 + sigma eps. At sigma = 0 eps is what the
      output says for "eps", "v", "edm" and "velocity", 0 for "score" and nan for
      "x0" and "mean", which say nothing of it. In pure noise, where alpha is 0, x0 is
      nan for "eps" and "score", which say nothing of that.

    Raises:
      ValueError: an unknown kind, "mean" without prev_level, or sigma_data <= 0.

    >>> from diffusion_jax import schedule
    >>> level = schedule.linear()(500)
    >>> x_t = q_sample(jnp.full([1, 2], 0.5), jnp.ones([1, 2]), level)
    >>> print(predict("eps", jnp.ones([1, 2]), x_t, level).x0.round(4))
    [[0.5 0.5]]
    """
    _check_kind(kind, prev_level, sigma_data)
    level = level.like(x_t)
    alpha, sigma = level.alpha, level.sigma
    if kind in ("eps", "score"):
        eps = output if kind == "eps" else -sigma * output
        x0 = (x_t - sigma * eps) / alpha
        return Prediction(jnp.where(level.logsnr < PURE_NOISE, jnp.nan, x0), eps)
    if kind == "velocity":
        path = alpha + sigma
        return Prediction((x_t - sigma * output) / path, (x_t + alpha * output) / path)
    if kind == "edm":
        c, q, scale = _rotation(level, sigma_data)
        x = scale * x_t
        return Prediction(sigma_data * (c * x + q * output), q * x - c * output)
    if kind == "v":
        # alpha^2 + sigma^2 is 1 for every variance-preserving schedule.
        norm = alpha**2 + sigma**2
        return Prediction(
            (alpha * x_t - sigma * output) / norm, (sigma * x_t + alpha * output) / norm
        )
    x0 = output
    if kind == "mean":
        assert prev_level is not None  # held by _check_kind
        c0, ct = _posterior_coefficients(level, prev_level.like(x_t))
        x0 = (output - ct * x_t) / c0
    return Prediction(x0, (x_t - alpha * x0) / sigma)


def target(
    kind: str,
    x0: jax.Array,
    eps: jax.Array,
    level: NoiseLevel,
    prev_level: NoiseLevel | None = None,
    *,
    sigma_data: float = 0.5,
) -> jax.Array:
    """Returns the output of a perfect network of this kind: the inverse of `predict`.

    "edm" is F = q x0 / sd - c eps, of variance 1 for data of variance sd^2.

    Args:
      kind: one of KINDS. "score" is infinite at sigma = 0.
      x0: clean data, [B, ...].
      eps: noise, [B, ...].
      level: noise level at t, [B] or scalar.
      prev_level: noise level at s; only for "mean".
      sigma_data: sd, the standard deviation of the data; only for "edm".

    Raises:
      ValueError: an unknown kind, "mean" without prev_level, or sigma_data <= 0.
    """
    _check_kind(kind, prev_level, sigma_data)
    level = level.like(x0)
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "velocity":
        return eps - x0
    if kind == "score":
        return -eps / level.sigma
    if kind == "edm":
        c, q, _ = _rotation(level, sigma_data)
        return q * (x0 / sigma_data) - c * eps
    if kind == "v":
        return level.alpha * eps - level.sigma * x0
    assert prev_level is not None  # held by _check_kind
    c0, ct = _posterior_coefficients(level, prev_level.like(x0))
    return c0 * x0 + ct * (level.alpha * x0 + level.sigma * eps)


def p_sample(
    key: jax.Array,
    pred: Prediction,
    x_t: jax.Array,
    level: NoiseLevel,
    prev_level: NoiseLevel,
    *,
    variance: str | ArrayLike = "large",
) -> jax.Array:
    """Returns x_s drawn from p(x_s | x_t): one line of Algorithm 2 (Ho et al. 2020).

    x_s = c0 x0 + ct x_t + sqrt(variance) z, without noise in a step to sigma_s = 0.

    Args:
      key: one key, or a key an example, [B].
      pred: the prediction at x_t.
      x_t: noisy data, [B, ...].
      level: noise level at t, [B] or scalar.
      prev_level: noise level at s < t, [B] or scalar.
      variance: one of VARIANCES, see `log_variance`; or the variance itself: a scalar
        or an array that broadcasts against x_t.

    Raises:
      ValueError: an unknown variance, or one that the prediction does not have.

    >>> from diffusion_jax import schedule
    >>> lin, x_t = schedule.linear(), jnp.zeros([1, 2])
    >>> pred = predict("eps", jnp.zeros([1, 2]), x_t, lin(1))
    >>> print(p_sample(jax.random.key(0), pred, x_t, lin(1), lin(0)))
    [[0. 0.]]
    """
    level, prev_level = level.like(x_t), prev_level.like(x_t)
    c0, ct = _posterior_coefficients(level, prev_level)
    if not isinstance(variance, str):
        chosen = jnp.asarray(variance)
    elif variance in ("small", "large"):
        chosen = reverse_variance(variance, level, prev_level)
    else:
        chosen = jnp.exp(log_variance(variance, pred, level, prev_level))
    # Where there is no noise the variance may be 0, where sqrt has no gradient.
    noisy = prev_level.sigma > 0
    scale = jnp.where(noisy, jnp.sqrt(jnp.where(noisy, chosen, 1.0)), 0.0)
    return c0 * pred.x0 + ct * x_t + scale * normal(key, x_t.shape)


def denoiser(
    apply_fn: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    kind: str,
    *,
    clip: bool = False,
    threshold: float | None = None,
    variance: str = "large",
    sigma_data: float = 0.5,
    time_shift: int | None = None,
) -> Denoiser:
    """Returns a function of (x_t, t) that gives the network's prediction.

    Args:
      apply_fn: the network, a function of x_t [B, ...] and t [B]. For "edm" it is one
        of c_in x = x_t / r and c_noise = log(sigma / alpha) / 4 in their place.
      schedule: the noise schedule that it was trained on.
      kind: what its output stands for; see `predict`.
      clip: whether x0 is clipped to [-1, 1], and eps made to agree with it. The
        paper clips when it samples and when it evaluates, not when it trains. For
        "mean" this moves the mean too, where the official code leaves it alone.
      threshold: dynamic thresholding in the place of the clip (Sec. 2.3, Saharia et
        al. 2022): the percentile of |x0| of an example, such as 0.995, to which it is
        clipped and by which it is divided where that is above 1.
      variance: that of the reverse steps, see `log_variance`. With "learned" (Table 2,
        "learned diagonal") and "range" the output has twice the channels. The second
        half is the log of the variance, or a number of which -1 means small and 1
        large. For "analytic" see `analytic.attach`.
      sigma_data: standard deviation of the data; only for "edm".
      time_shift: what is subtracted from t on the way to the network. When not given,
        1 where times count steps, DDPM's convention (a network counts from 0), and 0
        where they are in [0, 1]: for that, the schedule must say which.

    Returns:
      A function of x_t [B, ...] and t, [B] or scalar, in the unit of the schedule.

    Raises:
      ValueError: an unknown kind or variance, a threshold that is not in (0, 1], or
        no time_shift and a schedule that does not say what its times are.

    >>> from diffusion_jax import schedule
    >>> denoise = denoiser(lambda x, t: 0 * x, schedule.linear(), "x0", clip=True)
    >>> print(denoise(jnp.ones([1, 2]), 500).x0)
    [[0. 0.]]
    """
    if kind not in KINDS:
        raise_unknown("prediction", kind, KINDS)
    if variance not in VARIANCES:
        raise_unknown("variance", variance, VARIANCES)
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(
            f"threshold must be above 0 and at most 1, a percentile; got {threshold}. "
            "The usual value is 0.995."
        )
    if time_shift is None:
        time_shift = 1 if kind != "edm" and counts_steps(schedule) else 0

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        x_t, t = real_data(x_t), jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        level = schedule(t)
        if kind == "edm":
            scale = _rotation(level.like(x_t), sigma_data)[2]
            output = apply_fn(scale * x_t, -level.logsnr / 8)
        else:
            output = apply_fn(x_t, t - time_shift)
        output, extra = output.astype(x_t.dtype), {}
        if variance == "learned":
            output, extra["log_variance"] = jnp.split(output, 2, axis=-1)
        if variance == "range":
            output, extra["fraction"] = jnp.split(output, 2, axis=-1)
            extra["fraction"] = 0.5 * (extra["fraction"] + 1)
        prev_level = schedule(t - 1) if kind == "mean" else None
        pred = predict(kind, output, x_t, level, prev_level, sigma_data=sigma_data)
        if clip or threshold is not None:
            level = level.like(x_t)
            if threshold is None:
                x0 = jnp.clip(pred.x0, -1, 1)
            else:
                x0 = _threshold(pred.x0, threshold)
            pred = Prediction(x0, (x_t - level.alpha * x0) / level.sigma)
        return pred._replace(**extra)

    return denoise


def normal(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype | None = None
) -> jax.Array:
    """Returns standard normal noise, from one key or from a key for each example.

    Args:
      key: one key for the whole array, or [B] keys for shape (B, ...), so that
        example i depends on its key alone and not on the batch around it.
      shape: the shape of the result, batch first.
      dtype: floating-point type; the default one when not given.

    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> noise = normal(keys, (3, 2))
    >>> bool((noise[1:2] == normal(keys[1:2], (1, 2))).all())
    True
    """
    dtype = dtype or jnp.result_type(float)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.ndim == (0 if typed else 1):
        return jax.random.normal(key, shape, dtype)
    if key.shape[0] != shape[0]:
        raise ValueError(
            f"keys must be one, or one for each of {shape[0]} examples; got "
            f"{key.shape[0]}. Use jax.random.split(key, {shape[0]})."
        )
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(key)


def _threshold(x0: jax.Array, percentile: float) -> jax.Array:
    size = jnp.abs(x0).reshape(len(x0), -1)
    top = jnp.maximum(jnp.quantile(size, percentile, axis=1), 1)
    top = widened(top, x0)
    return jnp.clip(x0, -top, top) / top


def _posterior_coefficients(
    level: NoiseLevel, prev_level: NoiseLevel
) -> tuple[jax.Array, jax.Array]:
    gap = level.logsnr - prev_level.logsnr
    c0 = prev_level.alpha * -jnp.expm1(gap)
    return c0, jnp.exp(prev_level.log_alpha - level.log_alpha + gap)


def _rotation(
    level: NoiseLevel, sigma_data: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns c, q and 1 / r of `predict`."""
    signal, noise = level.alpha * sigma_data, level.sigma
    scale = jax.lax.rsqrt(signal**2 + noise**2)
    return scale * signal, scale * noise, scale


def _check_kind(
    kind: str, prev_level: NoiseLevel | None, sigma_data: float = 0.5
) -> None:
    if kind not in KINDS:
        raise_unknown("prediction", kind, KINDS)
    if kind == "edm":
        hint = "It is the standard deviation of the data, 0.5 in the paper."
        check_positive("sigma_data", sigma_data, hint)
    if kind == "mean" and prev_level is None:
        raise ValueError(
            "prediction 'mean' must come with the level that the step goes to; got "
            "prev_level=None. Pass schedule(t - 1)."
        )
