"""Sampling: one loop that drives many rules (samplers and solvers).

A rule is a function that returns a `Sampler`, two closures in the manner of optax:

  init(x, grid) -> memory                      what the rule carries from step to step
  step(keys, x_t, memory, t, s) -> Step        one step from time t to time s

and `sample` drives any of them along a time grid with one `lax.scan`. A grid is a
vector of times, as a rule from noise down to 0, which is data where sigma(0) = 0 (see
`continuous.discretize`, clean=True); a rule refuses a grid that it cannot walk. A chain
that skips steps is a grid that skips times: there is nothing else to respacing.

Example i is drawn from (key, i) alone: not from the size of the batch around it, nor
from the number of devices.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax import errors, gaussian
from diffusion_jax.schedule import Schedule, real_data


class Step(NamedTuple):
    """The result of one step of a rule."""

    x: jax.Array
    """x_s, [B, ...]."""
    memory: Any
    """What the rule carries on: a pytree of constant structure."""
    x0: jax.Array
    """The clean data as the network saw them from x_t, [B, ...]."""


class Sampler(NamedTuple):
    """A sampling rule, as a pair of functions."""

    init: Callable[[jax.Array, np.ndarray], Any]
    """From x at the start of the grid, and the whole grid, to the first memory."""
    step: Callable[[jax.Array, jax.Array, Any, jax.Array, jax.Array], Step]
    """From (keys [B], x_t [B, ...], memory, t, s) to a Step; t and s are scalars."""


class Trajectory(NamedTuple):
    """A chain at chosen steps: K records of B examples."""

    t: np.ndarray
    """The time before each recorded step, [K]."""
    x_t: jax.Array
    """The chain before each recorded step, [K, B, ...]."""
    x0: jax.Array
    """The clean data as the network saw them there, [K, B, ...]."""


def ddpm(
    denoise: gaussian.Denoiser, schedule: Schedule, *, variance: str = "large"
) -> Sampler:
    """Returns ancestral sampling (Algorithm 2, Ho et al. 2020).

    On the full grid T, T-1, ..., 0 this is the paper's sampler. On a coarser one each
    step draws from p(x_s | x_t) with the posterior of the jump t -> s.

    Args:
      denoise: the network's prediction as a function of (x_t, t).
      schedule: its noise schedule.
      variance: of the reverse steps, one of gaussian.VARIANCES.

    >>> from diffusion_jax import grids, schedule
    >>> lin = schedule.linear(10)
    >>> rule = ddpm(gaussian.denoiser(lambda x, t: 0 * x, lin, "x0"), lin)
    >>> images = sample(jax.random.key(0), rule, grids.uniform(lin), (1, 2))
    >>> bool((images == 0).all())
    True
    """
    if variance not in gaussian.VARIANCES:
        errors.raise_unknown("variance", variance, gaussian.VARIANCES)

    def step(
        keys: jax.Array, x_t: jax.Array, memory: tuple[()], t: jax.Array, s: jax.Array
    ) -> Step:
        pred = denoise(x_t, t)
        x_s = gaussian.p_sample(
            keys, pred, x_t, schedule(t), schedule(s), variance=variance
        )
        return Step(x_s, memory, pred.x0)

    return Sampler(forgetful(schedule), step)


def ddim(
    denoise: gaussian.Denoiser, schedule: Schedule, *, eta: float = 0.0
) -> Sampler:
    """Returns the implicit sampler (Eq. 12, Song et al. 2020).

    x_s = alpha_s x0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z, where v is eta^2 times the
    variance of the posterior q(x_s | x_t, x0). Without noise it walks a rising grid
    too, from data to the noise that they are drawn from: see `editing.encode`.

    Args:
      denoise: the network's prediction as a function of (x_t, t).
      schedule: its noise schedule.
      eta: share of the posterior's noise: 0 for a deterministic map from noise to
        data, 1 for `ddpm` with the small variance.

    Raises:
      ValueError: eta is not in [0, 1].

    >>> from diffusion_jax import grids, schedule
    >>> lin = schedule.linear(10)
    >>> rule = ddim(gaussian.denoiser(lambda x, t: 0 * x, lin, "x0"), lin)
    >>> images = sample(jax.random.key(0), rule, grids.uniform(lin, 2), (1, 2))
    >>> bool((images == 0).all())
    True
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(
            f"eta must be from 0 to 1; got {eta}. 0 draws no noise, 1 as much as ddpm."
        )

    def step(
        keys: jax.Array, x_t: jax.Array, memory: tuple[()], t: jax.Array, s: jax.Array
    ) -> Step:
        pred = denoise(x_t, t)
        level, prev = schedule(t).like(x_t), schedule(s).like(x_t)
        # v = eta^2 sigma_s^2 (1 - e^D) with D <= 0: the rest is never negative.
        share = eta**2 * -jnp.expm1(level.logsnr - prev.logsnr)
        x_s = prev.alpha * pred.x0 + prev.sigma * jnp.sqrt(1 - share) * pred.eps
        if eta > 0:
            noise = gaussian.normal(keys, x_t.shape)
            x_s = x_s + prev.sigma * jnp.sqrt(share) * noise
        return Step(x_s, memory, pred.x0)

    return Sampler(forgetful(schedule, rising=eta == 0), step)


def forgetful(
    schedule: Schedule, *, rising: bool = False
) -> Callable[[jax.Array, np.ndarray], tuple[()]]:
    """Returns an init for rules without memory, which only checks the grid.

    Args:
      schedule: the times must be its own.
      rising: whether the rule may walk from data to noise as well.
    """

    def init(x: jax.Array, grid: np.ndarray) -> tuple[()]:
        check_grid(schedule, grid, rising=rising)
        return ()

    return init


def check_grid(schedule: Schedule, grid: np.ndarray, *, rising: bool = False) -> None:
    """Raises ValueError where a rule cannot walk a grid.

    Args:
      schedule: the times must be its own.
      grid: the times, [steps + 1]: strictly decreasing.
      rising: whether it may be strictly increasing instead.

    What is traced cannot be checked.
    """
    if isinstance(grid, jax.core.Tracer):
        return
    down = bool(np.all(np.diff(grid) < 0))
    if not (down or (rising and np.all(np.diff(grid) > 0))):
        raise ValueError(
            "grid must be strictly decreasing times, from noise to data"
            f"{', or strictly increasing' if rising else ''}; got {grid!r}. "
            "grids.uniform(schedule, steps) makes one."
        )
    schedule(grid)


def sample(
    key: jax.Array,
    sampler: Sampler,
    grid: np.ndarray | jax.Array,
    shape: tuple[int, ...],
    *,
    start: jax.Array | None = None,
    start_std: ArrayLike = 1.0,
    first: int | jax.Array = 0,
) -> jax.Array:
    """Returns examples drawn by a rule, [B, ...].

    Compiled once for each sampler object, grid and shape. To draw with changing
    parameters without compiling again, build the sampler inside a function of the
    parameters and put that under `jit`; with changing grids too, see `padded`.

    Args:
      key: one key; or a key an example, [B], to share noise between examples.
      sampler: the rule.
      grid: times, [steps + 1], from noise down to data but for rules that say else.
      shape: (B, ...), the batch first.
      start: x at grid[0], [B, ...]; drawn from N(0, start_std^2 I) when not given.
      start_std: 1, the prior of the paper, unless variance explodes: then
        schedule(grid[0]).sigma.
      first: index of the first example: sample(key, ..., (4, ...), first=2) are the
        examples 2..5 of sample(key, ..., (6, ...)).

    Raises:
      ValueError: the rule cannot walk the grid, or start has another shape or is of
        whole numbers.
    """
    x, _ = _run(key, sampler, grid, shape, start, start_std, first, record=())
    return x


def trajectory(
    key: jax.Array,
    sampler: Sampler,
    grid: np.ndarray | jax.Array,
    shape: tuple[int, ...],
    steps: Sequence[int],
    *,
    start: jax.Array | None = None,
    start_std: ArrayLike = 1.0,
    first: int | jax.Array = 0,
) -> tuple[jax.Array, Trajectory]:
    """Returns the examples of `sample` and the chain at chosen steps.

    Only the chosen steps are held in memory.

    Args:
      key, sampler, grid, shape, start, start_std, first: as in `sample`.
      steps: numbers of the steps to record, 0 (from pure noise) to len(grid) - 2 (the
        step that ends in data).

    Raises:
      ValueError: as `sample`, or a step that the grid does not have.
    """
    count = len(grid) - 1
    steps = tuple(int(step) for step in steps)
    if (
        not steps
        or len(set(steps)) < len(steps)
        or not all(0 <= step < count for step in steps)
    ):
        raise ValueError(
            f"steps must be different numbers in 0..{count - 1}, one for each step "
            f"to record; got {steps}. The grid has {count} steps."
        )
    x, (x_t, x0) = _run(key, sampler, grid, shape, start, start_std, first, steps)
    return x, Trajectory(np.asarray(grid)[list(steps)], x_t, x0)


def each_key(key: jax.Array, count: int, *, first: int | jax.Array = 0) -> jax.Array:
    """Returns a key for each example, [count].

    Args:
      key: one typed key, which is folded with the number of each example; or a key
        an example, [count], which stay as they are.
      count: how many examples there are.
      first: the number of the first one.

    Raises:
      ValueError: a key of the old style, or keys for another number of examples.

    >>> keys = each_key(jax.random.key(0), 3)
    >>> bool((keys[1:] == each_key(jax.random.key(0), 2, first=1)).all())
    True
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape not in ((), (count,)):
        raise ValueError(
            f"key must be one typed key, or one for each of {count} examples; got "
            f"{key.dtype} of shape {key.shape}. Make it with jax.random.key, and more "
            "of it with jax.random.split."
        )
    if key.ndim:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))


def fold(keys: jax.Array, number: int | jax.Array) -> jax.Array:
    """Returns each of the keys [B] folded with one number, [B]."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def counted(denoise: gaussian.Denoiser, seen: list[int]) -> gaussian.Denoiser:
    """Returns the denoiser, but each call appends its number of examples to `seen`.

    Counted as the program runs, wherever in it: in loops, and in branches only when
    they are taken. Wait with `jax.effects_barrier()` before reading.
    """

    def denoise_and_count(x_t: jax.Array, *times: jax.Array) -> gaussian.Prediction:
        jax.debug.callback(lambda: seen.append(x_t.shape[0]))
        return denoise(x_t, *times)

    return denoise_and_count


def count_evaluations(
    make: Callable[[gaussian.Denoiser], Sampler],
    denoise: gaussian.Denoiser,
    grid: np.ndarray,
    shape: tuple[int, ...],
    **options: Any,
) -> float:
    """Returns the network evaluations (NFE) of an example, counted as a draw runs.

    Args:
      make: the rule as a function of the denoiser.
      denoise: the network's prediction; where the rule adapts to it, the real one.
      grid, shape, options: as in `sample`.

    >>> from diffusion_jax import grids, schedule
    >>> lin = schedule.linear(10)
    >>> denoise = gaussian.denoiser(lambda x, t: 0 * x, lin, "x0")
    >>> make = lambda counted: ddpm(counted, lin)
    >>> count_evaluations(make, denoise, grids.uniform(lin, 5), (1, 2))
    5.0
    """
    seen: list[int] = []
    key, sampler = jax.random.key(0), make(counted(denoise, seen))
    sample(key, sampler, grid, shape, **options).block_until_ready()
    jax.effects_barrier()
    return sum(seen) / shape[0]


def padded(sampler: Sampler) -> Sampler:
    """Returns the rule, but steps from a time to the same time are skipped.

    Grids of many lengths, filled up at the end with `pad`, then share one compiled
    program: under `jit` with the grid as an argument.
    """

    def step(
        keys: jax.Array, x_t: jax.Array, memory: Any, t: jax.Array, s: jax.Array
    ) -> Step:
        def stay(x_t: jax.Array, memory: Any) -> Step:
            return Step(x_t, memory, x_t)

        def go(x_t: jax.Array, memory: Any) -> Step:
            return sampler.step(keys, x_t, memory, t, s)

        return jax.lax.cond(t == s, stay, go, real_data(x_t), memory)

    return Sampler(sampler.init, step)


def pad(grid: np.ndarray, length: int) -> np.ndarray:
    """Returns the grid with its last time repeated, [length].

    >>> pad(np.array([9, 5, 0]), 5)
    array([9, 5, 0, 0, 0])
    """
    return np.concatenate([grid, np.full(length - len(grid), grid[-1])])


def _run(
    key: jax.Array,
    sampler: Sampler,
    grid: np.ndarray | jax.Array,
    shape: tuple[int, ...],
    start: jax.Array | None,
    start_std: ArrayLike,
    first: int | jax.Array,
    record: tuple[int, ...],
) -> Any:
    known = not isinstance(grid, jax.core.Tracer)
    grid = np.asarray(grid) if known else grid
    if grid.ndim != 1 or grid.size < 2 or (known and not np.all(np.diff(grid))):
        raise ValueError(
            "grid must be a vector of at least two times, each other than the one "
            f"before; got {grid!r}. grids.uniform(schedule, steps) makes one."
        )
    if start is not None and start.shape != tuple(shape):
        raise ValueError(
            f"start must have the shape of the samples, {tuple(shape)}; got "
            f"{start.shape}. Give one starting point for each example."
        )
    start = None if start is None else real_data(start)
    # `first` as a Python integer would be compiled in, and every batch would compile
    # again. A grid that is known is, so that a rule may look at it.
    first, std = jnp.asarray(first), jnp.asarray(start_std, jnp.result_type(float))
    times = tuple(grid.tolist()) if known else None
    later = None if known else jnp.asarray(grid)
    return _scan(key, sampler, times, later, tuple(shape), start, std, first, record)


@partial(jax.jit, static_argnames=("sampler", "times", "shape", "record"))
def _scan(
    key: jax.Array,
    sampler: Sampler,
    times: tuple[float, ...] | None,
    later: Any,
    shape: tuple[int, ...],
    start: jax.Array | None,
    start_std: jax.Array,
    first: jax.Array,
    record: tuple[int, ...],
) -> Any:
    keys = each_key(key, shape[0], first=first)
    x = gaussian.normal(fold(keys, 0), shape) * start_std if start is None else start
    # Slot k of the record belongs to step record[k]; other steps write past the end,
    # where a write is dropped.
    grid = later if times is None else np.asarray(times)
    count = len(grid) - 1
    slots = np.full(count, len(record))
    slots[list(record)] = np.arange(len(record))
    # Made from x, to be sharded as x is under shard_map.
    empty = jnp.stack([jnp.zeros_like(x)] * len(record)) if record else ()

    def body(carry: Any, now: Any) -> Any:
        x_t, memory, kept = carry
        index, slot, t, s = now
        new = sampler.step(fold(keys, index + 1), x_t, memory, t, s)
        if record:
            seen = (x_t, new.x0)
            kept = jax.tree.map(lambda a, b: a.at[slot].set(b, mode="drop"), kept, seen)
        return (new.x, new.memory, kept), None

    carry = (x, sampler.init(x, grid), (empty, empty) if record else ())
    steps = (np.arange(count), slots, grid[:-1], grid[1:])
    (x, _, kept), _ = jax.lax.scan(body, carry, steps)
    return x, kept
