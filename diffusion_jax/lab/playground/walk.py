"""Walks a chain step by step, so that it can be watched, stopped and continued.

The steps are those of the rule that `samplers.sample` drives, with the same keys.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import editing, gaussian, samplers
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import build, chains
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.training import compilation

BYTES, FRAMES = 24 * 2**20, 400
"""Most bytes and frames of an answer: of longer chains every n-th step is shown."""

Known = tuple[jax.Array, ...]
"""Nothing, or an image and where it is known, boolean."""


class Plan(NamedTuple):
    """A chain before its first step."""

    config: Config
    """With the way to sample."""
    drawable: Drawable
    grid: np.ndarray
    """Times, [steps + 1]; rising in a part where the rule walks up."""
    keys: jax.Array
    """One an image, [B]."""
    start: jax.Array
    """x at the first time, [B, H, W, C]."""
    known: Known = ()
    skipped: int = 0
    """Steps of a longer chain that this is the end of: they have had their noise."""


class Frame(NamedTuple):
    """A chain before one of its steps, or at its end; uint8 [B, H, W, C]."""

    step: int
    t: float
    x0: np.ndarray
    """The images as the network sees them there."""
    x_t: np.ndarray


@dataclasses.dataclass
class Walk:
    """A chain at some step: who stops may go on."""

    plan: Plan
    step: int = 0
    x: jax.Array | None = None
    memory: Any = None
    seconds: float = 0.0
    """Of computing, without compiling."""

    def __post_init__(self) -> None:
        """Begins at the start of the plan."""
        plan = self.plan
        rule = _rule(plan.config, plan.drawable, plan.known)
        memory = rule.init(plan.start, plan.grid)
        # Where what a step puts out will be: or the second would compile again.
        place = jax.tree.leaves(plan.drawable.params)[0].sharding
        self.x, self.memory = jax.device_put((plan.start, memory), place)


def noise(config: Config, seed: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and the first x of a seed's images, [B] and [B, H, W, C]."""
    keys = samplers.each_key(jax.random.key(seed), count)
    shape = (count, *config.data.shape)
    x = gaussian.normal(samplers.fold(keys, 0), shape) * chains.start_std(config)
    return keys, x


def frames(walk: Walk) -> Iterator[Frame]:
    """Yields the chain from where it is: before each step, and at its end."""
    plan = walk.plan
    count, size = len(plan.grid) - 1, 2 * plan.start.size
    every = max(1, -(-count // FRAMES), -(-count * size // BYTES))
    step = _program(_key_of(plan.config), len(plan.known))
    times = jnp.asarray(plan.grid)

    def taken(k: int) -> samplers.Step:
        index = jnp.asarray(plan.skipped + k)
        new: samplers.Step = step(
            plan.drawable,
            plan.keys,
            index,
            walk.x,
            walk.memory,
            times[k],
            times[k + 1],
            plan.known,
        )
        return jax.block_until_ready(new)

    if walk.step < count:
        taken(walk.step)  # which compiles, where nobody measures
    while walk.step < count:
        k, x, began = walk.step, walk.x, time.perf_counter()
        new = taken(k)
        walk.seconds += time.perf_counter() - began
        walk.x, walk.memory, walk.step = new.x, new.memory, k + 1
        if k % every == 0:
            yield Frame(k, float(plan.grid[k]), _shown(new.x0), _shown(x))
    end = _shown(walk.x)
    yield Frame(count, float(plan.grid[-1]), end, end)


def logsnr(config: Config, drawable: Drawable, grid: np.ndarray) -> list[float | None]:
    """Returns the log-SNR at each time, to three digits; None where it is infinite."""
    levels = chains.sampling_schedule(config, drawable.params)
    found = np.asarray(levels(jnp.asarray(grid)).logsnr, float)
    return [round(x, 3) if np.isfinite(x) else None for x in found.tolist()]


def _key_of(config: Config) -> Config:
    """Returns what programs of a configuration depend on: not the number of steps."""
    sample = dataclasses.replace(config.sample, steps=None)
    return dataclasses.replace(config, sample=sample)


@functools.lru_cache(maxsize=32)
def _program(config: Config, known: int) -> Callable[..., samplers.Step]:
    """Returns the compiled step of a rule: one for every grid."""
    options = compilation.options(jax.devices()[0])

    @functools.partial(jax.jit, compiler_options=options)
    def step(
        drawable: Drawable,
        keys: jax.Array,
        index: jax.Array,
        x: jax.Array,
        memory: Any,
        t: jax.Array,
        s: jax.Array,
        known: Known,
    ) -> samplers.Step:
        cast = drawable._replace(params=build.as_computed(config, drawable.params))
        rule = _rule(config, cast, known)
        return rule.step(samplers.fold(keys, index + 1), x, memory, t, s)

    return step


def _rule(config: Config, drawable: Drawable, known: Known) -> samplers.Sampler:
    rule = chains.make_sampler(config, drawable)
    levels = chains.sampling_schedule(config, drawable.params)
    return editing.inpaint(rule, levels, *known) if known else rule


def _shown(x: Any) -> np.ndarray:
    return pictures.to_uint8(np.asarray(x))
