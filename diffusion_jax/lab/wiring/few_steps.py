"""Builds the losses of networks of few steps from a configuration."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax import (
    continuous,
    distillation,
    gaussian,
    grids,
    losses,
    samplers,
)
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.few import DISTILLED
from diffusion_jax.lab.wiring.build import (
    chain_schedule,
    has_spans,
    is_continuous,
    make_schedule,
    seen,
)
from diffusion_jax.prediction import Denoiser
from diffusion_jax.schedule import NoiseLevel, Schedule
from diffusion_jax.training import flat
from diffusion_jax.training.state import TrainState

SHRINKINGS = 8
"""How often the steps of ect become half as long."""
JUMPS = 0.25
"""Share of a batch of mean_flow that jumps; the rest learns the velocity."""
STARTS = 0.05
"""Share of a batch at the last time, where every chain begins."""
PATHS, POINTS = 16, 8
"""Of `self_consistency`: images, and steps of DDIM."""


class Memory(NamedTuple):
    """What distillation carries from step to step."""

    teacher: Any
    """Its parameters."""
    step: jax.Array
    """Steps made, int32."""


def has_teacher(config: Config) -> bool:
    """Returns whether the loss asks a teacher."""
    return config.few.method in DISTILLED


def memory_of(params: Any) -> Memory:
    """Returns the first memory: the teacher is what training starts from."""
    return Memory(params, jnp.zeros((), jnp.int32))


def remembered(config: Config, new: TrainState) -> TrainState:
    """Returns the state after a step with the memory brought up to date.

    The averaged student is its own teacher while it learns v, and of progressive
    distillation it becomes the next one.
    """
    memory = new.memory
    over = new.step <= _first(config)
    if config.few.method == "progressive":
        over |= _stage(config, new.step) != _stage(config, new.step - 1)
    teacher = jax.tree.map(
        lambda a, b: jnp.where(over, a, b), new.ema_params, memory.teacher
    )
    return new._replace(memory=Memory(teacher, new.step))


def real_schedule(config: Config) -> Schedule:
    """Returns the schedule at real times, in its own unit."""
    made = make_schedule(config)
    return made if is_continuous(config) else continuous.interpolate(made)


def times(config: Config, u: jax.Array) -> jax.Array:
    """Returns real times of consistency at even angles, some of them the last one.

    So a student does not depend on the times of its teacher's schedule, most of which
    may be all but noise. The whole times of a discrete one would leave the derivative
    in t, which teaches, to itself.

    Args:
      config: of the run.
      u: uniform numbers in [0, 1), [B].
    """
    levels = real_schedule(config)
    last = _angle(levels(continuous.last_time(levels)))
    return _time_at(levels, last * jnp.minimum((1 - u) * (1 + STARTS), 1))


def _angle(level: NoiseLevel) -> jax.Array:
    return jnp.arctan(jnp.exp(-0.5 * level.logsnr))


def _time_at(levels: Schedule, angle: jax.Array) -> jax.Array:
    return continuous.time_of(levels, -2 * jnp.log(jnp.tan(angle)))


def loss(
    config: Config,
    params: Any,
    memory: Any,
    x0: jax.Array,
    eps: jax.Array,
    drawn: tuple[jax.Array, jax.Array, jax.Array],
    label: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """Returns the loss of each example by the configured method, [B].

    Args:
      config: of the run.
      params: the student's.
      memory: a `Memory`, where there is a teacher.
      x0: clean data, [B, H, W, C].
      eps: noise of the same shape.
      drawn: two times as training draws them, and uniform numbers, [B] each.
      label: classes, [B], or None.
      **options: of the network's call.
    """
    few, levels, t = config.few, real_schedule(config), drawn[0].astype(x0.dtype)

    def denoiser(params: Any, span: jax.Array | None = None) -> Denoiser:
        return seen(config, params, levels, label, span, **options)

    if few.method == "mean_flow":
        t, s = jnp.maximum(*drawn[:2]), jnp.minimum(*drawn[:2])
        s = jnp.where(drawn[2] < JUMPS, s, t)
        ends = gaussian.Prediction(x0, eps)
        jump = lambda x, t, s: denoiser(params, t - s)(x, t)  # noqa: E731
        return distillation.mean_flow(jump, ends, levels, t, s)
    if few.method == "progressive":
        t, middle, s = _halved(config, memory.step, t)
    teacher = jax.lax.stop_gradient(flat.unpack_all(memory.teacher))
    asked = seen(config, teacher, levels, label, guide=few.guidance)
    level, share = levels(t), _since(config, memory.step) / _rest(config)
    x_t, ends = gaussian.q_sample(x0, eps, level), gaussian.Prediction(x0, eps)
    pred = denoiser(params)(x_t, t)
    if few.method == "progressive":
        aim = distillation.two_steps(asked, x_t, levels, t, middle, s)
        each = distillation.progressive(pred, aim, level)
    else:
        if few.method == "consistency" or few.guidance is not None:
            ends = jax.lax.stop_gradient(gaussian.Prediction(*asked(x_t, t)[:2]))
        fixed = denoiser(jax.lax.stop_gradient(params))
        if few.method == "ect":
            shorter = jnp.exp2(-(1 + jnp.floor(SHRINKINGS * share)))
            s = _time_at(levels, _angle(level) * (1 - shorter))
            g = distillation.difference(fixed, ends, levels, t, s)
        else:
            warm = jnp.minimum(1, share / max(few.tangent_warmup, 1e-6))
            g = distillation.tangent(fixed, ends, levels, t, warmup=warm)
        each = distillation.consistency(pred, g, level)
    if few.learn_v:
        mean = losses.simple(pred, x0, eps, level, space="v")
        each = jnp.where(memory.step < _first(config), mean, each)
    return each


def _first(config: Config) -> int:
    """Returns the steps in which the network learns v."""
    return int(config.few.learn_v * config.train.steps)


def _since(config: Config, step: ArrayLike) -> jax.Array:
    """Returns how many steps have been made since."""
    return jnp.maximum(jnp.asarray(step) - _first(config), 0)


def _rest(config: Config) -> int:
    """Returns how many steps there are after those."""
    return max(config.train.steps - _first(config), 1)


def _stage(config: Config, step: jax.Array) -> jax.Array:
    """Returns how often the steps have been halved; -1 while the network learns v."""
    stages = (config.few.first // config.few.last).bit_length()
    stage = _since(config, step) * stages // _rest(config)
    return jnp.where(step < _first(config), -1, stage)


def _halved(
    config: Config, step: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the step of the stage's grid that t is in: its end, middle and start.

    They are those of `grids.uniform`, on the chain of T steps.
    """
    real, total = is_continuous(config), config.diffusion.num_steps
    count = config.few.first / jnp.exp2(_stage(config, step))
    place = jnp.ceil(t * (count if real else count / total))
    unit = total if real else 1
    found = (jnp.rint(total / count * (place - part)) / unit for part in (0, 0.5, 1))
    t, middle, s = found
    return t, middle, s


def self_consistency(config: Config, params: Any, teacher: Any) -> jax.Array:
    """Returns how far the ends that a network sees along a path are from its end.

    The root of the mean square over `PATHS` paths of the teacher's DDIM in `POINTS`
    steps, always from the same noise, in the unit of images in [-1, 1]; of mean_flow
    its own paths. 0 where it is consistent, and its teacher's paths are.

    Args:
      config: of the run.
      params: the student's.
      teacher: the teacher's parameters.
    """
    levels, classes = chain_schedule(config), config.net.classes
    label = jnp.arange(PATHS) % classes if classes else None
    walk = samplers.ddim(
        seen(config, teacher, levels, label, guide=config.few.guidance), levels
    )
    grid, shape = grids.uniform(levels, POINTS), (PATHS, *latents.seen(config))
    end, path = samplers.trajectory(jax.random.key(0), walk, grid, shape, range(POINTS))

    def gap(t: jax.Array, x_t: jax.Array) -> jax.Array:
        span = jnp.broadcast_to(t, PATHS) if has_spans(config) else None
        pred = seen(config, params, levels, label, span)(x_t, t)
        # All of a jump of mean_flow to data is its x0.
        return jnp.square(pred.x0 - end).mean()

    return jnp.sqrt(jax.vmap(gap)(jnp.asarray(path.t), path.x_t).mean())
