"""The variational bound over the whole chain, in bits/dim, and what it says.

  -log p(x0) <= L_T + sum_{t=2..T} L_{t-1} + L_0           Eq. 5, Ho et al. 2020

Every L is a term of `losses`. The sum without L_0 is the rate, L_0 the distortion of a
lossy code (Sec. 4.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import gaussian, losses
from diffusion_jax.schedule import Schedule, num_steps


class Bound(NamedTuple):
    """The bound of B examples, with its terms; everything but `mse` in bits/dim."""

    total: jax.Array
    """The bound on the negative log-likelihood, [B]."""
    prior: jax.Array
    """L_T, [B]."""
    terms: jax.Array
    """L_{t-1} for t = 1..T, [T, B]; the first, L_0, is the decoder's."""
    mse: jax.Array
    """Mean squared error of the x0 seen from x_t, for t = 1..T, [T, B]."""


class RateDistortion(NamedTuple):
    """What has been received, and how well it shows x0, after each reverse step."""

    steps: np.ndarray
    """Reverse steps taken, T - t + 1, from 1 to T, [T]."""
    rate: np.ndarray
    """Bits/dim received until then, [T]."""
    distortion: np.ndarray
    """Root mean squared error of the x0 seen, on the scale of 0..255, [T]."""


def bound(
    key: jax.Array,
    denoise: gaussian.Denoiser,
    schedule: Schedule,
    x0: jax.Array,
    *,
    variance: str = "large",
    chunk: int = 1,
) -> Bound:
    """Returns the bound by one draw of x_t for every t (Eq. 5, Ho et al. 2020).

    Takes T evaluations of the network an example. The noise of example i at time t
    comes from (key i, t) alone.

    Args:
      key: one key, or a key an example, [B].
      denoise: the network's prediction. The paper's evaluation clips x0.
      schedule: its discrete schedule.
      x0: data on the grid of 256 values, scaled to [-1, 1], [B, ...].
      variance: of the reverse steps: "small", "large" or "learned".
      chunk: times evaluated together: memory grows with it.

    >>> from diffusion_jax import schedule
    >>> lin, x0 = schedule.linear(10), jnp.zeros([2, 3])
    >>> perfect = gaussian.denoiser(lambda x, t: 0 * x, lin, "x0")
    >>> bits = bound(jax.random.key(0), perfect, lin, x0)
    >>> print(bits.terms.shape, float(jnp.abs(bits.mse).max()))
    (10, 2) 0.0
    """
    total = num_steps(schedule)
    if total < 2:
        raise ValueError(
            f"the schedule must have at least 2 steps; got {total}. The decoder takes "
            "its variance from the second."
        )
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"key must be a typed key, or one for each example; got {key.dtype}. Make "
            "it with jax.random.key."
        )
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x0)))

    def at(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        times = jnp.full(x0.shape[:1], t)
        keys = jax.vmap(jax.random.fold_in, (0, None))(key, t)
        eps = gaussian.normal(keys, x0.shape, x0.dtype)
        x_t = gaussian.q_sample(x0, eps, schedule(times))
        pred = denoise(x_t, times)
        term = losses.vlb(pred, x0, x_t, schedule, times, variance=variance)
        error = jnp.square(pred.x0 - x0).mean(axis=tuple(range(1, x0.ndim)))
        return term, error

    terms, mse = jax.lax.map(at, jnp.arange(1, total + 1), batch_size=chunk)
    prior = losses.prior(x0, schedule(total))
    return Bound(prior + terms.sum(axis=0), prior, terms, mse)


def rate_distortion(
    prior: np.ndarray, terms: np.ndarray, mse: np.ndarray
) -> RateDistortion:
    """Returns rate and distortion over the reverse steps (Table 4, Ho et al. 2020).

    At time t the terms L_T and L_t, ..., L_{T-1} have been received, and x0 is
    estimated from x_t; after the first step that is L_T alone.

    Args:
      prior: L_T in bits/dim, mean over the data, a scalar.
      terms: L_{t-1} for t = 1..T in bits/dim, mean over the data, [T].
      mse: mean squared error of the x0 seen from x_t, over the data, [T].

    >>> code = rate_distortion(np.float64(0), np.array([2.0, 1.0, 0.5]), np.ones(3))
    >>> print(code.rate, code.distortion)
    [0.  0.5 1.5] [127.5 127.5 127.5]
    """
    terms = np.asarray(terms, np.float64)
    above = np.concatenate([[0.0], np.cumsum(terms[:0:-1])])
    distortion = 127.5 * np.sqrt(np.asarray(mse, np.float64)[::-1])
    return RateDistortion(np.arange(1, len(terms) + 1), prior + above, distortion)
