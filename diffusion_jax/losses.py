"""Training losses, one number an example: the simple loss and the terms of the bound.

  L        = E[ L_T + sum_{t>1} L_{t-1} + L_0 ]     Eq. 5, Ho et al. 2020
  L_T      = KL(q(x_T | x0) || N(0, I))             `prior`
  L_{t-1}  = KL(q(x_s | x_t, x0) || p(x_s | x_t))   `vlb`, t > 1
  L_0      = -log p(x0 | x_1)                       `vlb`, t = 1 (`decoder`, Eq. 13)
  L_simple = ||eps - eps_theta(x_t, t)||^2          `simple`, Eq. 14

`simple` is a mean over pixels; the terms of the bound are in bits/dim.
"""

import jax
import jax.numpy as jnp

from diffusion_jax import gaussian
from diffusion_jax.schedule import NoiseLevel, Schedule


def sample_t(key: jax.Array, num_steps: int, shape: tuple[int, ...] = ()) -> jax.Array:
    """Returns times uniform over {1, ..., num_steps} (Algorithm 1, Ho et al. 2020).

    Args:
      key: one key.
      num_steps: T.
      shape: of the result, int32.

    >>> t = sample_t(jax.random.key(0), 1000, (4,))
    >>> bool(((t >= 1) & (t <= 1000)).all())
    True
    """
    return jax.random.randint(key, shape, 1, num_steps + 1)


def simple(
    pred: gaussian.Prediction,
    x0: jax.Array,
    eps: jax.Array,
    level: NoiseLevel,
    prev_level: NoiseLevel | None = None,
    *,
    space: str = "eps",
) -> jax.Array:
    """Returns the mean squared error of a prediction, [B] (Eq. 14, Ho et al. 2020).

    Args:
      pred: the prediction at x_t.
      x0: clean data, [B, ...].
      eps: the noise in x_t, [B, ...].
      level: noise level at t, [B].
      prev_level: noise level at s; only for the space "mean".
      space: the coordinate in which the error is measured, whatever the network puts
        out: "eps" (the paper's L_simple), "x0", "v" or "mean".

    >>> from diffusion_jax import schedule
    >>> level, zero, one = schedule.linear()(500), jnp.zeros([1, 2]), jnp.ones([1, 2])
    >>> pred = gaussian.predict("eps", zero, one, level)
    >>> print(simple(pred, zero, one, level))
    [1.]
    """
    truth = gaussian.target(space, x0, eps, level, prev_level)
    guess = gaussian.target(space, pred.x0, pred.eps, level, prev_level)
    return _mean(jnp.square(guess - truth))


def vlb(
    pred: gaussian.Prediction,
    x0: jax.Array,
    x_t: jax.Array,
    schedule: Schedule,
    t: jax.Array,
    *,
    variance: str = "large",
) -> jax.Array:
    """Returns one term of the variational bound an example, [B], in bits/dim.

    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 1 and -log p(x0 | x_1) for
    t = 1. Their sum over t, plus `prior`, bounds the negative log-likelihood.

    Args:
      pred: the prediction at x_t.
      x0: clean data on the grid of 256 values, scaled to [-1, 1], [B, ...].
      x_t: noisy data, [B, ...].
      schedule: a discrete schedule of at least two steps.
      t: integer times in 1..T, [B].
      variance: "small", "large" or "learned": the reverse variance.

    Raises:
      ValueError: an unknown variance.
    """
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
    if variance == "learned":
        log_variance = gaussian.learned_log_variance(pred)
    else:
        first = t.reshape(level.alpha.shape) == 1
        fixed = gaussian.reverse_variance(variance, level, prev_level)
        log_variance = jnp.where(first, small, jnp.log(jnp.where(first, 1.0, fixed)))
    # Both means have the same x_t in them: their difference has only x0, without the
    # rounding of two large sums.
    none = jnp.zeros_like(x_t)
    off, _ = gaussian.q_posterior(x0 - pred.x0, none, level, prev_level)
    guess, _ = gaussian.q_posterior(pred.x0, x_t, level, prev_level)
    kl = _bits_per_dim(normal_kl(off, small, none, log_variance))
    nll = _bits_per_dim(decoder(x0, guess, log_variance))
    return jnp.where(t == 1, nll, kl)


def prior(x0: jax.Array, level: NoiseLevel) -> jax.Array:
    """Returns KL(q(x_T | x0) || N(0, I)), L_T of the bound, [B], in bits/dim.

    Args:
      x0: clean data, [B, ...].
      level: noise level at T, a scalar or [B].

    >>> from diffusion_jax import schedule
    >>> x0 = jnp.full([1, 2], 0.3**0.5)
    >>> print(f"{prior(x0, schedule.linear()(1000))[0]:.1e}")
    8.7e-06
    """
    level = level.like(x0)
    # 1/2 (sigma^2 - 1 - log sigma^2 + alpha^2 x0^2), where sigma^2 - 1 = expm1(log
    # sigma^2): the two cancel to second order, so they are subtracted as one series.
    log_variance = 2 * level.log_alpha - level.logsnr
    noise = jnp.expm1(log_variance) - log_variance
    return _bits_per_dim(0.5 * (noise + jnp.square(level.alpha * x0)))


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


def _tanh_cdf(x: jax.Array) -> jax.Array:
    # sigmoid(2 y) is (1 + tanh y) / 2. Beyond 30 it is 0 or 1, but x^3 could overflow.
    x = jnp.clip(x, -30, 30)
    return jax.nn.sigmoid(2 * jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3))


def _bits_per_dim(nats: jax.Array) -> jax.Array:
    return _mean(nats) / jnp.log(2.0)


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))
