"""Continuous noise schedules, and the way between discrete and continuous time.

A continuous schedule takes t in [0, 1] and, like a discrete one, is a pytree. Its
levels stay finite at t = 0 but for logsnr = +inf where no noise is left.
`interpolate` makes a discrete schedule continuous, `discretize` a continuous one
discrete, so that a network trained in one kind of time can be used in the other.
"""

from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from diffusion_jax.schedule import (
    NoiseLevel,
    Schedule,
    check_num_steps,
    from_tables,
    is_discrete,
    num_steps,
    tables,
)


def vp(*, beta_min: float = 0.1, beta_max: float = 20.0) -> Partial:
    """Returns the continuous variance-preserving schedule (Eq. 33, Song et al. 2021).

    log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2, t in [0, 1]: the
    limit of `linear(T, beta_start=beta_min / T, beta_end=beta_max / T)`.

    >>> print(f"{vp()(1.0).alpha:.5f}")
    0.00657
    """
    _check_ends("beta_min", beta_min, "beta_max", beta_max, "0.1 and 20")
    return Partial(_vp, beta_min, beta_max)


def sub_vp(*, beta_min: float = 0.1, beta_max: float = 20.0) -> Partial:
    """Returns the continuous sub-VP schedule (Eq. 29, Song et al. 2021).

    alpha as in `vp`, and sigma = 1 - alpha^2 in the place of its square root.

    >>> level = sub_vp()(0.5)
    >>> print(f"{level.alpha**2 + level.sigma:.5f}")
    1.00000
    """
    _check_ends("beta_min", beta_min, "beta_max", beta_max, "0.1 and 20")
    return Partial(_sub_vp, beta_min, beta_max)


def ve(*, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Partial:
    """Returns the continuous variance-exploding schedule (Eq. 31, Song et al. 2021).

    alpha = 1 and sigma(t) = sigma_min (sigma_max / sigma_min)^t, t in [0, 1]. Data
    are at sigma_min: t = 0 still has that noise. Chains start from sigma_max N(0, I),
    which `samplers.sample` is told by `start_std`.

    >>> print(f"{ve()(0.5).sigma:.5f}")
    0.70711
    """
    _check_ends("sigma_min", sigma_min, "sigma_max", sigma_max, "0.01 and 50")
    return Partial(_ve, sigma_min, sigma_max)


def interpolate(schedule: Schedule) -> Partial:
    """Returns a discrete schedule at real times, still in steps: t in [0, T].

    beta stays constant within a step, so log alpha is linear in t between the whole
    numbers, where the levels are those of the discrete schedule. A network trained on
    that schedule becomes one in continuous time: it is fed t - 1, no longer whole.

    Args:
      schedule: a discrete schedule that preserves variance, as all but those of
        `discretize` do.

    >>> from diffusion_jax import schedule
    >>> lin = schedule.linear(1000)
    >>> print(abs(interpolate(lin)(10.0).logsnr - lin(10).logsnr) < 1e-4)
    True
    """
    log_alpha, logsnr = tables(schedule)
    # From the table in double precision, where it is known: of two float32 neighbours
    # the difference has four digits left.
    rise: ArrayLike
    if isinstance(log_alpha, jax.core.Tracer):
        rise = jnp.diff(log_alpha)
    else:
        rise = np.diff(log_alpha)
        known = np.asarray(log_alpha)[1:]
        with np.errstate(divide="ignore"):
            preserving = 2 * known - np.log(-np.expm1(2 * known))
        rest = preserving - np.asarray(logsnr)[1:]
        if not np.all(np.abs(rest) < 1e-3):
            raise ValueError(
                "schedule must preserve variance, alpha^2 + sigma^2 = 1; got one whose "
                f"log-SNR is off by up to {np.abs(rest).max():g}. Use the continuous "
                "schedule that it was made from."
            )
    return Partial(_interpolated, log_alpha, rise)


def discretize(schedule: Schedule, num_steps: int = 1000) -> Partial:
    """Returns the discrete schedule with the levels of a continuous one at t / T.

    For a network trained in continuous time: give `gaussian.denoiser` the function
    `lambda x, t: apply_fn(x, t / T)` and time_shift=0.

    Args:
      schedule: a continuous schedule, t in [0, 1].
      num_steps: T.

    >>> print(abs(discretize(vp(), 100)(50).logsnr - vp()(0.5).logsnr) < 1e-4)
    True
    """
    check_num_steps(num_steps)
    # In float64 whatever the caller computes in: this is a table.
    with jax.enable_x64(True):
        level = schedule(np.arange(num_steps + 1) / num_steps)
        log_alpha, logsnr = (np.asarray(field, np.float64) for field in level)
    return from_tables(np.broadcast_to(log_alpha, logsnr.shape).copy(), logsnr)


def last_time(schedule: Schedule) -> float:
    """Returns the time of pure noise: T where times count steps, otherwise 1.

    >>> from diffusion_jax import schedule
    >>> last_time(schedule.linear(250)), last_time(vp())
    (250, 1.0)
    """
    if _is_interpolated(schedule):
        return np.shape(schedule.args[0])[0] - 1
    return num_steps(schedule) if is_discrete(schedule) else 1.0


def counts_steps(schedule: Schedule) -> bool:
    """Returns whether times are steps, in 0..T: discrete or interpolated schedules."""
    return is_discrete(schedule) or _is_interpolated(schedule)


def time_of(schedule: Schedule, logsnr: ArrayLike) -> jax.Array:
    """Returns the time at which the schedule has this log-SNR, of the same shape.

    The nearest whole step of a discrete schedule, the inverse of an interpolated one;
    else by bisection to the last digit, which has no derivative.
    A log-SNR beyond the ends gives the end.

    >>> from diffusion_jax import schedule
    >>> lin = schedule.linear(1000)
    >>> print(time_of(lin, lin(300).logsnr), time_of(vp(), vp()(0.25).logsnr))
    300 0.25
    """
    logsnr = jnp.asarray(logsnr)
    if is_discrete(schedule):
        table = jnp.asarray(tables(schedule)[1], logsnr.dtype)
        # Ascending, to be searched; t = 0, at infinity, is never the nearest.
        after = jnp.searchsorted(-table, -logsnr, method="compare_all")
        below, above = (jnp.clip(after - d, 0, len(table) - 1) for d in (1, 0))
        nearer = jnp.abs(table[below] - logsnr) < jnp.abs(table[above] - logsnr)
        return jnp.where(nearer, below, above)

    if _is_interpolated(schedule):
        table, rise = schedule.args
        return _interpolated_time(table, rise, logsnr)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        noisier = schedule(middle).logsnr < logsnr
        return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

    low = jnp.zeros_like(logsnr)
    ends = low, jnp.full_like(logsnr, last_time(schedule))
    low, high = jax.lax.fori_loop(0, jnp.finfo(logsnr.dtype).nmant + 2, halve, ends)
    return 0.5 * (low + high)


def _is_interpolated(schedule: Schedule) -> TypeGuard[Partial]:
    return isinstance(schedule, Partial) and schedule.func is _interpolated


def _vp(beta_min: ArrayLike, beta_max: ArrayLike, t: ArrayLike) -> NoiseLevel:
    log_alpha = _vp_log_alpha(beta_min, beta_max, t)
    return NoiseLevel(log_alpha, _preserving(log_alpha))


def _sub_vp(beta_min: ArrayLike, beta_max: ArrayLike, t: ArrayLike) -> NoiseLevel:
    log_alpha = _vp_log_alpha(beta_min, beta_max, t)
    return NoiseLevel(log_alpha, 2 * log_alpha - 2 * jnp.log(-jnp.expm1(2 * log_alpha)))


def _ve(sigma_min: ArrayLike, sigma_max: ArrayLike, t: ArrayLike) -> NoiseLevel:
    t = _real(t, 1)
    low, high = jnp.log(sigma_min), jnp.log(sigma_max)
    return NoiseLevel(jnp.zeros_like(t), -2 * (low + t * (high - low)))


def _interpolated(table: ArrayLike, rise: ArrayLike, t: ArrayLike) -> NoiseLevel:
    last = np.shape(table)[0] - 1
    t = _real(t, last)
    # The step that t is in, and how far: the derivative in t is that of the line.
    step = jnp.clip(jnp.floor(jax.lax.stop_gradient(t)), 0, last - 1)
    index, share = step.astype(int), t - step
    # Cast by hand: JAX remembers how it cast a constant, in another precision too.
    table, rise = (jnp.asarray(a, t.dtype) for a in (table, rise))
    log_alpha = table[index] + share * rise[index]
    return NoiseLevel(log_alpha, _preserving(log_alpha))


def _interpolated_time(
    table: ArrayLike, rise: ArrayLike, logsnr: jax.Array
) -> jax.Array:
    log_alpha = 0.5 * jax.nn.log_sigmoid(logsnr)
    table, rise = (jnp.asarray(a, logsnr.dtype) for a in (table, rise))
    index = jnp.searchsorted(-table, -log_alpha, side="right") - 1
    index = jnp.clip(index, 0, len(rise) - 1)
    return index + jnp.clip((log_alpha - table[index]) / rise[index], 0, 1)


def _vp_log_alpha(beta_min: ArrayLike, beta_max: ArrayLike, t: ArrayLike) -> jax.Array:
    t = _real(t, 1)
    return -0.25 * t**2 * jnp.subtract(beta_max, beta_min) - 0.5 * t * beta_min


def _preserving(log_alpha: jax.Array) -> jax.Array:
    """Returns the log-SNR where alpha^2 + sigma^2 = 1."""
    return 2 * log_alpha - jnp.log(-jnp.expm1(2 * log_alpha))


def _real(t: ArrayLike, last: float) -> jax.Array:
    if not isinstance(t, jax.core.Tracer):
        known = np.asarray(t)
        if known.size and not (known.min() >= 0 and known.max() <= last):
            raise ValueError(
                f"t of a continuous schedule must be in [0, {last}]; got values from "
                f"{known.min()} to {known.max()}. 0 is data and {last} is noise."
            )
    return jnp.asarray(t, dtype=jnp.result_type(float))


def _check_ends(low: str, least: float, high: str, most: float, usual: str) -> None:
    if not 0 < least <= most:
        raise ValueError(
            f"{low} must be above 0 and at most {high}; got {least} and {most}. The "
            f"usual values are {usual}."
        )
