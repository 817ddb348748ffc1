"""Continuous noise schedules, and conversion between discrete and continuous time.

A continuous schedule takes t in [0, 1] and, like a discrete one, is a pytree. Its
levels stay finite at t = 0 but for logsnr = +inf where no noise is left.
`interpolate` makes a discrete schedule continuous, `discretize` a continuous one
discrete, so that a network trained in one kind of time can be used in the other;
`shifted` makes either noisier or cleaner.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.schedule import (
    NoiseLevel,
    Schedule,
    Timed,
    check_num_steps,
    from_tables,
    is_discrete,
    preserving,
    real_time,
    tables,
    timed,
)


def vp(*, beta_min: float = 0.1, beta_max: float = 20.0) -> Timed:
    """Returns the continuous variance-preserving schedule (Eq. 33, Song et al. 2021).

    log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2, t in [0, 1]: the
    limit of `linear(T, beta_start=beta_min / T, beta_end=beta_max / T)`.

    >>> print(f"{vp()(1.0).alpha:.5f}")
    0.00657
    """
    _check_ends("beta_min", beta_min, "beta_max", beta_max, "0.1 and 20")
    return Timed(_vp, (beta_min, beta_max))


def sub_vp(*, beta_min: float = 0.1, beta_max: float = 20.0) -> Timed:
    """Returns the continuous sub-VP schedule (Eq. 29, Song et al. 2021).

    alpha as in `vp`, and sigma = 1 - alpha^2 in the place of its square root.

    >>> level = sub_vp()(0.5)
    >>> print(f"{level.alpha**2 + level.sigma:.5f}")
    1.00000
    """
    _check_ends("beta_min", beta_min, "beta_max", beta_max, "0.1 and 20")
    return Timed(_sub_vp, (beta_min, beta_max))


def ve(*, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Timed:
    """Returns the continuous variance-exploding schedule (Eq. 31, Song et al. 2021).

    alpha = 1 and sigma(t) = sigma_min (sigma_max / sigma_min)^t, t in [0, 1]. Data
    are at sigma_min: t = 0 still has that noise. Chains start from sigma_max N(0, I),
    which `samplers.sample` is told by `start_std`.

    >>> print(f"{ve()(0.5).sigma:.5f}")
    0.70711
    """
    _check_ends("sigma_min", sigma_min, "sigma_max", sigma_max, "0.01 and 50")
    return Timed(_ve, (sigma_min, sigma_max))


def cosine(*, logsnr_min: float = -15.0, logsnr_max: float = 15.0) -> Timed:
    """Returns the continuous cosine schedule (Sec. 3.1, Hoogeboom et al. 2023).

    logsnr = -2 log tan(angle), where the angle goes evenly from that of logsnr_max at
    t = 0 to that of logsnr_min at t = 1: alpha = cos(angle), sigma = sin(angle). The
    whole quarter circle, angle = pi t / 2, would be infinite at both ends. t = 0
    still has the noise of logsnr_max; see `discretize` for chains that end in data.

    >>> print(f"{cosine()(0.0).logsnr:.4f} {cosine()(0.75).logsnr:.4f}")
    15.0000 -1.7612
    """
    if not logsnr_min < logsnr_max:
        raise ValueError(
            "logsnr_min must be below logsnr_max; got "
            f"{logsnr_min} and {logsnr_max}. The usual values are -15 and 15."
        )
    return Timed(_cosine, (logsnr_min, logsnr_max))


def flow(*, alpha_min: float = 1e-4) -> Timed:
    """Returns the schedule of rectified flow (Liu et al. 2022).

    alpha = 1 - (1 - alpha_min) t and sigma = t: a straight line from data to noise, in
    which alpha_min of the data is left. With alpha_min = 0, as in the paper, log alpha
    and its slope at t = 1 would be infinite; this line, Eq. 22 of Lipman et al. 2022
    with data and noise exchanged, is finite in both from there to t = 0, and at most
    alpha_min away from the paper's. It does not preserve variance.

    Args:
      alpha_min: of the data at t = 1. Much smaller, and in float32 the field of
        `sde.flow` there, -(1 - alpha_min) x0 + eps as anywhere, loses its digits: it
        is a difference of numbers 1 / alpha_min times its size.

    >>> level = flow()(0.25)
    >>> print(f"{level.alpha:.4f} {level.sigma:.4f}")
    0.7500 0.2500
    """
    if not 0 < alpha_min < 1:
        raise ValueError(
            f"alpha_min must be above 0 and below 1; got {alpha_min}. The usual value "
            "is 1e-4."
        )
    return Timed(_flow, (alpha_min,))


def shifted(schedule: Schedule, nats: ArrayLike) -> Timed:
    """Returns the schedule with `nats` added to its log-SNR at every time.

    logsnr'(t) = logsnr(t) + nats, and variance preserved. Images of d pixels a side
    look as clean as those of 64 with nats = 2 log(64 / d), below 0 for larger ones:
    averaging d / 64 pixels a side has divided the noise by as much (Sec. 3.1,
    Hoogeboom et al. 2023, "simple diffusion"). Data without noise stay so.

    Args:
      schedule: discrete or continuous, and variance-preserving.
      nats: how far, positive for less noise.

    Returns:
      A schedule in the same unit of time, discrete where it was.

    Raises:
      ValueError: the schedule is not variance-preserving, or nats is not one finite
        number.

    >>> import math
    >>> large = shifted(cosine(), 2 * math.log(64 / 256))
    >>> print(f"{large(0.5).logsnr:.4f}")
    -2.7726
    """
    known = None if isinstance(nats, jax.core.Tracer) else np.asarray(nats)
    if np.ndim(nats) != 0 or (known is not None and not np.isfinite(known)):
        raise ValueError(
            f"nats must be one finite number; got {nats}. Images of 256 pixels a side "
            "have 2 log(64 / 256)."
        )
    if not _traced(schedule):
        share = np.array([0.25, 0.5, 0.75, 1.0])
        if is_discrete(schedule):
            levels = [np.asarray(table)[1:] for table in tables(schedule)]
        else:
            levels = _known(schedule, share * last_time(schedule))
        _check_preserving(levels, "Shift vp, cosine or a discrete schedule.")
    if not is_discrete(schedule):
        steps = timed(schedule).steps
        return Timed(_shifted, (schedule, nats), steps, inverse=_shifted_time)
    table = tables(schedule)[1]
    if known is None or _traced(schedule):
        real = jnp.result_type(float)
        return from_tables(*preserving(jnp.asarray(table, real) + nats))
    moved = np.asarray(table, np.float64) + known
    return from_tables(-0.5 * np.logaddexp(0, -moved), moved)


def interpolate(schedule: Schedule) -> Timed:
    """Returns a discrete schedule at real times, still in steps: t in [0, T].

    beta stays constant within a step, so log alpha is linear in t between the whole
    numbers, where the levels are those of the discrete schedule. A network trained on
    that schedule becomes one in continuous time: it is fed t - 1, no longer whole.

    Args:
      schedule: a discrete schedule that preserves variance, as all do but those
        discretized from `ve`, `sub_vp` or `flow`.

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
        known = [np.asarray(table)[1:] for table in (log_alpha, logsnr)]
        _check_preserving(known, "Use the continuous schedule that it was made from.")
    steps = np.shape(log_alpha)[0] - 1
    return Timed(_interpolated, (log_alpha, rise), steps, inverse=_interpolated_time)


def discretize(
    schedule: Schedule, num_steps: int = 1000, *, clean: bool = False
) -> Timed:
    """Returns the discrete schedule with the levels of a continuous one at t / T.

    For a network trained in continuous time: give `gaussian.denoiser` the function
    `lambda x, t: apply_fn(x, t / T)` and time_shift=0.

    Args:
      schedule: a continuous schedule, t in [0, 1]. Its parameters may be traced (a
        learned one under `jit`): then the tables are, in the default floating-point
        type, and have gradients. Where t = 0 has no noise its log-SNR is infinite and
        they have none: say clean=True.
      num_steps: T.
      clean: whether t = 0 is data, alpha = 1 without noise, whatever noise the
        schedule leaves there: then samplers end in clean data, and the last step of
        the bound is a decoder.

    >>> print(abs(discretize(vp(), 100)(50).logsnr - vp()(0.5).logsnr) < 1e-4)
    True
    >>> print(f"{discretize(ve(), 100)(0).sigma:.4f}")
    0.0100
    >>> print(discretize(ve(), 100, clean=True)(0).sigma)
    0.0
    """
    check_num_steps(num_steps)
    # The level of clean data is not asked for: its gradient may be nan.
    times = np.arange(1 if clean else 0, num_steps + 1) / num_steps
    xp: Any = jnp if _traced(schedule) else np
    levels = schedule(times) if xp is jnp else _known(schedule, times)
    fields = xp.broadcast_arrays(*levels)
    if clean:
        fields = [xp.append(a, b) for a, b in zip((0.0, np.inf), fields, strict=True)]
    return from_tables(*(xp.array(field) for field in fields))


def last_time(schedule: Schedule) -> float:
    """Returns the time of pure noise: T where times count steps, otherwise 1.

    Raises:
      ValueError: the schedule does not say what its times are, here and below.

    >>> from diffusion_jax import schedule
    >>> last_time(schedule.linear(250)), last_time(vp())
    (250, 1.0)
    """
    return timed(schedule).last


def counts_steps(schedule: Schedule) -> bool:
    """Returns whether times are steps, in 0..T: discrete or interpolated schedules."""
    return timed(schedule).steps is not None


def time_of(
    schedule: Schedule, logsnr: ArrayLike, *, beyond: bool = False
) -> jax.Array:
    """Returns the time at which the schedule has this log-SNR, of the same shape.

    The nearest whole step of a discrete schedule, the inverse of an interpolated one;
    else by bisection to the last digit, which has no derivative.
    A log-SNR beyond the ends gives the end.

    Args:
      schedule: any that says what its times are.
      logsnr: in nats, of any shape.
      beyond: whether to look for it up to twice the last time, where bisection looks
        and the formula goes on: of `ve`, `vp` and `sub_vp`.

    >>> from diffusion_jax import schedule
    >>> lin = schedule.linear(1000)
    >>> print(time_of(lin, lin(300).logsnr), time_of(vp(), vp()(0.25).logsnr))
    300 0.25
    """
    logsnr = jnp.asarray(logsnr, jnp.result_type(float))
    if is_discrete(schedule):
        table = jnp.asarray(tables(schedule)[1], logsnr.dtype)
        # Ascending, to be searched; t = 0, at infinity, is never the nearest.
        after = jnp.searchsorted(-table, -logsnr, method="compare_all")
        below, above = (jnp.clip(after - d, 0, len(table) - 1) for d in (1, 0))
        nearer = jnp.abs(table[below] - logsnr) < jnp.abs(table[above] - logsnr)
        return jnp.where(nearer, below, above)

    known = timed(schedule)
    if known.inverse is not None:
        return known.inverse(*known.args, logsnr)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        noisier = schedule(middle).logsnr < logsnr
        return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

    low = jnp.zeros_like(logsnr)
    high = jnp.full_like(logsnr, known.last)
    if beyond:
        after = jax.jit(schedule)(2 * known.last).logsnr  # not refused, being traced
        high = jnp.where(jnp.isfinite(after), 2 * high, high)
    ends = low, high
    low, high = jax.lax.fori_loop(0, jnp.finfo(logsnr.dtype).nmant + 2, halve, ends)
    return 0.5 * (low + high)


def _traced(schedule: Schedule) -> bool:
    leaves = jax.tree.leaves(schedule)
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def _known(schedule: Schedule, t: np.ndarray) -> list[np.ndarray]:
    """Returns log_alpha and logsnr in float64, whatever the caller computes in."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return [np.asarray(field, np.float64) for field in schedule(t)]


def _check_preserving(levels: list[np.ndarray], hint: str) -> None:
    log_alpha, logsnr = levels
    with np.errstate(divide="ignore"):
        rest = 2 * log_alpha - np.log(-np.expm1(2 * log_alpha)) - logsnr
    if not np.all(np.abs(rest) < 1e-3):
        raise ValueError(
            "schedule must preserve variance, alpha^2 + sigma^2 = 1; got one whose "
            f"log-SNR is off by up to {np.abs(rest).max():g}. {hint}"
        )


def _vp(beta_min: ArrayLike, beta_max: ArrayLike, t: ArrayLike) -> NoiseLevel:
    log_alpha = _vp_log_alpha(beta_min, beta_max, t)
    return NoiseLevel(log_alpha, _preserving(log_alpha))


def _sub_vp(beta_min: ArrayLike, beta_max: ArrayLike, t: ArrayLike) -> NoiseLevel:
    log_alpha = _vp_log_alpha(beta_min, beta_max, t)
    return NoiseLevel(log_alpha, 2 * log_alpha - 2 * jnp.log(-jnp.expm1(2 * log_alpha)))


def _ve(sigma_min: ArrayLike, sigma_max: ArrayLike, t: ArrayLike) -> NoiseLevel:
    t = real_time(t)
    low, high = jnp.log(sigma_min), jnp.log(sigma_max)
    return NoiseLevel(jnp.zeros_like(t), -2 * (low + t * (high - low)))


def _cosine(logsnr_min: ArrayLike, logsnr_max: ArrayLike, t: ArrayLike) -> NoiseLevel:
    t = real_time(t)
    # The angle from data and the one from noise, each a sum of positive numbers: the
    # tangent of an angle near pi / 2 would have lost its digits.
    data, noise = (
        jnp.arctan(jnp.exp(-0.5 * jnp.asarray(end, t.dtype)))
        for end in (logsnr_max, jnp.negative(logsnr_min))
    )
    arc = 0.5 * np.pi - data - noise
    angle, rest = data + t * arc, noise + (1 - t) * arc
    return preserving(2 * (jnp.log(jnp.sin(rest)) - jnp.log(jnp.sin(angle))))


def _flow(alpha_min: ArrayLike, t: ArrayLike) -> NoiseLevel:
    t = real_time(t)
    # 1 - t is exact from 1/2 on, where alpha is small; below, log1p keeps the digits.
    log_alpha = jnp.where(
        t < 0.5,
        jnp.log1p(-t * jnp.subtract(1, alpha_min)),
        jnp.log(1 - t + t * alpha_min),
    )
    return NoiseLevel(log_alpha, 2 * (log_alpha - jnp.log(t)))


def _shifted(schedule: Schedule, nats: ArrayLike, t: ArrayLike) -> NoiseLevel:
    return preserving(schedule(t).logsnr + nats)


def _shifted_time(schedule: Schedule, nats: ArrayLike, logsnr: jax.Array) -> jax.Array:
    return time_of(schedule, logsnr - nats)


def _interpolated(table: ArrayLike, rise: ArrayLike, t: ArrayLike) -> NoiseLevel:
    last = np.shape(table)[0] - 1
    t = real_time(t, last)
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
    t = real_time(t)
    return -0.25 * t**2 * jnp.subtract(beta_max, beta_min) - 0.5 * t * beta_min


def _preserving(log_alpha: jax.Array) -> jax.Array:
    """Returns the log-SNR where alpha^2 + sigma^2 = 1."""
    return 2 * log_alpha - jnp.log(-jnp.expm1(2 * log_alpha))


def _check_ends(low: str, least: float, high: str, most: float, usual: str) -> None:
    if not 0 < least <= most:
        raise ValueError(
            f"{low} must be above 0 and at most {high}; got {least} and {most}. The "
            f"usual values are {usual}."
        )
