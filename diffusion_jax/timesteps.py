"""How the times of a training batch are drawn: a spread, then a density.

How the batch's uniform numbers are spread, one for each example:

  uniform           u_i independent                    Algorithm 1, Ho et al. 2020
  antithetic        pairs u, 1 - u                     code of Song et al. 2021 (DDIM)
  low_discrepancy   u_i = (u_0 + i / B) mod 1          App. I.1, Kingma et al. 2021

and which density they become, by its inverse distribution function:

  steps             t uniform in {1, ..., T}           Algorithm 1, Ho et al. 2020
  times             t uniform in [first, 1]            Song et al. 2021 (SDE)
  log_normal        ln(sigma / alpha) ~ N(m, s^2)      Table 1, Karras et al. 2022
  logit_normal      logit(t) ~ N(m, s^2)               Sec. 3.1, Esser et al. 2024
  importance        p_t as sqrt(E[L_t^2])              Eq. 18, Nichol, Dhariwal 2021

A spread is given the key of the step, the same on every device, and the positions of
its examples in the global batch. A batch that is cut over devices, hosts or
micro-batches then draws what the whole one would have drawn.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax.continuous import time_of
from diffusion_jax.errors import check_positive
from diffusion_jax.schedule import Schedule, check_num_steps, check_range


class History(NamedTuple):
    """The last losses of every t; row t - 1 is that of t."""

    losses: jax.Array
    """A ring buffer for each t, [T, length] float32, in the unit of the loss."""
    counts: jax.Array
    """How many losses of each t were ever recorded, [T] int32."""


def uniform(key: jax.Array, position: jax.Array) -> jax.Array:
    """Returns independent uniform numbers, one for each position, in (0, 1).

    The middles of 2^23 cells, as all the numbers here: neither 0 nor 1 comes up, and
    1 - u is as likely as u and exact.

    Args:
      key: the key of the step.
      position: of each example in the global batch, [b] integers.

    >>> key, position = jax.random.key(0), jnp.arange(6)
    >>> u = uniform(key, position)
    >>> bool((u[4:] == uniform(key, position[4:])).all())
    True
    """
    return jax.vmap(lambda i: _draw(jax.random.fold_in(key, i)))(jnp.asarray(position))


def low_discrepancy(key: jax.Array, position: jax.Array, batch_size: int) -> jax.Array:
    """Returns evenly spread uniform numbers, [b] in [0, 1).

    u_i = (u_0 + i / B) mod 1 (App. I.1, Kingma et al. 2021). Each is uniform, and
    every interval of length 1 / B has one of the batch.

    Args:
      key: the key of the step.
      position: of each example in the global batch, [b] integers in 0..B-1.
      batch_size: B, that of the global batch.

    Raises:
      ValueError: a known position outside the batch.

    >>> u = low_discrepancy(jax.random.key(0), jnp.arange(4), 4)
    >>> print(jnp.diff(jnp.sort(u)).round(4))
    [0.25 0.25 0.25]
    """
    position = _within(position, batch_size)
    u = _draw(key) + position / batch_size
    # The difference is exact, and so it is below 1.
    return u - jnp.floor(u)


def antithetic(key: jax.Array, position: jax.Array, batch_size: int) -> jax.Array:
    """Returns uniform numbers in pairs u and 1 - u, [b] in (0, 1).

    The pairs are the positions i and i + B/2, as in the code of Song et al. 2021
    (DDIM), which draws t and T - 1 - t, counted from 0. `steps` makes that of them,
    but for the rounding of u T, which moves one of 25,000 pairs by a step at T = 1000.
    Where B is odd, position (B - 1) / 2 is without a partner.

    Args:
      key: the key of the step.
      position: of each example in the global batch, [b] integers in 0..B-1.
      batch_size: B, that of the global batch.

    Raises:
      ValueError: a known position outside the batch.

    >>> u = antithetic(jax.random.key(0), jnp.arange(4), 4)
    >>> print(u[:2] + u[2:])
    [1. 1.]
    """
    position = _within(position, batch_size)
    half = (batch_size + 1) // 2
    mirrored = position >= half
    u = uniform(key, jnp.where(mirrored, position - half, position))
    return jnp.where(mirrored, 1 - u, u)


def steps(u: jax.Array, num_steps: int) -> jax.Array:
    """Returns times in {1, ..., T}, 1 + floor(u T): uniform if u is.

    Never T + 1: u is at most 1 - 2^-24, and u T then rounds to a float below T.

    Args:
      u: numbers in [0, 1), of any shape.
      num_steps: T, below 2^24 in float32.

    >>> print(steps(jnp.array([0.0, 0.4999, 0.5, 0.9999]), 1000))
    [   1  500  501 1000]
    """
    check_num_steps(num_steps)
    return 1 + jnp.floor(u * num_steps).astype(int)


def times(u: jax.Array, *, first: float = 1e-5) -> jax.Array:
    """Returns times in [first, 1], first + (1 - first) u: uniform if u is.

    Args:
      u: numbers in [0, 1), of any shape.
      first: where time begins. The default is that of Song et al. 2021 (SDE), whose
        losses are not defined at 0, where there is no noise.

    Raises:
      ValueError: first is not in [0, 1).

    >>> print(times(jnp.array([0.0, 0.5]), first=0.1))
    [0.1  0.55]
    """
    if not 0 <= first < 1:
        raise ValueError(
            f"first must be at least 0 and below 1; got {first}. The usual value is "
            "1e-5."
        )
    return first + (1 - first) * u


def log_normal(
    u: jax.Array, schedule: Schedule, *, mean: float = -1.2, std: float = 1.2
) -> jax.Array:
    """Returns times at which the noise is log-normal, without a gradient.

    ln(sigma / alpha) = mean + std ndtri(u) (Table 1, Karras et al. 2022), and t the
    time at which the schedule is there. What lies beyond the ends of the schedule is
    at its end: 1.6e-5 of the draws for ve(sigma_min=0.002, sigma_max=80).

    Args:
      u: numbers in [0, 1), of any shape. 0 counts as half of the float's precision,
        2^-24 in float32, which bounds the draws at 5.3 standard deviations.
      schedule: a continuous schedule. A discrete one gives the nearest whole step.
      mean: of ln(sigma / alpha).
      std: of ln(sigma / alpha).

    Raises:
      ValueError: std is not above 0.

    >>> from diffusion_jax import continuous
    >>> ve = continuous.ve(sigma_min=0.002, sigma_max=80.0)
    >>> t = log_normal(jnp.array(0.5), ve)
    >>> print(f"{jnp.log(ve(t).sigma):.3f}")
    -1.200
    """
    logsnr = -2 * _normal(u, mean, std)
    # A time found by bisection has no derivative, and nothing that trains needs one.
    return jax.lax.stop_gradient(time_of(schedule, jax.lax.stop_gradient(logsnr)))


def logit_normal(u: jax.Array, *, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """Returns times in (0, 1) whose logit is normal (Sec. 3.1, Esser et al. 2024).

    t = sigmoid(mean + std ndtri(u)), which is for times in [0, 1], those of
    `continuous.flow` above all. In float32 t stays below 1 while mean + 5.3 std is at
    most 16.

    Args:
      u: numbers in [0, 1), of any shape; 0 as in `log_normal`.
      mean: of the logit: above 0 there are more of the noisy times.
      std: of the logit.

    Raises:
      ValueError: std is not above 0.

    >>> print(f"{logit_normal(jnp.array(0.8413447)):.4f}")  # sigmoid(1)
    0.7311
    """
    return jax.nn.sigmoid(_normal(u, mean, std))


def history(num_steps: int, *, length: int = 10) -> History:
    """Returns an empty history.

    Args:
      num_steps: T.
      length: how many losses of each t are kept (10 in Sec. 3.3, Nichol and Dhariwal
        2021).

    >>> print(history(1000).losses.shape)
    (1000, 10)
    """
    check_num_steps(num_steps)
    if length < 1:
        raise ValueError(
            f"length must be at least 1; got {length}. The usual value is 10."
        )
    return History(
        jnp.zeros([num_steps, length], jnp.float32), jnp.zeros([num_steps], jnp.int32)
    )


def record(history: History, t: jax.Array, loss: jax.Array) -> History:
    """Returns the history with a batch of losses added, in the order of the batch.

    Where the batch has a t more often than the history is long, its last losses
    stay. A loss that is not finite is not recorded, nor is a traced t outside 1..T.
    For the same history on every device, gather t and loss over the devices first.

    Args:
      history: the losses so far.
      t: integer times in 1..T, [B].
      loss: L_t of each example before it is weighted, [B].

    Raises:
      ValueError: a known t outside 1..T.

    >>> t, loss = jnp.array([3, 1, 3]), jnp.array([1.0, 2.0, 4.0])
    >>> print(record(history(3, length=2), t, loss).losses)
    [[2. 0.]
     [0. 0.]
     [1. 4.]]
    """
    num_steps, length = history.losses.shape
    t = jnp.asarray(t)
    check_range("t", t, 1, num_steps, "It counts the steps of the chain.")
    # Rows that do not exist are dropped by the scatters below.
    kept = jnp.isfinite(loss) & (t >= 1) & (t <= num_steps)
    row = jnp.where(kept, t - 1, num_steps)
    order = jnp.argsort(row, stable=True)
    row, loss = row[order], loss[order].astype(history.losses.dtype)
    # Sorted by t, the n-th loss of a t is n places after its first.
    nth = jnp.arange(len(row)) - jnp.searchsorted(row, row, side="left")
    added = jnp.zeros_like(history.counts).at[row].add(1, mode="drop")
    last = nth >= added.at[row].get(mode="fill", fill_value=0) - length
    before = history.counts.at[row].get(mode="fill", fill_value=0)
    slot = (before + nth) % length
    losses = history.losses.at[jnp.where(last, row, num_steps), slot].set(
        loss, mode="drop"
    )
    return History(losses, history.counts + added)


def probabilities(history: History, *, uniform: float = 0.001) -> jax.Array:
    """Returns the p_t that make the estimate of a bound least noisy, [T].

    p_t is proportional to sqrt(E[L_t^2]) over the history (Eq. 18, Nichol and Dhariwal
    2021), mixed with a share of the uniform distribution. It is uniform until every
    t has a full history, and where all losses are 0.

    Args:
      history: the losses so far, whose entry t - 1 is that of t.
      uniform: the share of the uniform distribution. With 0, a t whose losses were
        all 0 is never drawn again.

    Raises:
      ValueError: uniform is not in [0, 1].

    >>> t = jnp.array([1, 2])
    >>> past = record(history(2, length=1), t, jnp.array([1.0, 3.0]))
    >>> print(probabilities(past, uniform=0.0))
    [0.25 0.75]
    """
    if not 0 <= uniform <= 1:
        raise ValueError(
            f"uniform must be in [0, 1], a share; got {uniform}. The usual value is "
            "0.001."
        )
    num_steps, length = history.losses.shape
    top = jnp.abs(history.losses).max()
    some = top > 0
    # The largest loss is taken out first: its square could overflow.
    size = jnp.square(history.losses / jnp.where(some, top, 1.0)).mean(axis=1)
    known = jnp.sqrt(jnp.where(some, size, 1.0))
    mixed = (1 - uniform) * known / known.sum() + uniform / num_steps
    ready = (history.counts >= length).all()
    return jnp.where(ready, mixed, jnp.full_like(mixed, 1 / num_steps))


def importance(u: jax.Array, probabilities: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Returns times drawn from these probabilities, and the weights that undo it.

    t is the inverse distribution function of p at u, and the weight 1 / (T p_t), so
    that the mean of weight L_t is that of L_t over uniform t (Eq. 18, Nichol and
    Dhariwal 2021). The sums of p are rounded, so that in float32 each t has its p_t to
    within 3e-7; the weight is that of the share it has.

    Args:
      u: numbers in [0, 1), [B].
      probabilities: p_t, [T], entry t - 1 that of t. A t with p_t = 0 is not drawn.

    Returns:
      The times, integers in 1..T, and the weights, both [B].

    >>> t, weight = importance(jnp.array([0.2, 0.3]), jnp.array([0.25, 0.75]))
    >>> print(t, weight.round(4))
    [1 2] [2.     0.6667]
    """
    p = jnp.asarray(probabilities)
    # A parallel sum may fall, or rise where p is 0, by a rounding: the maximum of what
    # has a p of its own does neither.
    up_to = jax.lax.cummax(jnp.where(p > 0, jnp.cumsum(p), 0.0))
    # u times the whole is below the whole also when rounded, as in `steps`: the
    # search ends within the table whatever the table adds up to.
    index = jnp.searchsorted(up_to, u * up_to[-1], side="right")
    share = jnp.diff(up_to, prepend=0.0)[index] / up_to[-1]
    return 1 + index.astype(int), 1 / (len(p) * share)


def _draw(key: jax.Array) -> jax.Array:
    # By hand, for float32 and float64 alike: 23 bits and the half of the next, which
    # float32 holds exactly.
    bits = jax.random.bits(key, dtype=jnp.uint32) >> 9
    return (bits.astype(jnp.result_type(float)) + 0.5) * 2.0**-23


def _normal(u: jax.Array, mean: float, std: float) -> jax.Array:
    check_positive("std", std, "Use a fixed time where nothing is drawn.")
    u = jnp.asarray(u, jnp.result_type(float))
    edge = jnp.finfo(u.dtype).eps / 2
    return mean + std * jax.scipy.special.ndtri(jnp.clip(u, edge, 1 - edge))


def _within(position: ArrayLike, batch_size: int) -> jax.Array:
    if batch_size < 1:
        raise ValueError(
            f"batch_size must be at least 1; got {batch_size}. Give that of the global "
            "batch."
        )
    hint = "Positions are those in the global batch."
    check_range("position", position, 0, batch_size - 1, hint)
    return jnp.asarray(position)
