"""Measures training steps, chains and a large matrix product."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.data import datasets
from diffusion_jax.lab.schema import config
from diffusion_jax.lab.speed import arithmetic
from diffusion_jax.lab.speed.tables import Work
from diffusion_jax.lab.training import beginning
from diffusion_jax.lab.wiring import build, chains, learning
from diffusion_jax.training import feed, flat, parallel

STORED = 2048
"""Images that the input is gathered from: enough that none is in a cache."""
WARMUP = 3
"""Calls before the clock starts, after the one that compiles."""
SEEN = 50
"""After so many steps, losses of two programs show whether they compute the same."""


class Effort(NamedTuple):
    """How often a call is timed."""

    steps: int
    """Calls that are timed together."""
    repeats: int
    """How often they are."""

    @property
    def warmup(self) -> int:
        """Returns the calls before that: one where a call is timed by itself."""
        return min(WARMUP, self.steps)


class Clock(NamedTuple):
    """Seconds of one call, of several measurements."""

    median: float
    least: float
    most: float
    first: float
    """Of the first call, which compiles, beyond the median."""


def row(work: Work, mesh: Any, effort: Effort, *, fresh: bool) -> dict[str, Any]:
    """Returns the figures of a row of a table, as `train` or `sample`."""
    if work.devices is not None:
        fsdp = math.gcd(work.devices, work.config.train.fsdp)
        mesh = parallel.make_mesh(work.devices, fsdp)
    if work.what == "train":
        found = train(work, mesh, effort, fresh=fresh)
    else:
        found = sample(work, mesh, effort)
    return {**found, "devices": mesh.size, "memory_gib": peak_memory(mesh) / 2**30}


def train(work: Work, mesh: Any, effort: Effort, *, fresh: bool) -> dict[str, Any]:
    """Returns the figures of training steps on one batch that does not change.

    `fresh` measures what fresh batches cost too, by another program.
    """
    size = work.batch
    chosen = config.replace(work.config, "train", batch_size=size)
    classes = chosen.net.classes
    rng = np.random.default_rng(0)
    shape = (max(STORED, size), *chosen.data.loaded)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(len(images)) % max(classes, 1)
    dataset = datasets.Dataset(images, labels, "random")
    step = learning.make_step(chosen, mesh)
    batch = parallel.shard(feed.batch_at(dataset, bool(classes), 0, size, 0), mesh)
    held, losses = [beginning.first_state(chosen, mesh)], []

    def once() -> Any:
        held[0], metrics = step(held[0], batch)
        losses.append(metrics["loss"])
        return losses[-1]

    clock = timed(once, effort)
    last = min(SEEN, len(losses))
    state = learning.state_shapes(chosen, packed=True)
    params = jax.eval_shape(flat.unpack_all, state.params)
    flops = arithmetic.count(learning.gradient(chosen), params, batch)
    measured = {"loss": float(losses[last - 1]), "loss_after": last}
    measured |= figures(clock, size, flops)
    if not fresh:
        return measured
    fed = beginning.feed_of(chosen, dataset, mesh)
    of_fed = step
    if fed.stored is not None:
        of_fed = learning.make_step(chosen, mesh, fed.stored)
    with closing(fed.batches(0, sys.maxsize)) as batches:

        def another() -> Any:
            held[0], metrics = of_fed(held[0], next(batches))
            return metrics["loss"]

        ratio, spread = compared(another, once, effort)
    return measured | {"data_x": ratio, "data_x_range": spread, "input": fed.source}


def sample(work: Work, mesh: Any, effort: Effort) -> dict[str, Any]:
    """Returns the figures of whole chains of the configured rule, one at a time."""
    chosen, size = work.config, work.batch
    made = build.init_params(chosen, jax.random.key(0))
    params = jax.device_put(made, parallel.replicated(mesh))
    draw, drawable = chains.make_draw(chosen, size, mesh), chains.Drawable(params)
    evaluations = chains.count_evaluations(chosen, drawable)
    image = jnp.zeros((1, *chosen.data.shape))
    label = jnp.zeros(1, jnp.int32) if chosen.net.classes else None
    net = {"params": params["net"]}
    apply = build.make_network(chosen).apply
    one = arithmetic.count(apply, net, image, jnp.zeros(1), label)
    alone = effort._replace(steps=1)
    clock = timed(lambda: draw(drawable, jax.random.key(0), 0), alone)
    many = round(evaluations * size)
    return figures(clock, many, many * one) | {"evaluations_per_sample": evaluations}


def figures(clock: Clock, items: int, flops: int) -> dict[str, Any]:
    """Returns the figures of a call, for so many items and operations."""
    return {
        "per_second": items / clock.median,
        "ms": 1000 * clock.median,
        "ms_range": [1000 * clock.least, 1000 * clock.most],
        "tflops": flops / clock.median / 1e12,
        "compile_s": clock.first,
    }


def timed(once: Callable[[], Any], effort: Effort) -> Clock:
    """Returns the seconds of a call; what it returns is waited for."""
    first = _seconds(once, 1)
    _seconds(once, effort.warmup)
    each = [_seconds(once, effort.steps) for _ in range(effort.repeats)]
    median = statistics.median(each)
    return Clock(median, min(each), max(each), max(0.0, first - median))


def compared(
    call: Callable[[], Any], other: Callable[[], Any], effort: Effort
) -> tuple[float, list[float]]:
    """Returns the seconds of a call in units of those of another, and their range.

    The two take turns, so that what else the machine does slows both.
    """
    for once in (call, other):
        _seconds(once, effort.warmup)
    ratios = [
        _seconds(call, effort.steps) / _seconds(other, effort.steps)
        for _ in range(effort.repeats)
    ]
    return statistics.median(ratios), [min(ratios), max(ratios)]


def _seconds(once: Callable[[], Any], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        last = once()
    jax.block_until_ready(last)
    return (time.perf_counter() - began) / times


def ceiling(dtype: str, mesh: Any, effort: Effort) -> float:
    """Returns operations a second of large matrix products, one on each device."""
    side = 1024 if mesh.devices.flat[0].platform == "cpu" else 8192
    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((mesh.size, side, side), dtype, device=parallel.sharded(mesh))
    return 2 * mesh.size * side**3 / timed(lambda: product(a), effort).median


def peak_memory(mesh: Any) -> int:
    """Returns the most bytes in use so far: of a device, or on CPU of the process."""
    found = [device.memory_stats() or {} for device in mesh.local_devices]
    if peaks := [stats.get("peak_bytes_in_use", 0) for stats in found if stats]:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
