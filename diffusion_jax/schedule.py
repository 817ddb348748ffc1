"""Noise schedules: functions from a time to the noise level at that time.

A level is all that most of the library knows of a schedule:

    x_t = alpha_t x0 + sigma_t eps,    eps ~ N(0, I)

Any function from t to a level will do for that. What asks for more (the last time, or
whether times count steps) needs a `Timed`, which says so itself, as all schedules of
this library are.

Discrete schedules take integer t in {0, ..., T}, where t = 0 is data. Schedules are
pytrees (a discrete one over two tables), so they pass through `jit` as arguments and
another set of betas does not retrace. Continuous schedules, t in [0, 1], are in
`continuous`. Tables are built in NumPy float64 and cast once, where they are used: a
float32 cumulative product is wrong by 1.7e-4 in 1 - alpha_bar.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# What log(alpha) becomes where a schedule ends in pure noise (alpha_bar = 0, as
# `jsd` does). Finite, so that sigma = exp(log_alpha - logsnr / 2) is exactly 1
# instead of nan, and so small that alpha x0 vanishes beside sigma eps in float64.
PURE_NOISE_LOG_ALPHA = -40.0
# Below this log-SNR a level counts as pure noise: of alpha x0 nothing is left in x_t.
PURE_NOISE = -60.0


class NoiseLevel(NamedTuple):
    """How much signal and how much noise: x_t = alpha x0 + sigma eps.

    Both fields have the shape of the time they were made from (usually [B]) and stay
    finite where it matters: sigma = 0 is logsnr = +inf, a variance-exploding level is
    log_alpha = 0.
    """

    log_alpha: jax.Array
    """Natural logarithm of alpha."""
    logsnr: jax.Array
    """2 (log alpha - log sigma), in nats; +inf at t = 0."""

    @property
    def alpha(self) -> jax.Array:
        """Returns the signal coefficient, sqrt(alpha_bar) in DDPM."""
        return jnp.exp(self.log_alpha)

    @property
    def sigma(self) -> jax.Array:
        """Returns the noise coefficient, sqrt(1 - alpha_bar) in DDPM."""
        return jnp.exp(self.log_alpha - 0.5 * self.logsnr)

    def like(self, x: jax.Array) -> "NoiseLevel":
        """Returns the level with trailing axes of size one, to multiply x [B, ...].

        The one place where a level meets an image: rank promotion stays off
        everywhere else.

        Raises:
          ValueError: x are whole numbers.
        """
        _check_real(x)
        return NoiseLevel(*(widened(jnp.asarray(field), x) for field in self))


Schedule = Callable[[ArrayLike], NoiseLevel]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["args"],
    meta_fields=["function", "steps", "whole", "inverse"],
)
@dataclass(frozen=True, eq=False)
class Timed:
    """A schedule that knows its unit of time: a function, its parameters, the unit.

    A schedule of one's own over [0, 1] is `Timed(function)`, or `Timed(function,
    parameters)` for one with parameters to differentiate or to pass through `jit`. A
    discrete one is tabulated: `from_tables(*function(np.arange(T + 1)))`.

    >>> own = Timed(lambda steepness, t: preserving(steepness * (0.5 - t)), (20.0,))
    >>> print(f"{own(0.25).logsnr:.1f}", own.last)
    5.0 1.0
    """

    function: Callable[..., NoiseLevel]
    """Called with `args` and t."""
    args: tuple[Any, ...] = ()
    """The parameters: arrays, numbers or schedules."""
    steps: int | None = None
    """T where times count steps, in [0, T]; None where they are in [0, 1]."""
    whole: bool = False
    """Whether times must be whole numbers; then `args` are the tables."""
    inverse: Callable[..., jax.Array] | None = None
    """Called with `args` and a log-SNR: its time. None: found by bisection."""

    def __call__(self, t: ArrayLike) -> NoiseLevel:
        """Returns the level at time t, of the shape of t."""
        return self.function(*self.args, t)

    @property
    def last(self) -> float:
        """The time of pure noise: T where times count steps, otherwise 1."""
        return 1.0 if self.steps is None else self.steps


def timed(schedule: Schedule) -> Timed:
    """Returns the schedule, after a check that it says what its times are.

    Raises:
      ValueError: it does not. A function around a schedule (a lambda, `jax.jit`,
        `functools.partial`) hides the unit of time, and a wrong guess would feed the
        network a wrong time.

    >>> timed(jax.jit(linear(10)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: schedule must say what its times are; got <PjitFunction...
    """
    if not isinstance(schedule, Timed):
        raise ValueError(
            f"schedule must say what its times are; got {schedule!r}. Give the "
            "schedule itself; or, for a function f of your own, Timed(f) if t is in "
            "[0, 1], and from_tables(*f(np.arange(T + 1))) if it counts T steps."
        )
    return schedule


def linear(
    num_steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Timed:
    """Returns the schedule of the paper: betas evenly spaced (Sec. 4, Ho et al. 2020).

    The ends are those of T = 1000 and do not change with num_steps: a chain of fewer
    steps ends in noise only if both are multiplied by 1000 / num_steps.

    Args:
      num_steps: T, the number of diffusion steps.
      beta_start: variance of the first step.
      beta_end: variance of the last step.

    Returns:
      A discrete schedule, t in {0, ..., T}.

    >>> level = linear(1000)(jnp.array([0, 1000]))
    >>> print(level.alpha.round(5), level.sigma.round(5))
    [1.      0.00635] [0.      0.99998]
    """
    check_num_steps(num_steps)
    return from_betas(np.linspace(beta_start, beta_end, num_steps))


def quad(
    num_steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Timed:
    """Returns the schedule whose sqrt(beta) is evenly spaced (official code)."""
    check_num_steps(num_steps)
    roots = np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), num_steps)
    return from_betas(roots**2)


def const(num_steps: int = 1000, *, beta: float = 0.02) -> Timed:
    """Returns the schedule with the same beta at every step (official code)."""
    check_num_steps(num_steps)
    return from_betas(np.full(num_steps, beta, np.float64))


def jsd(num_steps: int = 1000) -> Timed:
    """Returns betas 1/T, 1/(T-1), ..., 1 (official code; Sohl-Dickstein et al. 2015).

    alpha_bar falls in a straight line and the last level is pure noise.
    """
    check_num_steps(num_steps)
    return from_betas(1.0 / np.linspace(num_steps, 1, num_steps))


def warmup(
    num_steps: int = 1000,
    *,
    fraction: float = 0.1,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Timed:
    """Returns betas that rise over the first `fraction` of steps, then stay.

    `warmup10` and `warmup50` of the official code are fractions 0.1 and 0.5.
    """
    check_num_steps(num_steps)
    if not 0.0 < fraction <= 1.0:
        raise ValueError(
            f"fraction must be above 0 and at most 1; got {fraction}. "
            "Give the share of the steps over which beta rises, such as 0.1."
        )
    rise = int(num_steps * fraction)
    betas = np.full(num_steps, beta_end, np.float64)
    betas[:rise] = np.linspace(beta_start, beta_end, rise)
    return from_betas(betas)


def cosine(
    num_steps: int = 1000, *, offset: float = 0.008, max_beta: float = 0.999
) -> Timed:
    """Returns the cosine schedule (Eq. 17, Nichol and Dhariwal 2021).

    alpha_bar(t) = cos^2(pi/2 (t/T + offset) / (1 + offset)), each beta at most
    max_beta, which keeps the last step from being singular.
    """
    check_num_steps(num_steps)
    phase = (np.arange(num_steps + 1) / num_steps + offset) / (1 + offset)
    alpha_bar = np.cos(0.5 * np.pi * phase) ** 2
    return from_betas(np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta))


def sigmoid(
    num_steps: int = 1000,
    *,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
) -> Timed:
    """Returns the sigmoid schedule (Jabri et al. 2022; Sec. 2.1, Chen 2023).

    alpha_bar(t) = (s(end) - s(v)) / (s(end) - s(start)) with v = start + (end - start)
    t/T and s(v) = 1 / (1 + exp(-v / tau)), each beta at most max_beta, as in `cosine`.

    Args:
      num_steps: T, the number of diffusion steps.
      start: where on the sigmoid the data are.
      end: where the noise is. The stretch -3..3 is for small images; moved up (0..3)
        it leaves more noise at every step, for large ones.
      tau: temperature: the smaller, the faster alpha_bar falls, around where v = 0.
      max_beta: the most that a step may add; the last one would be 1.

    Raises:
      ValueError: start is not below end, or tau not above 0.

    >>> print(f"{sigmoid(1000)(500).alpha ** 2:.4f}")
    0.5000
    """
    check_num_steps(num_steps)
    if not (start < end and tau > 0):
        raise ValueError(
            "start must be below end, and tau above 0; got start "
            f"{start}, end {end}, tau {tau}. The paper's are -3, 3 and 1."
        )
    v = (start + (end - start) * np.arange(num_steps + 1) / num_steps) / (2 * tau)
    # s(a) - s(b) = sinh((a - b) / 2) / (2 cosh(a / 2) cosh(b / 2)): at a low
    # temperature the first betas are far smaller than the rounding of alpha_bar.
    fall = np.sinh(np.diff(v)) / np.cosh(v[1:])
    left = np.sinh(v[-1] - v[:-1]) / np.cosh(v[-1])
    return from_betas(np.minimum(fall / left, max_beta))


def from_betas(betas: ArrayLike) -> Timed:
    """Returns the discrete schedule with these betas, variances of the forward steps.

    log alpha_t = 1/2 sum_{i<=t} log(1 - beta_i) (Sec. 2, Ho et al. 2020), summed in
    float64 by log1p, so that 1 - alpha_bar keeps its digits at small t.

    Args:
      betas: [T], each in (0, 1); the last may be 1.

    Returns:
      A function of integer t in {0, ..., T}. A t outside raises when it is known, and
      gives nan when it is traced.

    Raises:
      ValueError: betas are not a vector of numbers in (0, 1).

    >>> schedule = from_betas([0.1, 0.5])
    >>> print(f"{schedule(2).alpha ** 2:.4f}")
    0.4500
    """
    betas = np.asarray(betas, np.float64)
    inside = (betas > 0) & (betas < 1)
    vector = betas.ndim == 1 and betas.size > 0
    if not (vector and np.all(inside[:-1]) and 0 < betas[-1] <= 1):
        got = f"shape {betas.shape}"
        if vector:
            got += f" with values from {betas.min():g} to {betas.max():g}"
        raise ValueError(
            "betas must be a vector of numbers above 0 and below 1 (the last may be "
            f"1); got {got}. Check the ends of the schedule."
        )
    with np.errstate(divide="ignore"):
        log_alpha = 0.5 * np.cumsum(np.log1p(-betas))
    # -inf where the last beta is 1; anything below the level before it will do.
    last = log_alpha[-2] if betas.size > 1 else 0.0
    log_alpha[-1] = max(log_alpha[-1], last + PURE_NOISE_LOG_ALPHA)
    logsnr = 2 * log_alpha - np.log(-np.expm1(2 * log_alpha))
    return from_tables(
        np.concatenate([[0.0], log_alpha]), np.concatenate([[np.inf], logsnr])
    )


def num_steps(schedule: Schedule) -> int:
    """Returns T of a discrete schedule.

    Raises:
      ValueError: the schedule is continuous and has no number of steps, or does not
        say what its times are.

    >>> num_steps(linear(250))
    250
    """
    return np.shape(tables(schedule)[0])[0] - 1


def is_discrete(schedule: Schedule) -> bool:
    """Returns whether the times of a schedule are whole numbers.

    Raises:
      ValueError: the schedule does not say what its times are.
    """
    return timed(schedule).whole


def from_tables(log_alpha: ArrayLike, logsnr: ArrayLike) -> Timed:
    """Returns the discrete schedule with these levels for t = 0..T, each [T + 1]."""
    steps = np.shape(log_alpha)[0] - 1
    return Timed(_lookup, (log_alpha, logsnr), steps, whole=True)


def tables(schedule: Schedule) -> tuple[ArrayLike, ArrayLike]:
    """Returns log_alpha and logsnr of a discrete schedule for t = 0..T, each [T + 1].

    Raises:
      ValueError: the schedule is continuous, or does not say what its times are.
    """
    known = timed(schedule)
    if not known.whole:
        raise ValueError(
            "schedule must be discrete (linear, cosine, from_betas, ...); got "
            f"{schedule!r}. Its times are in [0, {known.last}], not whole numbers: "
            "continuous.discretize makes a discrete one of it."
        )
    return known.args[0], known.args[1]


def preserving(logsnr: jax.Array) -> NoiseLevel:
    """Returns the level with this log-SNR where variance is preserved.

    alpha^2 = sigmoid(logsnr) and sigma^2 = sigmoid(-logsnr): alpha^2 + sigma^2 = 1.

    >>> level = preserving(jnp.array(0.0))
    >>> print(f"{level.alpha**2:.4f} {level.sigma**2:.4f}")
    0.5000 0.5000
    """
    logsnr = jnp.asarray(logsnr, jnp.result_type(float))
    return NoiseLevel(0.5 * jax.nn.log_sigmoid(logsnr), logsnr)


def real_time(t: ArrayLike, last: float = 1.0) -> jax.Array:
    """Returns the times of a continuous schedule in the default floating-point type.

    Raises:
      ValueError: one is outside [0, last]. What is traced cannot be checked.

    >>> print(real_time(0.5))
    0.5
    """
    check_range("t", t, 0, last, f"0 is data and {last} is noise.")
    return jnp.asarray(t, dtype=jnp.result_type(float))


def real_data(x: ArrayLike) -> jax.Array:
    """Returns images or noise in the default floating-point type.

    Everything is computed in that, so that one key draws the same noise for images of
    every type.

    Raises:
      ValueError: they are whole numbers, which stand for 0 to 255 and not for -1 to 1.

    >>> print(real_data(np.array([0.5], np.float16)).dtype)
    float32
    """
    _check_real(x)
    return jnp.asarray(x, jnp.result_type(float))


def _check_real(x: ArrayLike) -> None:
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(
            "images must be real numbers scaled to [-1, 1]; got "
            f"{jnp.result_type(x)}. Divide values of 0 to 255 by 127.5 and subtract 1."
        )


def _lookup(log_alpha: ArrayLike, logsnr: ArrayLike, t: ArrayLike) -> NoiseLevel:
    last = np.shape(log_alpha)[0] - 1
    # What is known is checked as NumPy: inside a trace JAX would trace the check too.
    known = t if isinstance(t, jax.core.Tracer) else np.asarray(t)
    if not jnp.issubdtype(known.dtype, jnp.integer):
        raise ValueError(
            f"t of a discrete schedule must be an integer in 0..{last}; got dtype "
            f"{known.dtype}. Cast it, or use a continuous schedule such as vp."
        )
    check_range("t", known, 0, last, "t = 0 is data and t = T is noise.")
    t = jnp.asarray(t)
    # Under a trace nothing can be raised: an index outside reads nan. Negative ones
    # are sent past the end first, since they would wrap around.
    index = jnp.where(t < 0, last + 1, t.astype(int))
    # Cast by hand: JAX remembers how it cast a constant, in another precision too.
    real = jnp.result_type(float)
    tables = (jnp.asarray(table, real) for table in (log_alpha, logsnr))
    return NoiseLevel(
        *(table.at[index].get(mode="fill", fill_value=jnp.nan) for table in tables)
    )


def widened(value: jax.Array, x: jax.Array) -> jax.Array:
    """Returns numbers [B] with trailing axes of size one, to multiply x [B, ...].

    >>> widened(jnp.ones(2), jnp.ones([2, 8, 8, 3])).shape
    (2, 1, 1, 1)
    """
    if not value.ndim:
        return value
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def check_range(name: str, value: ArrayLike, low: int, high: float, hint: str) -> None:
    """Raises ValueError where a value that is known, not traced, is out of range."""
    if isinstance(value, jax.core.Tracer):
        return
    known = np.asarray(value)
    if known.size and not (known.min() >= low and known.max() <= high):
        raise ValueError(
            f"{name} must be in {low}..{high}; got values from {known.min()} to "
            f"{known.max()}. {hint}"
        )


def check_num_steps(count: int) -> None:
    """Raises ValueError where the number of steps is not a whole number above 0."""
    if not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(
            f"num_steps must be a whole number of at least 1; got {count!r}. "
            "The paper uses 1000."
        )
