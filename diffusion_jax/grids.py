"""Time grids: the times that a chain goes through, from noise to data.

A grid is a NumPy vector of steps + 1 strictly decreasing times that ends at 0. Those
of a discrete schedule are whole numbers; where rounding would repeat one, the next one
up is taken. Those of a continuous schedule are real.
"""

from collections.abc import Callable

import jax
import numpy as np

from diffusion_jax.continuous import last_time, time_of
from diffusion_jax.schedule import Schedule, is_discrete, num_steps

MOST_NOISE = 200.0


def uniform(schedule: Schedule, steps: int | None = None) -> np.ndarray:
    """Returns [steps + 1] times evenly spaced from the last one to 0.

    Args:
      schedule: discrete or continuous.
      steps: number of steps, of a discrete schedule at most T; all T when not given.

    Raises:
      ValueError: the schedule does not have so many steps.

    >>> from diffusion_jax import schedule
    >>> uniform(schedule.linear(1000), 4)
    array([1000,  750,  500,  250,    0])
    """
    steps = _check(schedule, steps)
    return _whole(schedule, np.linspace(last_time(schedule), 0, steps + 1))


def quadratic(schedule: Schedule, steps: int) -> np.ndarray:
    """Returns [steps + 1] times T (i / steps)^2, from the last one to 0.

    Small steps near the data, large ones near the noise: what DDIM's CIFAR-10 numbers
    use (App. D.2, Song et al. 2020).

    Args, Raises: as `uniform`.

    >>> from diffusion_jax import schedule
    >>> quadratic(schedule.linear(1000), 4)
    array([1000,  562,  250,   62,    0])
    """
    steps = _check(schedule, steps)
    share = np.arange(steps, -1, -1) / steps
    return _whole(schedule, last_time(schedule) * share**2)


def logsnr(
    schedule: Schedule, steps: int, *, ends: tuple[float, float] | None = None
) -> np.ndarray:
    """Returns [steps + 1] times evenly spaced in log-SNR, then 0.

    What DPM-Solver is made for (Lu et al. 2022).

    Args:
      schedule: discrete or continuous.
      steps: number of steps, of a discrete schedule at most T.
      ends: the first time and the last one above 0. When not given: the time of pure
        noise (at most 200 times the signal: cosine and jsd end far beyond, in steps
        that would do nothing), and 1 where times count steps, else 0.001.

    Raises:
      ValueError: the schedule does not have so many steps, or ends do not fall.

    >>> from diffusion_jax import schedule
    >>> logsnr(schedule.linear(1000), 4)
    array([1000,  604,   74,    1,    0])
    """
    return _spaced(schedule, steps, ends, lambda u: u, lambda u: u)


def karras(
    schedule: Schedule,
    steps: int,
    *,
    rho: float = 7.0,
    ends: tuple[float, float] | None = None,
) -> np.ndarray:
    """Returns [steps + 1] times evenly spaced in (sigma / alpha)^(1 / rho), then 0.

    Eq. 5, Karras et al. 2022.

    Args:
      schedule, steps, ends: as in `logsnr`.
      rho: 7 in the paper; the larger, the more steps near the data.

    >>> from diffusion_jax import schedule
    >>> karras(schedule.linear(1000), 4)
    array([1000,  776,  302,    1,    0])
    """

    def there(logsnr: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * logsnr / rho)

    return _spaced(schedule, steps, ends, there, lambda u: -2 * rho * np.log(u))


def _spaced(
    schedule: Schedule,
    steps: int,
    ends: tuple[float, float] | None,
    there: Callable[[np.ndarray], np.ndarray],
    back: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Times evenly spaced in a function of the log-SNR."""
    steps = _check(schedule, steps)
    last = last_time(schedule)
    # Where times are whole, the first leaves room for so many steps.
    least = steps if is_discrete(schedule) else 0
    default = max(_noisiest(schedule), least), 1 if last > 1 else 1e-3
    first_time, end = ends or default
    if not last >= first_time > end > 0 and steps > 1:
        raise ValueError(
            f"ends must be two falling times above 0 and at most {last}; got "
            f"{(first_time, end)}. The grid goes on to 0 from the second."
        )
    if is_discrete(schedule) and first_time - end < steps - 1:
        raise ValueError(
            f"ends must be at least {steps - 1} steps apart, one for each step but the "
            f"last; got {(first_time, end)}. Take fewer steps or wider ends."
        )
    # In double precision, whatever the caller computes in; and a grid is known when a
    # chain is traced, so it is worked out at once.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        level = schedule(np.array([first_time, end]))
        low, high = there(np.asarray(level.logsnr, np.float64))
        wanted = back(np.linspace(low, high, steps))
        times = np.array(time_of(schedule, wanted), np.float64)
    times[0] = first_time
    if steps > 1:
        times[-1] = end
    return _whole(schedule, np.append(times, 0.0))


def _noisiest(schedule: Schedule) -> float:
    """The last time, or the one at which sigma / alpha reaches MOST_NOISE."""
    last = last_time(schedule)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        bound = -2 * np.log(MOST_NOISE)
        if float(schedule(last).logsnr) >= bound:
            return last
        return time_of(schedule, bound).item()


def _check(schedule: Schedule, steps: int | None) -> int:
    most = num_steps(schedule) if steps is None or is_discrete(schedule) else None
    steps = most if steps is None else steps
    assert steps is not None  # num_steps refuses continuous schedules
    if steps < 1 or (most is not None and steps > most):
        bound = f"in 1..{most}" if most is not None else "at least 1"
        raise ValueError(
            f"steps must be {bound}, the number of steps of the schedule; got "
            f"{steps}. A discrete schedule has no times in between."
        )
    return steps


def _whole(schedule: Schedule, times: np.ndarray) -> np.ndarray:
    """Rounds the times of a discrete schedule to different whole numbers."""
    if not is_discrete(schedule):
        return times
    # From data up each time is at least one above the one before, from noise down at
    # least one below: both hold since there are no more steps than times.
    index = np.arange(len(times))
    rising = np.rint(times[::-1]).astype(np.int64) - index
    rising = np.clip(np.maximum.accumulate(rising), None, times.max() - index[-1])
    return (rising.astype(np.int64) + index)[::-1].copy()
