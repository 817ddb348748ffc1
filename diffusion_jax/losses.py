"""Training losses, one number an example: the simple loss and the terms of the bound.

  L        = E[ L_T + sum_{t>1} L_{t-1} + L_0 ]     Eq. 5, Ho et al. 2020
  L_T      = KL(q(x_T | x0) || p(x_T))              `prior`
  L_{t-1}  = KL(q(x_s | x_t, x0) || p(x_s | x_t))   `vlb`, t > 1
  L_0      = -log p(x0 | x_1)                       `vlb`, t = 1 (`decoder`, Eq. 13)
  L_simple = ||eps - eps_theta(x_t, t)||^2          `simple`, Eq. 14
  L_hybrid = L_simple + 0.001 L                     Eq. 16, Nichol and Dhariwal 2021

In continuous time the bound is L_T, an integral over t and a term at t = 0 (Kingma et
al. 2021): `diffusion` is what is integrated, `reconstruction` the term.

`simple` and `weighted` are means over pixels; the terms of the bounds are in bits/dim.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax import gaussian
from diffusion_jax.schedule import NoiseLevel, Schedule, Timed, num_steps, real_data


def simple(
    pred: gaussian.Prediction,
    x0: jax.Array,
    eps: jax.Array,
    level: NoiseLevel,
    prev_level: NoiseLevel | None = None,
    *,
    space: str = "eps",
    sigma_data: float = 0.5,
) -> jax.Array:
    """Returns the mean squared error of a prediction, [B] (Eq. 14, Ho et al. 2020).

    Args:
      pred: the prediction at x_t.
      x0: clean data, [B, ...].
      eps: the noise in x_t, [B, ...].
      level: noise level at t, [B].
      prev_level: noise level at s; only for the space "mean".
      space: the coordinate in which the error is measured, whatever the network puts
        out: "eps" (the paper's L_simple) or another of `gaussian.KINDS`.
      sigma_data: standard deviation of the data; only for the space "edm".

    >>> from diffusion_jax import schedule
    >>> level, zero, one = schedule.linear()(500), jnp.zeros([1, 2]), jnp.ones([1, 2])
    >>> pred = gaussian.predict("eps", zero, one, level)
    >>> print(simple(pred, zero, one, level))
    [1.]
    """
    options = {"sigma_data": sigma_data}
    truth = gaussian.target(space, x0, eps, level, prev_level, **options)
    guess = gaussian.target(space, pred.x0, pred.eps, level, prev_level, **options)
    return _mean(jnp.square(guess - truth))


def weighted(
    pred: gaussian.Prediction,
    eps: jax.Array,
    level: NoiseLevel,
    weighting: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Returns w(logsnr) ||eps - eps_hat||^2, a mean over pixels, [B].

    Every squared error is one of these: that of x0 has w = e^-logsnr, and `simple` in
    eps has w = 1 (Sec. 2, Kingma and Gao 2023).

    Args:
      pred: the prediction at x_t.
      eps: the noise in x_t, [B, ...].
      level: noise level at t, [B]; where w has no value at infinity, sigma above 0.
      weighting: w, a function of the log-SNR, [B] to [B].

    >>> from diffusion_jax import schedule
    >>> level, zero, one = schedule.linear()(500), jnp.zeros([1, 2]), jnp.ones([1, 2])
    >>> pred = gaussian.predict("eps", zero, one, level)
    >>> print(weighted(pred, one, level, jax.nn.sigmoid).round(4))
    [0.0786]
    """
    return weighting(level.logsnr) * _mean(jnp.square(pred.eps - real_data(eps)))


def vlb(
    pred: gaussian.Prediction,
    x0: jax.Array,
    x_t: jax.Array,
    schedule: Schedule,
    t: jax.Array,
    *,
    variance: str = "large",
    decoder_variance: ArrayLike | None = None,
    real: bool = False,
) -> jax.Array:
    """Returns one term of the variational bound an example, [B], in bits/dim.

    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 1 and -log p(x0 | x_1) for
    t = 1. Their sum over t, plus `prior`, bounds the negative log-likelihood.

    Args:
      pred: the prediction at x_t.
      x0: clean data on the grid of 256 values, scaled to [-1, 1], [B, ...]; real
        numbers where `real`.
      x_t: noisy data, [B, ...].
      schedule: a discrete schedule of at least two steps.
      t: integer times in 1..T, [B].
      variance: the reverse variance, one of gaussian.VARIANCES.
      decoder_variance: that of p(x0 | x_1), in the place of the variance's own. Chains
        of a continuous schedule want (sigma_1 / alpha_1)^2, what x_1 leaves open: small
        and large borrow that of t = 2, which is far too sure where the first step is
        not one of many alike.
      real: whether -log p(x0 | x_1) is that of a density, as of latents, and not of
        256 values. Its variance is sigma_1^2 where none is given: for data of unit
        variance, what x_1 leaves open.

    Raises:
      ValueError: an unknown variance, or one that the prediction does not have; T is
        1; or images that are not float32 or float64, here and below.
    """
    check_values(x0)
    if isinstance(schedule, Timed) and schedule.steps == 1:
        raise ValueError(
            "schedule must have at least 2 steps; got 1. The decoder takes its "
            "variance from the second."
        )
    t = jnp.asarray(t)
    level, prev_level = schedule(t).like(x0), schedule(t - 1).like(x0)
    # The step to data has posterior variance 0, whose logarithm nothing can use: as
    # in the official code, t = 1 borrows the posterior variance of t = 2.
    safe_t = jnp.maximum(t, 2)
    small = jnp.log(
        gaussian.reverse_variance(
            "small", schedule(safe_t).like(x0), schedule(safe_t - 1).like(x0)
        )
    )
    log_variance = gaussian.log_variance(
        variance, pred, level, prev_level, log_small=small
    )
    if real and decoder_variance is None:
        decoder_variance = jnp.square(schedule(1).sigma)
    if decoder_variance is not None:
        given = jnp.log(jnp.asarray(decoder_variance, x0.dtype))
        log_variance = jnp.where(jnp.isposinf(prev_level.logsnr), given, log_variance)
    # Both means have the same x_t in them: their difference has only x0, without the
    # rounding of two large sums.
    none = jnp.zeros_like(x_t)
    off, _ = gaussian.q_posterior(x0 - pred.x0, none, level, prev_level)
    guess, _ = gaussian.q_posterior(pred.x0, x_t, level, prev_level)
    kl = _bits_per_dim(normal_kl(off, small, none, log_variance))
    nll = _bits_per_dim((_normal if real else decoder)(x0, guess, log_variance))
    return jnp.where(t == 1, nll, kl)


def hybrid(
    pred: gaussian.Prediction,
    x0: jax.Array,
    x_t: jax.Array,
    eps: jax.Array,
    schedule: Schedule,
    t: jax.Array,
    *,
    variance: str = "range",
    scale: float = 1e-3,
) -> jax.Array:
    """Returns L_simple + scale L, [B] (Eq. 16, Nichol and Dhariwal 2021).

    L is the sum of T terms of the bound in bits/dim, here T times that of a t drawn
    uniformly. It teaches the variance alone: the mean in it gets no gradient.

    Args:
      pred: the prediction at x_t, with what the variance needs.
      x0: clean data on the grid of 256 values, scaled to [-1, 1], [B, ...].
      x_t: noisy data, [B, ...].
      eps: the noise in x_t, [B, ...].
      schedule: a discrete schedule of at least two steps.
      t: integer times in 1..T, [B].
      variance: the reverse variance, as in `vlb`.
      scale: of L; the paper's lambda.

    Raises:
      ValueError: an unknown variance, or one that the prediction does not have.

    >>> from diffusion_jax import schedule
    >>> lin, x0, t = schedule.linear(), jnp.zeros([1, 2]), jnp.array([500])
    >>> x_t = gaussian.q_sample(x0, x0 + 1, lin(t))
    >>> pred = gaussian.Prediction(x0, x0 + 1)
    >>> loss = hybrid(pred, x0, x_t, x0 + 1, lin, t, variance="small")
    >>> print(loss.round(6))  # of the truth, with the variance of the posterior
    [0.]
    """
    mean = jax.lax.stop_gradient((pred.x0, pred.eps))
    term = vlb(
        pred._replace(x0=mean[0], eps=mean[1]), x0, x_t, schedule, t, variance=variance
    )
    rest = simple(pred, x0, eps, schedule(t))
    return rest + scale * num_steps(schedule) * term


def diffusion(pred: gaussian.Prediction, eps: jax.Array, slope: jax.Array) -> jax.Array:
    """Returns the bound's term at t in continuous time, [B], in bits/dim.

    1/2 (-d logsnr / dt) ||eps - eps_hat(x_t, t)||^2, whose integral over t is the limit
    of the sum of all KL terms (Eq. 17, Kingma et al. 2021).

    Args:
      pred: the prediction at x_t.
      eps: the noise in x_t, [B, ...].
      slope: -d logsnr / dt at t, above 0, [B], in nats a unit of time.

    >>> pred = gaussian.Prediction(jnp.zeros([1, 2]), jnp.zeros([1, 2]))
    >>> print(diffusion(pred, jnp.ones([1, 2]), 2 * jnp.log(2.0) * jnp.ones(1)))
    [1.]
    """
    return 0.5 * slope * _bits_per_dim(jnp.square(pred.eps - real_data(eps)))


def reconstruction(
    x0: jax.Array, z0: jax.Array, level: NoiseLevel, *, real: bool = False
) -> jax.Array:
    """Returns -log p(x0 | z_0), [B], in bits/dim (Sec. 3.3, Kingma et al. 2021).

    p(x | z_0) is proportional to q(z_0 | x) over the 256 values of each pixel, which
    nothing has to be learned for.

    Args:
      x0: data on the grid of 256 values, scaled to [-1, 1], [B, ...]; real numbers
        where `real`.
      z0: noisy data at t = 0, [B, ...].
      level: noise level at t = 0, logsnr finite, a scalar or [B].
      real: whether it is proportional to that over all numbers, a density.

    >>> from diffusion_jax import schedule
    >>> x0, level = jnp.full([1, 2], 1 / 255), schedule.NoiseLevel(0.0, 10.0)
    >>> print(reconstruction(x0, x0, level).round(3))
    [1.107]
    """
    check_values(x0)
    if real:
        like = level.like(x0)
        return _bits_per_dim(_normal(x0, z0 / like.alpha, -like.logsnr))
    value = jnp.linspace(-1, 1, 256, dtype=x0.dtype).reshape(*[1] * x0.ndim, 256)
    # Relative to the probability of x0 itself: no large logits are subtracted.
    off = (z0 / level.like(x0).alpha - x0)[..., None]
    step = x0[..., None] - value
    logits = -0.5 * jnp.exp(level.like(step).logsnr) * step * (2 * off + step)
    nats = jax.nn.logsumexp(logits, axis=-1)
    return _bits_per_dim(nats)


def prior(x0: jax.Array, level: NoiseLevel) -> jax.Array:
    """Returns KL(q(x_T | x0) || N(0, std^2 I)), L_T of the bound, [B], in bits/dim.

    std = max(1, sigma), as in `sde.prior_logp`: a chain that keeps its variance ends
    in a unit normal, one that explodes in its own noise.

    Args:
      x0: clean data, [B, ...].
      level: noise level at T, a scalar or [B].

    >>> from diffusion_jax import schedule
    >>> x0 = jnp.full([1, 2], 0.3**0.5)
    >>> print(f"{prior(x0, schedule.linear()(1000))[0]:.1e}")
    8.7e-06
    """
    level = level.like(x0)
    # 1/2 (r - 1 - log r + alpha^2 x0^2 / std^2) with r = sigma^2 / std^2: r - 1 and
    # log r cancel to second order, so they are subtracted as one series.
    log_variance = 2 * level.log_alpha - level.logsnr
    log_ratio = jnp.minimum(log_variance, 0)
    noise = jnp.expm1(log_ratio) - log_ratio
    scale = jnp.exp(level.log_alpha - 0.5 * jnp.maximum(log_variance, 0))
    return _bits_per_dim(0.5 * (noise + jnp.square(scale * x0)))


def normal_kl(
    mean1: jax.Array,
    log_variance1: jax.Array,
    mean2: jax.Array,
    log_variance2: jax.Array,
) -> jax.Array:
    """Returns KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)), in nats.

    1/2 (r - 1 - log r + (mean1 - mean2)^2 / variance2), r the ratio of variances, for
    every element; the arguments broadcast.

    >>> print(normal_kl(jnp.zeros(2), jnp.zeros(2), jnp.ones(2), jnp.zeros(2)))
    [0.5 0.5]
    """
    log_ratio = log_variance1 - log_variance2
    distance = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio + distance)


def decoder(
    x0: jax.Array, mean: jax.Array, log_variance: jax.Array, *, exact: bool = False
) -> jax.Array:
    """Returns -log p(x0 | x_1) for every element, in nats (Eq. 13, Ho et al. 2020).

    The probability that a normal variable falls into the bin of x0: +-1/255 around
    it, open to the outside at -1 and 1.

    Args:
      x0: data on the grid of 256 values from -1 to 1, [B, ...].
      mean: mean of p(x0 | x_1), [B, ...].
      log_variance: log of its variance; broadcasts against x0.
      exact: whether the normal distribution function is the exact one; the default
        is the tanh approximation that the published numbers were computed with. Both
        floor a probability at 1e-12.

    >>> x0 = jnp.linspace(-1, 1, 256)
    >>> nats = decoder(x0, jnp.full([256], 0.1), jnp.full([256], -3.0))
    >>> print(f"{jnp.exp(-nats).sum():.4f}")
    1.0000
    """
    check_values(x0)
    cdf = jax.scipy.stats.norm.cdf if exact else _tanh_cdf
    scale = jnp.exp(-0.5 * log_variance)
    # Measured from the mean outwards in the lower tail, where a probability keeps its
    # digits: 1 - p has none left for a p below 1e-7.
    side = jnp.where(x0 > mean, -1.0, 1.0)
    off = side * (x0 - mean)
    upper = cdf((off + 1 / 255) * scale)
    lower = cdf((off - 1 / 255) * scale)
    upper = jnp.where(side * x0 > 0.999, 1.0, upper)
    lower = jnp.where(side * x0 < -0.999, 0.0, lower)
    return -jnp.log(jnp.maximum(upper - lower, 1e-12))


def check_values(x0: jax.Array) -> None:
    """Raises ValueError where the type of images cannot tell 256 values apart."""
    if jnp.result_type(x0) not in (jnp.float32, jnp.float64):
        raise ValueError(
            "images on the grid of 256 values must be float32 or float64, scaled to "
            f"[-1, 1]; got {jnp.result_type(x0)}. Scale the whole numbers 0 to 255 in "
            "float32: values / 127.5 - 1."
        )


def _normal(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Returns -log N(x; mean, e^log_variance) of every element, in nats."""
    distance = jnp.square(x - mean) * jnp.exp(-log_variance)
    return 0.5 * (math.log(2 * math.pi) + log_variance + distance)


def _tanh_cdf(x: jax.Array) -> jax.Array:
    # sigmoid(2 y) is (1 + tanh y) / 2. Beyond 30 it is 0 or 1, but x^3 could overflow.
    x = jnp.clip(x, -30, 30)
    return jax.nn.sigmoid(2 * jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3))


def _bits_per_dim(nats: jax.Array) -> jax.Array:
    return _mean(nats) / jnp.log(2.0)


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))
