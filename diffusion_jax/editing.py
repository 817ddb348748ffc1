"""Editing images with any sampling rule, without training and without conditioning.

Two ideas. An image is noised down to a depth t and drawn again from there (`vary`,
`interpolate`), or carried there without noise and back (`encode`). And a rule is
wrapped (`constrain`), so that after each of its steps the part of the image that is
known is put back, noised as much as the rest: `inpaint` and `colorize` are two kinds of
known part, `repaint_grid` goes back and forth to bring both parts into agreement.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax import gaussian, samplers
from diffusion_jax.schedule import Schedule, real_data, widened

# Folded into the key of a step for the noise of the known part, so that the rule has
# the noise that it would have without it.
KNOWN = 0x6B6E6F77


def below(grid: np.ndarray, t: float) -> np.ndarray:
    """Returns the part of a grid from time t down, t first: [0] for t = 0.

    A t that the grid does not have is put before the first time below it.

    Args:
      grid: falling times that end at 0, as `grids` makes them.
      t: depth, in the unit of the grid.

    Raises:
      ValueError: t is not in 0..grid[0], or not a whole number where times are.

    >>> below(np.array([1000, 750, 500, 250, 0]), 600)
    array([600, 500, 250,   0])
    """
    grid = np.asarray(grid)
    whole = np.issubdtype(grid.dtype, np.integer)
    if not 0 <= t <= grid[0] or (whole and t != int(t)):
        kind = "whole number" if whole else "time"
        raise ValueError(
            f"t must be a {kind} from 0 to {grid[0]}, where the grid begins; got {t}. "
            "0 leaves an image as it is, the end of the schedule forgets it."
        )
    return np.concatenate([np.asarray([t], grid.dtype), grid[grid < t]])


def vary(
    key: jax.Array,
    sampler: samplers.Sampler,
    schedule: Schedule,
    grid: np.ndarray,
    x0: jax.Array,
    t: ArrayLike,
) -> jax.Array:
    """Returns images drawn again from x_t ~ q(x_t | x0): variations, [B, ...].

    SDEdit (Algorithm 1, Meng et al. 2022) of an image instead of a sketch. The smaller
    t, the nearer they stay to x0; from the last time they are what `samplers.sample`
    draws with the same key, up to the signal that is left there.

    Args:
      key: one key; or a key an example, [B].
      sampler: the rule that draws.
      schedule: its noise schedule.
      grid: falling times that end at 0; the part below t is used.
      x0: images, [B, ...]. For several variations of one, repeat it.
      t: depth in 0..grid[0], in the unit of the schedule; 0 gives x0 back. Under `jit`
        it may be an argument, so that other depths do not compile again: then the
        chain waits until t, and its noise is another than with a t that is known.

    Raises:
      ValueError: t is not in the range of the grid; or it is an argument under `jit`
        and the rule has a memory.

    >>> from diffusion_jax import grids, schedule
    >>> lin = schedule.linear(10)
    >>> rule = samplers.ddpm(gaussian.denoiser(lambda x, t: 0 * x, lin, "x0"), lin)
    >>> x0 = jnp.ones([1, 2])
    >>> print(vary(jax.random.key(0), rule, lin, grids.uniform(lin), x0, 5))
    [[0. 0.]]
    """
    x0 = real_data(x0)
    if isinstance(t, jax.core.Tracer):
        sampler = _waiting(sampler, t)
    else:
        grid = below(grid, np.asarray(t).item())
        t = grid[0]
    if len(grid) == 1:
        return x0
    keys = samplers.each_key(key, len(x0))
    # The key of the noise that `sample` would start from.
    eps = gaussian.normal(samplers.fold(keys, 0), x0.shape)
    start = gaussian.q_sample(x0, eps, schedule(t))
    return samplers.sample(keys, sampler, grid, x0.shape, start=start)


def interpolate(
    key: jax.Array,
    sampler: samplers.Sampler,
    schedule: Schedule,
    grid: np.ndarray,
    x0: jax.Array,
    other: jax.Array,
    t: ArrayLike,
    fractions: ArrayLike,
) -> jax.Array:
    """Returns images between two, mixed at depth t and drawn from there, [B, F, ...].

    x_t = (1 - f) x_t + f x_t', where both are drawn from q with the same noise (Sec.
    4.4 and Fig. 8, Ho et al. 2020). With the same noise this is the noised mixture of
    the images, and is computed as that. The chain's noise too is the same for all
    fractions. Several depths make Fig. 9: t = 0 mixes pixels, the last time forgets
    both images.

    Args:
      key: one key; or a key a pair, [B].
      sampler, schedule, grid, t: as in `vary`. The paper has t = 500 of 1000.
      x0: images, [B, ...].
      other: as many others, of the same shape.
      fractions: [F], from 0 (a variation of x0) to 1 (of the other).

    Raises:
      ValueError: the images differ in shape, fractions are not a vector, or t is not
        in the range of the grid.
    """
    x0, other, fractions = real_data(x0), real_data(other), jnp.asarray(fractions)
    if x0.shape != other.shape or fractions.ndim != 1:
        raise ValueError(
            "the two images must have one shape, and fractions be a vector; got "
            f"{x0.shape}, {other.shape} and fractions of shape {fractions.shape}. "
            "Give for instance jnp.linspace(0, 1, 9)."
        )
    share = widened(fractions.astype(x0.dtype), x0)[None]
    mixed = (1 - share) * x0[:, None] + share * other[:, None]
    rows = np.arange(len(x0)).repeat(len(fractions))
    keys = samplers.each_key(key, len(x0))[rows]
    flat = mixed.reshape(-1, *x0.shape[1:])
    return vary(keys, sampler, schedule, grid, flat, t).reshape(mixed.shape)


def encode(sampler: samplers.Sampler, grid: np.ndarray, x0: jax.Array) -> jax.Array:
    """Returns the noise from which a deterministic rule draws an image, [B, ...].

    The rule walks the grid upwards (Sec. 5.4, Song et al. 2020), and `samplers.sample`
    with this as start gives the image back. The error falls as 1 / steps for `ddim`.
    At t = 0 there is no noise to be read: the image is taken for x at the smallest time
    above, so that this should be small (`grids.quadratic`).

    Args:
      sampler: a rule that walks a rising grid: `samplers.ddim(denoise, schedule)`.
      grid: falling times that end at 0, those to sample with. `below(grid, t)` encodes
        to depth t.
      x0: images, [B, ...].

    Raises:
      ValueError: the rule draws noise, or the grid has no two times above 0.

    >>> from diffusion_jax import grids, schedule
    >>> lin = schedule.linear(10)
    >>> denoise = gaussian.denoiser(lambda x, t: 0 * x, lin, "eps")
    >>> rule = samplers.ddim(denoise, lin)
    >>> print(encode(rule, grids.uniform(lin), jnp.ones([1, 2])).round(4))
    [[0.9507 0.9507]]
    """
    rising = np.sort(np.asarray(grid)[np.asarray(grid) > 0])
    if len(rising) < 2:
        raise ValueError(
            f"grid must have at least two times above 0; got {grid!r}. "
            "grids.uniform(schedule, steps) makes one."
        )
    # No noise is drawn: a rule that would draw some refuses to walk upwards.
    key = jax.random.key(0)
    return samplers.sample(key, sampler, rising, x0.shape, start=x0)


def slerp(a: jax.Array, b: jax.Array, fraction: ArrayLike) -> jax.Array:
    """Returns the spherical interpolation of a and b, example by example.

    sin((1 - f) theta) / sin(theta) a + sin(f theta) / sin(theta) b, where theta is the
    angle between a and b (Shoemake 1985; App. D.5, Song et al. 2020). A mixture of two
    noises keeps their length, which a straight line between them does not.

    Parallel vectors, and opposite ones, which no single arc joins, are mixed linearly.

    Args:
      a: [B, ...], noise for instance.
      b: as a.
      fraction: 0 (a) to 1 (b), a scalar or [B].

    >>> print(slerp(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), 0.5).round(4))
    [[0.7071 0.7071]]
    """
    a, b = real_data(a), real_data(b)
    fraction = jnp.broadcast_to(jnp.asarray(fraction, a.dtype), a.shape[:1])
    flat_a, flat_b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    squares = (flat_a**2).sum(1) * (flat_b**2).sum(1)
    some = squares > 0
    cosine = (flat_a * flat_b).sum(1) / jnp.sqrt(jnp.where(some, squares, 1))
    apart = some & (1 - jnp.abs(cosine) > 4 * jnp.finfo(a.dtype).eps)
    # Where the arc is not used its angle is replaced, or its gradient would be nan.
    theta = jnp.arccos(jnp.where(apart, cosine, 0))
    of_a = jnp.where(apart, jnp.sin((1 - fraction) * theta), 1 - fraction)
    of_b = jnp.where(apart, jnp.sin(fraction * theta), fraction)
    length = jnp.where(apart, jnp.sin(theta), 1)
    return widened(of_a / length, a) * a + widened(of_b / length, a) * b


def constrain(
    sampler: samplers.Sampler,
    schedule: Schedule,
    known: jax.Array,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
) -> samplers.Sampler:
    """Returns a rule that puts the known part of an image back after each step.

    A step t -> s of the rule gives x_s; with y_s = alpha_s known + sigma_s z, noised
    afresh, it becomes combine(y_s, x_s) (App. I.2, Song et al. 2021; Algorithm 1,
    Lugmayr et al. 2022). At s = 0 y is what is known, to the bit.

    Such a rule also walks a grid that rises in between (`repaint_grid`), if the wrapped
    one has no memory: a step up is x_s ~ q(x_s | x_t), the forward process, and asks
    nothing of the network. What a trajectory shows as x0 there is what was seen last.

    Args:
      sampler: any rule.
      schedule: its noise schedule.
      known: clean data, [B, ...] or [1, ...].
      combine: a function of (known, x), both noised alike, [B, ...]: x with the known
        part in its place.

    Returns:
      A rule; its init raises ValueError for a grid that does not end at its lowest
      time, or that rises where the wrapped rule has a memory.

    >>> from diffusion_jax import grids, schedule
    >>> lin = schedule.linear(10)
    >>> rule = samplers.ddpm(gaussian.denoiser(lambda x, t: 0 * x, lin, "x0"), lin)
    >>> left = lambda known, x: jnp.concatenate([known[:, :1], x[:, 1:]], axis=1)
    >>> rule = constrain(rule, lin, jnp.full([1, 2], 0.3), left)
    >>> print(samplers.sample(jax.random.key(0), rule, grids.uniform(lin), (1, 2)))
    [[0.3 0. ]]
    """
    known = real_data(known)

    def init(x: jax.Array, grid: np.ndarray) -> Any:
        memory = sampler.init(x, np.unique(grid)[::-1])
        if np.all(np.diff(grid) < 0):
            return memory, None
        if grid[-1] != np.min(grid):
            raise ValueError(
                f"grid must end at its lowest time; got one that ends at {grid[-1]} "
                f"and has {np.min(grid)}. repaint_grid makes one that rises between."
            )
        _check_forgets(memory, "walks back up", "a grid that only falls")
        return memory, jnp.zeros_like(x)

    def down(
        keys: jax.Array, x_t: jax.Array, memory: Any, t: jax.Array, s: jax.Array
    ) -> samplers.Step:
        inner, seen = memory
        new = sampler.step(keys, x_t, inner, t, s)
        noise = gaussian.normal(samplers.fold(keys, KNOWN), x_t.shape)
        noised = gaussian.q_sample(known, noise, schedule(s))
        given = jnp.where(s > 0, noised, known)
        seen = None if seen is None else new.x0
        return samplers.Step(combine(given, new.x), (new.memory, seen), new.x0)

    def up(
        keys: jax.Array, x_t: jax.Array, memory: Any, t: jax.Array, s: jax.Array
    ) -> samplers.Step:
        x_s = gaussian.q_step(keys, x_t, schedule(t), schedule(s))
        return samplers.Step(x_s, memory, memory[1])

    def step(
        keys: jax.Array, x_t: jax.Array, memory: Any, t: jax.Array, s: jax.Array
    ) -> samplers.Step:
        if memory[1] is None:
            return down(keys, x_t, memory, t, s)
        return jax.lax.cond(s > t, up, down, keys, x_t, memory, t, s)

    return samplers.Sampler(init, step)


def inpaint(
    sampler: samplers.Sampler, schedule: Schedule, image: jax.Array, mask: ArrayLike
) -> samplers.Sampler:
    """Returns a rule that keeps the known part of an image and draws the rest.

    The known pixels come out as they are, to the bit.

    Args:
      sampler: any rule.
      schedule: its noise schedule.
      image: [B, ...] or [1, ...]; what it has where the mask is False does not matter,
        if it is finite.
      mask: boolean, True where the image is known; of a shape that broadcasts to the
        image's.

    Raises:
      ValueError: the mask is not boolean, or has a shape that does not fit.

    >>> from diffusion_jax import grids, schedule
    >>> lin = schedule.linear(10)
    >>> rule = samplers.ddpm(gaussian.denoiser(lambda x, t: 0 * x, lin, "x0"), lin)
    >>> rule = inpaint(rule, lin, jnp.full([1, 2], 0.3), np.array([[True, False]]))
    >>> print(samplers.sample(jax.random.key(0), rule, grids.uniform(lin), (1, 2)))
    [[0.3 0. ]]
    """
    mask = jnp.asarray(mask)
    fits = mask.ndim == image.ndim and all(
        a in (1, b) for a, b in zip(mask.shape, image.shape, strict=True)
    )
    if mask.dtype != bool or not fits:
        raise ValueError(
            f"mask must be boolean and of a shape that broadcasts to {image.shape}; "
            f"got {mask.dtype} {mask.shape}. True is where the image is known."
        )
    return constrain(sampler, schedule, image, lambda y, x: jnp.where(mask, y, x))


def colorize(
    sampler: samplers.Sampler, schedule: Schedule, grey: jax.Array
) -> samplers.Sampler:
    """Returns a rule that draws colours for a known mean over the channels.

    x + mean(y - x): the known part is the projection on the grey axis, which noise that
    is independent in each channel leaves independent of the rest (App. I.3, Song et
    al. 2021). The mean over the channels comes out as grey, within rounding.

    Args:
      sampler: any rule.
      schedule: its noise schedule.
      grey: [B, ..., 1], the mean over the channels and not a weighted luma; or an image
        whose mean is taken.
    """
    mean = real_data(grey).mean(-1, keepdims=True)

    def combine(y: jax.Array, x: jax.Array) -> jax.Array:
        return x + (y - x).mean(-1, keepdims=True)

    return constrain(sampler, schedule, mean, combine)


def repaint_grid(grid: np.ndarray, jump: int, resamples: int) -> np.ndarray:
    """Returns a grid that goes back up and down again, for `constrain`.

    Each stretch of `jump` steps is walked `resamples` times, from the noisiest to the
    one that ends just above data; the last step is made once (Algorithm 1 and App. B,
    Lugmayr et al. 2022, who take 10 of each with 250 steps). Going up is one jump. So
    the network is called about `resamples` times as often.

    Args:
      grid: falling times.
      jump: steps to go back, below the number of steps.
      resamples: how often each stretch is walked; 1 gives the grid itself.

    Raises:
      ValueError: not whole numbers, or jump is not below the number of steps.

    >>> repaint_grid(np.array([4, 3, 2, 1, 0]), 2, 2)
    array([4, 3, 2, 1, 3, 2, 1, 0])
    """
    grid = np.asarray(grid)
    steps = len(grid) - 1
    if resamples == 1:
        return grid
    if not (1 <= jump < steps and resamples >= 1 and int(jump) == jump):
        raise ValueError(
            f"jump must be in 1..{steps - 1} for a grid of {steps} steps, and "
            f"resamples at least 1; got {jump} and {resamples}. The paper takes 10 and "
            "10 with 250 steps."
        )
    walked = list(range(steps + 1))
    # From the data up, so that what was found holds while steps are put in behind it.
    for end in range(steps - 1, jump - 1, -jump):
        again = list(range(end - jump, end + 1)) * (resamples - 1)
        walked[end + 1 : end + 1] = again
    return grid[walked]


def _waiting(sampler: samplers.Sampler, t: jax.Array) -> samplers.Sampler:
    """Returns a rule that leaves x as it is above time t and begins there."""

    def init(x: jax.Array, grid: np.ndarray) -> Any:
        memory = sampler.init(x, grid)
        _check_forgets(memory, "begins at a traced t", "a t that is not traced")
        return memory

    def wait(
        keys: jax.Array, x_t: jax.Array, memory: Any, now: jax.Array, s: jax.Array
    ) -> samplers.Step:
        return samplers.Step(x_t, memory, x_t)

    def step(
        keys: jax.Array, x_t: jax.Array, memory: Any, now: jax.Array, s: jax.Array
    ) -> samplers.Step:
        # The step that t lies in begins at t, whether or not the grid has it.
        now = jnp.minimum(now, t.astype(now.dtype))
        return jax.lax.cond(s >= t, wait, sampler.step, keys, x_t, memory, now, s)

    return samplers.Sampler(init, step)


def _check_forgets(memory: Any, doing: str, instead: str) -> None:
    if jax.tree.leaves(memory):
        raise ValueError(
            f"a rule that {doing} must be one without memory; got one that carries "
            f"something from step to step. Use ddpm or ddim, or {instead}."
        )
