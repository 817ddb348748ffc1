"""Counts what a step is made of: `python -m experiments.compiled [EXPERIMENT]`.

Compiles the training step, or one evaluation of the network, and counts kernels, the
bytes they move, communication between devices (collectives), and memory: for the
devices of this machine, or for others that need not be there (--target h200:8, or
v5e:4x4). Nothing is run, and no time is measured.
"""

import collections
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import entry, progress, replaceable
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import Config, replace
from diffusion_jax.lab.schema.facts import Whole
from diffusion_jax.lab.speed import arithmetic, compiled_program, targets
from diffusion_jax.lab.training import arguments, beginning
from diffusion_jax.lab.wiring import build, learning
from diffusion_jax.training import compilation, flat, parallel
from experiments.configs import EXPERIMENTS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile, and for what."""

    MAIN: ClassVar = (
        "what target largest out text overwrite data.image_size net.channels "
        "net.multipliers net.dtype net.remat train.batch_size train.parallel "
        "train.devices train.fsdp"
    )
    what: Literal["train", "sample"] = "train"
    """A training step, or an evaluation of the network as chains make it; of
    train.batch_size images."""
    target: str = "here"
    """here, h100:N or h200:N (so many GPUs, eight a host), or a slice of TPUs, such as
    v5e:4x4."""
    largest: Whole = 0
    """How many of the kernels that move most to list."""
    out: Path | None = None
    """JSON file to write."""
    text: Path | None = None
    """File to write the compiled program to."""
    overwrite: bool = False
    """Whether a file may be replaced that this command did not write."""
    config: arguments.Unnamed = arguments.DEFAULT


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    options = arguments.parse_with(
        Options,
        argv,
        EXPERIMENTS,
        prog=entry.typed("compiled"),
        description=__doc__,
    )
    chosen = options.config
    check(options)
    if options.target != "here" and chosen.net.conv == "auto":
        # What auto would choose here is for this machine.
        chosen = replace(chosen, "net", conv="xla")
    if options.target == "here":
        parallel.split_cpu(chosen.train.batch_size)
    target, plan = targets.aim(options.target), chosen.train
    mesh = parallel.make_mesh(plan.devices, plan.fsdp, target.devices)
    parallel.check_batch_size(plan.batch_size, mesh.size)
    lower = {"train": training, "sample": sampling}[options.what]
    lowered, operations = lower(chosen, mesh)
    began = time.perf_counter()
    with progress.clock("compiling"):
        compiled = lowered.compile()
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    kernels = compiled_program.kernels(text)
    each = {name: count / mesh.size for name, count in operations.items()}
    found = summary(kernels, compiled.memory_analysis()) | each
    if target.speed is not None and chosen.net.dtype == "bfloat16":
        found["model"] = model(found, target.speed)
    print(
        f"{chosen.name}, {options.what}, batch {chosen.train.batch_size:,} on "
        f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {chosen.net.dtype}; "
        f"compiled in {seconds:.0f} s"
    )
    show(found)
    kernels.sort(key=lambda kernel: -kernel.times * kernel.moved)
    for kernel in kernels[: options.largest]:
        print(
            f"  {kernel.times * kernel.moved / 1e6:10,.1f} MB  {kernel.kind:<12} "
            f"{kernel.name}: {kernel.source}"
        )
    if options.text is not None:
        options.text.write_text(text)
    if options.out is not None:
        about = {
            "command": replaceable.typed("compiled", argv),
            "target": options.target,
            "versions": runs.versions(),
        }
        runs.write_json(options.out, {**about, **found})
        print(f"written: {options.out}")
    return 0


def check(options: Options) -> None:
    """Raises ConfigError before anything is compiled, which may take minutes."""
    if options.target != "here" and options.config.train.devices is not None:
        raise ConfigError(
            "train.devices must be left out for a target that is not here; got "
            f"{options.config.train.devices}. Say how many with --target h100:8."
        )
    report = replaceable.report_of("compiled")
    for path, mark in ((options.out, report), (options.text, b"HloModule")):
        if path is None:
            continue
        if not path.resolve().parent.is_dir():
            raise ConfigError(
                f"the folder of {path} must be there; got none. Make it, or write "
                "elsewhere."
            )
        replaceable.check_file(path, mark, overwrite=options.overwrite)


def training(chosen: Config, mesh: Mesh) -> tuple[Any, dict[str, int]]:
    """Returns the lowered training step, and its `operations`."""
    if chosen.train.parallel == "pmap":  # the same program
        chosen = replace(chosen, "train", parallel="shard_map")
    state = beginning.state_like(chosen, mesh)
    size = chosen.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *chosen.data.loaded), jnp.uint8),
        "position": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    if chosen.net.classes:
        batch["label"] = batch["position"]
    params = jax.eval_shape(flat.unpack_all, state.params)
    counted = operations(learning.gradient(chosen), params, batch)
    return learning.make_step(chosen, mesh).program.lower(state, batch), counted


def sampling(chosen: Config, mesh: Mesh) -> tuple[Any, dict[str, int]]:
    """Returns the lowered evaluation of the network, and its `operations`."""
    net, size = build.make_network(chosen), chosen.train.batch_size
    # As chains have them: the parameters cast before the first step.
    params = jax.eval_shape(
        lambda whole: build.as_computed(chosen, whole)["net"],
        build.param_shapes(chosen),
    )
    inputs = [
        jax.ShapeDtypeStruct((size, *chosen.data.shape), jnp.float32),
        jax.ShapeDtypeStruct((size,), jnp.float32),
        *[jax.ShapeDtypeStruct((size,), jnp.int32)] * bool(net.num_classes),
    ]

    def apply(params: Any, inputs: list[Any]) -> Any:
        return net.apply({"params": params}, *inputs)

    compiled = jax.jit(
        apply,
        in_shardings=(parallel.replicated(mesh), parallel.sharded(mesh)),
        out_shardings=parallel.sharded(mesh),
        compiler_options=compilation.options(mesh.devices.flat[0]),
    )
    return compiled.lower(params, inputs), operations(apply, params, inputs)


def operations(function: Any, *args: Any) -> dict[str, int]:
    """Returns the operations over all devices: all, and those of convolutions."""
    return {
        "flops": arithmetic.count(function, *args),
        "convolution_flops": arithmetic.count(
            function, *args, kinds=(arithmetic.CONVOLUTION,)
        ),
    }


def summary(kernels: list[compiled_program.Kernel], memory: Any) -> dict[str, Any]:
    """Returns kernels, bytes and memory of a compiled program, for one device."""
    count: collections.Counter[str] = collections.Counter()
    moved: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        count[kernel.kind] += kernel.times
        moved[kernel.kind] += kernel.times * kernel.moved
    temporary = memory.temp_size_in_bytes
    kept = memory.argument_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "kernels": dict(count),
        "bytes": dict(moved),
        "memory": {
            "arguments": kept,
            "temporary": temporary,
            "all": kept + temporary + fresh,
        },
    }


def model(found: dict[str, Any], speed: targets.Speed) -> dict[str, float]:
    """Returns the milliseconds of each kind of kernel, were none to overlap.

    Every kernel takes its time to start; then a convolution the time of its arithmetic,
    and any other that of the bytes it moves. Communication is left out.
    """
    kinds = [kind for kind in found["kernels"] if kind != "collective"]

    def seconds(kind: str) -> float:
        number = found["kernels"][kind]
        if kind == "convolution":
            busy = found["convolution_flops"] / speed.convolutions
            return number * speed.convolution_start + busy
        return number * speed.start + found["bytes"][kind] / speed.memory

    return {kind: 1000 * seconds(kind) for kind in kinds}


def show(found: dict[str, Any]) -> None:
    """Prints the table, of one device."""
    print(f"  {'kernels':<16}{'number':>8}{'GB moved':>12}")
    for kind in sorted(found["bytes"], key=lambda kind: -found["bytes"][kind]):
        print(f"  {kind:<16}{found['kernels'][kind]:>8,}", end="")
        print(f"{found['bytes'][kind] / 1e9:>12.3f}")
    total = sum(found["bytes"].values()) / 1e9
    print(f"  {'all':<16}{sum(found['kernels'].values()):>8,}{total:>12.3f}")
    memory = {name: size / GIB for name, size in found["memory"].items()}
    print(
        f"memory: {memory['all']:.3g} GiB, of which {memory['arguments']:.3g} state "
        f"and input, {memory['temporary']:.3g} temporary; "
        f"{found['flops'] / 1e12:.3g} TFLOP"
    )
    if "model" in found:
        largest = sorted(found["model"].items(), key=lambda part: -part[1])
        parts = " + ".join(f"{kind} {ms:.1f}" for kind, ms in largest)
        total = f"{sum(found['model'].values()):.1f} ms"
        told = "collective" in found["kernels"]
        alone = ", without communication between devices" if told else ""
        print(f"model of an H200, not measured{alone}: {parts} = {total}")


if __name__ == "__main__":
    entry.guarded(main)
