"""Measures speed: `python -m experiments.bench [EXPERIMENT] [--field value ...]`.

Training and sampling of any configuration on the devices there are, with the share of a
ceiling that is measured in the same run: a large matrix product in the network's type.
Arithmetic is that of matrix products and convolutions, counted in the mathematics (see
`diffusion_jax.lab.speed.arithmetic`), and not what a compiler makes of it.
"""

import dataclasses
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import entry
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import config
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import Count, Positive
from diffusion_jax.lab.speed import arithmetic, peer, scaling, tables
from diffusion_jax.lab.training import arguments, beginning
from diffusion_jax.lab.wiring import build, chains, learning
from diffusion_jax.training import compilation, feed, flat, parallel
from experiments.configs import EXPERIMENTS

CEILING = {"cpu": 1024}
"""Side of the matrices of the ceiling; 8192 on other devices."""


STORED = 2048
"""Images that the input is gathered from: enough that none is in a cache."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    what: tuple[Literal["train", "sample"], ...] = ("train", "sample")
    """Training steps, and chains of the sampling rule."""
    batch_sizes: tuple[int, ...] | None = None
    """Images a training step, and images a chain; one row each. 64 when not given, and
    128 and 512 of a table."""
    steps: Count = 10
    """Training steps, or chains, that are timed together."""
    repeats: Count = 5
    """How often they are: the median counts, and the whole range is shown."""
    warmup: Count = 3
    """Steps before the clock starts, after the one that compiles."""
    scaling: bool = False
    """Whether to train on 1, 2, 4, ... of the devices as well, with the same batch and
    with the same share of it."""
    peer: bool = False
    """Whether to measure the same work by diffusers and PyTorch in this run (pip
    install .[peers]), and print how much faster this is."""
    table: bool = False
    """Whether to make the table of the README, on one device: training, also with the
    arithmetic of the authors' code, chains, and options of the compiler."""
    minutes: Positive = 8.0
    """How long a table may take: what there is no time for is named."""
    candidates: tuple[str, ...] = tables.CANDIDATES
    """Options of the compiler that a table tries one by one, each NAME=VALUE."""
    out: Path | None = None
    """JSON file to write, after every row; of a table also one of Markdown."""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=Config
    )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images of each row, as given or by what is measured."""
        if self.batch_sizes is None:
            return tables.SIZES if self.table else (64,)
        return self.batch_sizes


class Clock(NamedTuple):
    """Seconds of one call, of several measurements."""

    median: float
    least: float
    most: float
    first: float
    """Of the first call, which compiles, beyond the median."""


def main(argv: Sequence[str]) -> int:
    """Prints the table, and writes it; returns the exit code."""
    options = parse(argv)
    parallel.split_cpu(math.gcd(*options.sizes))
    plan = options.config.train
    mesh = parallel.make_mesh(plan.devices, plan.fsdp)
    for size in options.sizes:
        parallel.check_batch_size(size, mesh.size)
        if options.scaling:
            scaling.check(size, mesh.size)
    device = mesh.devices.flat[0]
    dtype = options.config.net.dtype
    report: dict[str, Any] = {
        "device": device.device_kind,
        "devices": mesh.size,
        "experiment": options.config.name,
        "ceilings_tflops": {},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": runs.versions(),
        "rows": [],
        **({"options": [], "left_out": []} if options.table else {}),
    }
    save(options, report)  # which may fail, and had better do so now
    top = report["ceilings_tflops"][dtype] = ceiling(options, mesh) / 1e12
    print(
        f"{options.config.name} on {mesh.size} x {device.device_kind}, {dtype}; "
        f"matrix product {top:.3g} TFLOP/s"
    )
    print(f"  {'what':<7}{'batch':>7}{'per s':>12}{'ms':>11}{'range':>19}", end="")
    print(f"{'TFLOP/s':>10}{'share':>7}{'compile s':>11}{'data x':>8}{'GiB':>7}")
    if options.table:
        measure_table(options, mesh, report)
    else:
        measure_rows(options, mesh, report)
    if options.out is not None:
        print(f"written: {options.out}")
    return 0


def parse(argv: Sequence[str]) -> Options:
    """Returns the checked options: an experiment's name, then flags."""
    options = arguments.parse_with(
        Options,
        argv,
        EXPERIMENTS,
        prog="python -m experiments.bench",
        description=__doc__,
    )
    if min(options.sizes, default=0) < 1:
        raise ConfigError(
            "batch_sizes must be one or more whole numbers above 0; "
            f"got {options.sizes}. Change it with --batch-sizes 64 128."
        )
    if not options.what:
        raise ConfigError(
            "what must be train, sample or both; got neither. Leave it out for both."
        )
    if options.peer:
        peer.check(options.config)
    if options.table:
        tables.check(options)
    return options


def measure_rows(options: Options, mesh: Any, report: dict[str, Any]) -> None:
    """Measures what was asked for, with the peer and more devices where wanted."""
    for what in options.what:
        for size in options.sizes:
            row = add_row(options, mesh, what, size, report)
            save(options, report)
            if options.peer:
                row["peer"] = measure_peer(options, row)
                save(options, report)
    print("per s: images trained on, or evaluations of the network in a chain")
    print("data x: a step with fresh batches, in units of one with the same batch")
    print("GiB: most memory in use so far, of a device or, on CPU, of the process")
    if options.scaling:
        report["scaling"] = measure_scaling(options, mesh.size)
        save(options, report)


def measure_table(options: Options, mesh: Any, report: dict[str, Any]) -> None:
    """Measures the rows of a table, the peer, and options of the compiler, in turn."""
    size = options.sizes[0]
    tables.measure(
        options,
        report,
        add_row=lambda given, work: add_row(given, mesh, work.what, work.batch, report),
        measure_peer=measure_peer,
        train=lambda told: measure_train(options, mesh, size, told),
        save=lambda: save(options, report),
    )


def add_row(
    options: Options, mesh: Any, what: str, size: int, report: dict[str, Any]
) -> dict[str, Any]:
    """Measures a row, adds it to the report, prints it and returns it."""
    dtype, tops = options.config.net.dtype, report["ceilings_tflops"]
    if dtype not in tops:
        tops[dtype] = ceiling(options, mesh) / 1e12
    row = {"dtype": dtype, **measure(options, mesh, what, size)}
    row["share"] = row["tflops"] / tops[dtype]
    report["rows"].append(row)
    show(row)
    return row


def save(options: Options, report: dict[str, Any]) -> None:
    """Writes what there is so far, so that a command that is killed loses nothing."""
    if options.out is not None:
        runs.write_json(options.out, report)
    if options.out is not None and options.table:
        options.out.with_suffix(".md").write_text(tables.markdown(report))


def measure(options: Options, mesh: Any, what: str, size: int) -> dict[str, Any]:
    """Returns the figures of one row."""
    measured = {"train": measure_train, "sample": measure_sample}[what]
    return {
        "what": what,
        "batch": size,
        **measured(options, mesh, size),
        "memory_gib": peak_memory(mesh) / 2**30,
    }


def measure_train(
    options: Options,
    mesh: Any,
    size: int,
    told: compilation.Options | None = None,
) -> dict[str, Any]:
    """Returns the figures of training steps on one batch that does not change.

    Args:
      options: what to measure, and how.
      mesh: the devices.
      size: of the batch.
      told: options of the compiler, beside those of the platform.
    """
    chosen = config.replace(options.config, "train", batch_size=size)
    rng = np.random.default_rng(0)
    shape = (max(STORED, size), *chosen.data.shape)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(len(images)) % max(chosen.net.classes, 1)
    dataset = datasets.Dataset(images, labels, "random")
    usual = compilation.options(mesh.devices.flat[0])
    step = learning.make_step(chosen, mesh, options=usual | (told or {}))
    whole_state = learning.state_shapes(chosen, packed=True)
    held = [beginning.first_state(chosen, mesh)]
    fed = beginning.feed_of(chosen, dataset, mesh)
    whole = feed.batch_at(dataset, bool(chosen.net.classes), 0, size, 0)
    batch = parallel.shard(whole, mesh)
    params = jax.eval_shape(flat.unpack_all, whole_state.params)
    flops = arithmetic.count(learning.gradient(chosen), params, batch)
    losses = []

    def once() -> Any:
        held[0], metrics = step(held[0], batch)
        losses.append(metrics["loss"])
        return losses[-1]

    clock = timed(once, options)
    last = min(tables.STEPS, len(losses))
    measured = {"loss": float(losses[last - 1]), "loss_after": last}
    measured |= figures(clock, size, flops)
    if options.table:  # which has no time for another program
        return measured
    fed_step = step
    if fed.stored is not None:
        fed_step = learning.make_step(chosen, mesh, fed.stored)
    with closing(fed.batches(0, sys.maxsize)) as batches:

        def fresh() -> Any:
            held[0], metrics = fed_step(held[0], next(batches))
            return metrics["loss"]

        ratio, spread = compared(fresh, once, options)
    return measured | {"data_x": ratio, "data_x_range": spread, "input": fed.source}


def measure_sample(options: Options, mesh: Any, size: int) -> dict[str, Any]:
    """Returns the figures of whole chains of the configured rule."""
    chosen = options.config
    params = jax.device_put(
        build.init_params(chosen, jax.random.key(0)), parallel.replicated(mesh)
    )
    draw = chains.make_draw(chosen, size, mesh)
    drawable = chains.Drawable(params)
    evaluations = chains.count_evaluations(chosen, drawable)
    label = jnp.zeros(1, jnp.int32) if chosen.net.classes else None
    one = arithmetic.count(
        build.make_network(chosen).apply,
        {"params": params["net"]},
        jnp.zeros((1, *chosen.data.shape)),
        jnp.zeros(1),
        label,
    )
    clock = timed(lambda: draw(drawable, jax.random.key(0), 0), options)
    many = round(evaluations * size)
    return figures(clock, many, many * one) | {"evaluations_per_sample": evaluations}


def measure_scaling(options: Options, found: int) -> list[dict[str, Any]]:
    """Returns the rows of training on more and more of the devices, and prints them."""

    def images_per_second(devices: int, size: int) -> float:
        fsdp = math.gcd(devices, options.config.train.fsdp)
        mesh = parallel.make_mesh(devices, fsdp)
        per_second: float = measure_train(options, mesh, size)["per_second"]
        return per_second

    return [
        row
        for size in options.sizes
        for row in scaling.measure(images_per_second, size, found)
    ]


def measure_peer(options: Options, row: dict[str, Any]) -> dict[str, Any]:
    """Returns the seconds of the peer for the work of a row, and prints them."""
    clock, how = peer.measure(
        options.config,
        row["what"],
        row["batch"],
        row.get("evaluations_per_sample", 1.0),
        lambda once: timed(once, options),
    )
    ms = 1000 * clock.median
    per_second = row["per_second"] * row["ms"] / ms
    ratio = ms / row["ms"]
    print(f"    {how}: {per_second:,.1f} per s, {ms:,.2f} ms; here {ratio:.2f} times")
    return {"how": how, "ms": ms, "per_second": per_second, "ratio": ratio}


def figures(clock: Clock, items: int, flops: int) -> dict[str, Any]:
    """Returns what the seconds of a call mean, for so many items and operations."""
    return {
        "per_second": items / clock.median,
        "ms": 1000 * clock.median,
        "ms_range": [1000 * clock.least, 1000 * clock.most],
        "tflops": flops / clock.median / 1e12,
        "compile_s": clock.first,
    }


def timed(once: Callable[[], Any], options: Options) -> Clock:
    """Returns the seconds of a call; what it returns is waited for."""
    began = time.perf_counter()
    jax.block_until_ready(once())
    first = time.perf_counter() - began
    for _ in range(options.warmup):
        jax.block_until_ready(once())
    each = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        for _ in range(options.steps):
            last = once()
        jax.block_until_ready(last)
        each.append((time.perf_counter() - began) / options.steps)
    median = statistics.median(each)
    return Clock(median, min(each), max(each), max(0.0, first - median))


def compared(
    call: Callable[[], Any], other: Callable[[], Any], options: Options
) -> tuple[float, list[float]]:
    """Returns the seconds of a call in units of those of another, and their range.

    The two take turns, so that what else the machine does slows both.
    """
    seconds: list[tuple[float, ...]] = []
    for repeat in range(-1, options.repeats):  # the first compiles
        both = []
        for once in (call, other):
            began = time.perf_counter()
            for _ in range(options.steps if repeat >= 0 else options.warmup):
                last = once()
            jax.block_until_ready(last)
            both.append(time.perf_counter() - began)
        seconds.append(tuple(both))
    ratios = [a / b for a, b in seconds[1:]]
    return statistics.median(ratios), [min(ratios), max(ratios)]


def ceiling(options: Options, mesh: Any) -> float:
    """Returns operations a second of large matrix products, one on each device."""
    dtype = jnp.dtype(options.config.net.dtype)
    side = CEILING.get(mesh.devices.flat[0].platform, 8192)
    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((mesh.size, side, side), dtype, device=parallel.sharded(mesh))
    return 2 * mesh.size * side**3 / timed(lambda: product(a), options).median


def peak_memory(mesh: Any) -> int:
    """Returns the most bytes in use so far: of a device, or on CPU of the process."""
    found = [device.memory_stats() or {} for device in mesh.local_devices]
    peaks = [
        stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats
    ]
    if peaks:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show(row: dict[str, Any]) -> None:
    """Prints a row of the table."""
    low, high = row["ms_range"]
    fresh = f"{row['data_x']:.3f}" if "data_x" in row else "-"
    print(
        f"  {row['what']:<7}{row['batch']:>7,}{row['per_second']:>12,.1f}"
        f"{row['ms']:>11,.2f}{f'{low:,.2f} to {high:,.2f}':>19}{row['tflops']:>10.3g}"
        f"{row['share']:>7.1%}{row['compile_s']:>11.1f}{fresh:>8}"
        f"{row['memory_gib']:>7.2f}"
    )


if __name__ == "__main__":
    entry.guarded(main)
