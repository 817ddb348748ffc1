"""Turns what was asked for into chains to walk, and into the command that draws it."""

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax import editing, gaussian, samplers
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.drawing import edits
from diffusion_jax.lab.playground import asked, walk
from diffusion_jax.lab.playground.asked import How
from diffusion_jax.lab.playground.subject import Subject
from diffusion_jax.lab.playground.walk import Plan
from diffusion_jax.lab.process import flags
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.wiring import chains

JUMP = 10
"""Steps that inpainting goes back, where it walks stretches again."""

Images = Callable[[str], np.ndarray]
"""From the id of an image to its pixels, uint8 [H, W, C]."""


class Route(NamedTuple):
    """What is to be drawn: chains, each of which begins where the last one ended."""

    config: Config
    first: Plan
    then: Callable[[Any], Plan] | None
    """From the end of the first chain to the second, where there is one."""
    command: str
    """The command line that draws the same."""
    counted: bool = False
    """Whether the network evaluations (NFE) of an image are to be said."""


def denoise(subject: Subject, told: asked.Denoise, images: Images) -> Route:
    """Returns the chain of images from noise."""
    config = asked.sampled(subject.config, told.how, told.count)
    keys, start = walk.noise(config, told.seed, told.count)
    plan = Plan(config, subject.drawable, chains.make_grid(config), keys, start)
    words = ["--count", str(told.count), "--no-strip", "--out", "drawn.png"]
    command = _typed(subject, "sample", words, told)
    return Route(config, plan, None, command, told.counted)


def interpolate(subject: Subject, told: asked.Interpolate, images: Images) -> Route:
    """Returns the chains of images between two."""
    if len(told.images) != 2:
        raise ConfigError(
            f"images must be two, A and B; got {len(told.images)}. Choose both."
        )
    ends = jnp.stack([_floats(images(one)) for one in told.images])
    if told.arc:
        return _arc(subject, told, ends)
    config = _of_one_class(asked.sampled(subject.config, told.how, told.count))
    depth = _depth(config, told.depth)
    share = np.linspace(0, 1, told.count, dtype=np.float32)[:, None, None, None]
    mixed = (1 - share) * ends[:1] + share * ends[1:]
    keys, _ = walk.noise(config, told.seed, 1)
    plan = _noised(subject, config, jnp.repeat(keys, told.count), mixed, depth)
    words = ["interpolate", "A.png", "B.png"]
    words += ["--depth", str(depth), "--count", str(told.count)]
    return Route(config, plan, None, _typed(subject, "edit", words, told))


def inpaint(subject: Subject, told: asked.Inpaint, images: Images) -> Route:
    """Returns the chain that draws a part of an image."""
    config = _of_one_class(asked.sampled(subject.config, told.how, told.count))
    height, width, _ = config.data.shape
    white = np.zeros(height * width, bool)
    if not told.mask or not all(0 <= k < white.size for k in told.mask):
        raise ConfigError(
            f"mask must be pixels in 0..{white.size - 1}, at least one; got "
            f"{len(told.mask)}. Paint over what is to be drawn."
        )
    white[list(told.mask)] = True
    grid = chains.make_grid(config)
    if told.resamples > 1:
        edits.check_resamples(config, told.resamples)
        jump = min(JUMP, len(grid) - 2)
        grid = editing.repaint_grid(grid, jump, told.resamples)
    keys, start = walk.noise(config, told.seed, told.count)
    image = _floats(images(told.image))[None]
    mask = jnp.asarray(~white.reshape(1, height, width, 1))
    plan = Plan(config, subject.drawable, grid, keys, start, (image, mask))
    words = ["inpaint", "IMAGE.png", "MASK.png", "--count", str(told.count)]
    if told.resamples > 1:
        words += ["--resamples", str(told.resamples), "--jump", str(jump)]
    return Route(config, plan, None, _typed(subject, "edit", words, told))


def _arc(subject: Subject, told: asked.Interpolate, ends: Any) -> Route:
    """Returns the chains up to the noises of two images, and down from between them."""
    given = Sampling(steps=told.how.steps, grid=told.how.grid, label=told.how.label)
    usual = edits.deterministic(subject.config, given)
    how = dataclasses.replace(
        told.how,
        sampler="ddim",
        steps=usual.sample.steps,
        grid=usual.sample.grid,
        variance=None,
        eta=0.0,
        order=None,
    )
    config = _of_one_class(asked.sampled(subject.config, how, told.count))
    grid = chains.make_grid(config)
    rising = np.sort(grid[grid > 0])
    if len(rising) < 2:
        raise ConfigError("steps must be at least 2 on the arc; got 1. Ask for more.")
    keys, _ = walk.noise(config, 0, 2)
    share = np.linspace(0, 1, told.count, dtype=np.float32)

    def then(noises: Any) -> Plan:
        many = jnp.repeat(noises[:, None], told.count, axis=1)
        start = editing.slerp(many[0], many[1], share)
        again, _ = walk.noise(config, told.seed, told.count)
        return Plan(config, subject.drawable, grid, again, start)

    plan = Plan(config, subject.drawable, rising, keys, ends)
    words = ["slerp", "A.png", "B.png", "--count", str(told.count)]
    shown = How(steps=how.steps, grid=how.grid, label=how.label)
    told = dataclasses.replace(told, how=shown)
    return Route(config, plan, then, _typed(subject, "edit", words, told))


def _noised(subject: Subject, config: Config, keys: Any, x0: Any, depth: int) -> Plan:
    """Returns the chain from a depth, with the noise that `experiments.edit` has."""
    whole = chains.make_grid(config)
    grid = editing.below(whole, depth)
    eps = gaussian.normal(samplers.fold(keys, 0), x0.shape)
    levels = chains.sampling_schedule(config, subject.drawable.params)
    start = gaussian.q_sample(x0, eps, levels(grid[0]))
    # There a rule without memory waits for the depth, which takes noise.
    skipped = 0 if edits.has_memory(config) else len(whole) - len(grid)
    return Plan(config, subject.drawable, grid, keys, start, (), skipped)


def _floats(image: np.ndarray) -> Any:
    return jnp.asarray(edits.to_float(image))


def _depth(config: Config, depth: int | None) -> int:
    last = int(chains.make_grid(config)[0])
    found = max(1, last // 2) if depth is None else depth
    edits.check_depths(config, (found,), least=1)
    return found


def _of_one_class(config: Config) -> Config:
    if config.net.classes and config.sample.label is None:
        raise ConfigError(
            "label must be given with a network that has classes; got none. Choose "
            "that of the image."
        )
    return config


def _typed(subject: Subject, command: str, words: Sequence[str], told: Any) -> str:
    """Returns the command line that draws the same."""
    how = flags.typed({"seed": told.seed, **dataclasses.asdict(told.how)})
    run, *which = subject.typed.split(" --")  # edit takes RUN before its command
    chosen = [f"--{each}" for each in which]
    before, after = ([], words) if command == "sample" else (words, [])
    said = [run, shlex.join(before), how, *chosen, shlex.join(after)]
    return " ".join(["python -m", f"experiments.{command}", *filter(None, said)])
