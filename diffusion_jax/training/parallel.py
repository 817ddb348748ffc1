"""One pure step on many devices, by three strategies that give the same gradients.

  mesh       `jit` over a mesh of devices with named shardings: the default. The step
             sees the whole batch, so what it draws at random does not depend on the
             number of devices.
  pmap       `jax.pmap`: each device runs the step on its share of the batch and takes
             part in a `pmean` by name. JAX keeps pmap in maintenance mode.
  shard_map  the same as pmap by JAX's present interface.

pmap and shard_map need a step that averages over the axis "data"
(`make_step(..., axis_name=parallel.AXIS)`).

With a second axis, "fsdp", the devices along it share one copy of the state: each holds
a part of every large array (`state_sharding`); parameters are gathered for the loss and
its gradient is cut again (`gathered`). Only "mesh" can do that.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_jax.errors import raise_unknown
from diffusion_jax.training import compilation

AXIS, FSDP = "data", "fsdp"
SMALL = 1024
"""Arrays of fewer elements are not cut: a message costs more than they take."""
CPU_SHARE = 32
"""Least number of images a step for each CPU core."""
STRATEGIES = ("mesh", "pmap", "shard_map")

PyTree = Any


def make_mesh(
    devices: int | None = None, fsdp: int = 1, found: Sequence[Any] | None = None
) -> Mesh:
    """Returns a mesh over the devices of all hosts: ("data",), or ("data", "fsdp").

    Devices are in the order of their hosts, so that the rows of a batch on one host are
    neighbours, and so are devices that share a copy of the state.

    Args:
      devices: how many devices to use; all when not given.
      fsdp: how many of them share one copy of the state; with 1 there is no second
        axis.
      found: the devices to choose from; those of JAX when not given.

    Raises:
      ValueError: there are not that many, some hosts would have none, or fsdp does not
        divide them.
    """
    found = jax.devices() if found is None else found
    found = sorted(found, key=lambda device: (device.process_index, device.id))
    if devices is not None and not 1 <= devices <= len(found):
        raise ValueError(
            f"devices must be in 1..{len(found)}, what JAX finds here; got {devices}. "
            "Leave it out to use all; of a CPU's, XLA_FLAGS="
            "--xla_force_host_platform_device_count=N makes more."
        )
    if devices is not None and devices < len(found) and jax.process_count() > 1:
        raise ValueError(
            f"devices must be {len(found)}, all of them, on several hosts; got "
            f"{devices}. Leave it out, or use fewer hosts."
        )
    chosen = np.array(found[:devices])
    if fsdp < 1 or chosen.size % fsdp:
        fitting = [n for n in range(1, chosen.size + 1) if chosen.size % n == 0]
        raise ValueError(
            f"fsdp must divide the number of devices, {chosen.size}; got {fsdp}. Give "
            f"one of {', '.join(map(str, fitting))}."
        )
    if fsdp == 1:
        return Mesh(chosen, (AXIS,), axis_types=(AxisType.Auto,))
    cut = chosen.reshape(-1, fsdp)
    return Mesh(cut, (AXIS, FSDP), axis_types=(AxisType.Auto,) * 2)


def split_cpu(batch_size: int | None = None) -> None:
    """Makes every CPU core a device of its own, where there is no accelerator.

    XLA runs much of a small network on one core, so that a device for each is faster.
    Nothing happens once JAX has looked for devices, or where XLA_FLAGS has a number.

    Args:
      batch_size: of training, which the devices have to share, at least `CPU_SHARE`
        images each; None for sampling, which fits any number.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    count = len(cores())
    if batch_size is not None:
        most = min(count, max(1, batch_size // CPU_SHARE))
        count = max(n for n in range(1, most + 1) if batch_size % n == 0)
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def cores() -> list[int]:
    """Returns the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # macOS


def take_cores(chosen: set[int]) -> None:
    """Runs this process on these cores alone, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, chosen)


def local_mesh() -> Mesh:
    """Returns a mesh with one axis, "data", over the devices of this host alone."""
    return make_mesh(found=jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that holds a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that cuts the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def state_sharding(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns how each array of a state lies on the devices, a tree of shardings.

    A large array is cut along its longest axis that divides by the size of the mesh's
    axis "fsdp"; other arrays, and all on a mesh without that axis, are copied.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`.
      mesh: the devices.

    >>> found = state_sharding({"w": np.zeros([64, 64])}, make_mesh(1))
    >>> found["w"].is_fully_replicated
    True
    """
    parts = mesh.shape.get(FSDP, 1)

    def place(x: Any) -> NamedSharding:
        typed_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        fitting = [axis for axis, size in enumerate(x.shape) if size % parts == 0]
        if parts == 1 or typed_key or x.size < SMALL or not fitting:
            return replicated(mesh)
        longest = max(fitting, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, FSDP))

    return jax.tree.map(place, tree)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns arrays placed on the devices by a tree of shardings.

    On several hosts all must call it with the same values, which is not checked.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    # device_put compares the values of all hosts one by one, and takes no random keys.
    return jax.jit(lambda x: x, out_shardings=shardings)(tree)


def whole(tree: PyTree) -> PyTree:
    """Returns a tree of which every device has a copy, so that every host can read it.

    On several hosts all must call it. A tree that is copied already is returned as is.
    """
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    if all(x.is_fully_replicated for x in leaves):
        return tree
    cut: Any = next(x.sharding for x in leaves if not x.is_fully_replicated)
    return place(tree, jax.tree.map(lambda _: replicated(cut.mesh), tree))


def gathered(loss_fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Returns a loss of parameters that are cut over the axis "fsdp".

    They are gathered for the loss; its gradient is cut as they are.

    Args:
      loss_fn: from (params, ...) to anything.
      mesh: the devices; without that axis the loss is returned as is.
    """
    if FSDP not in mesh.shape:
        return loss_fn

    @jax.custom_vjp
    def gather(params: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(params, replicated(mesh))

    def forward(params: PyTree) -> tuple[PyTree, None]:
        return gather(params), None

    def backward(_: None, grad: PyTree) -> tuple[PyTree]:
        # The transpose of forward would sum the whole gradient on every device, of
        # which each needs its own part alone.
        return (jax.lax.with_sharding_constraint(grad, state_sharding(grad, mesh)),)

    gather.defvjp(forward, backward)

    def loss(params: PyTree, *rest: Any) -> Any:
        return loss_fn(gather(params), *rest)

    return loss


def shard(batch: PyTree, mesh: Mesh) -> PyTree:
    """Returns the global batch on the devices, from this host's share of it.

    Args:
      batch: arrays [B / hosts, ...] on the host, or arrays that are global already.
      mesh: the devices.
    """

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharded(mesh))
        return jax.make_array_from_process_local_data(sharded(mesh), np.asarray(x))

    return jax.tree.map(put, batch)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of (state, batch) that is compiled for a mesh."""

    program: Any
    put: Callable[[PyTree], PyTree]
    """From a batch as in `shard` to the program's second argument."""
    rest: tuple[PyTree, ...]
    """The program's further arguments."""

    def __call__(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        """Returns the next state and the metrics."""
        made: tuple[PyTree, PyTree]
        made = self.program(state, self.put(batch), *self.rest)
        return made

    def compile(self, state: PyTree, batch: PyTree) -> None:
        """Compiles it ahead of the first call.

        Args:
          state: the state, or `jax.ShapeDtypeStruct` of it.
          batch: as in a call.
        """
        self.program.lower(state, self.put(batch), *self.rest).compile()


def data_parallel(
    step: Callable[..., tuple[PyTree, PyTree]],
    mesh: Mesh,
    *,
    strategy: str = "mesh",
    stored: PyTree = None,
    options: compilation.Options | None = None,
) -> Step:
    """Returns the step compiled for a mesh: the batch is cut, the state is copied.

    On a mesh with the axis "fsdp" the state is cut too, as `state_sharding` says.

    Args:
      step: a pure function from (state, batch) to (state, metrics).
      mesh: the devices.
      strategy: "mesh", "pmap" or "shard_map"; the latter two need a step that
        averages over the axis "data".
      stored: the step's third argument, copied to every device, such as images that the
        batch has indices of; with None the step has two arguments.
      options: of the compiler, which "pmap" does not take; when not given, those of
        `compilation.OPTIONS`.

    Returns:
      A function of (state, batch) with batch as in `shard`. Under "mesh" and
      "shard_map" the arrays of the state are donated.

    Raises:
      ValueError: an unknown strategy, one that cannot cut the state, or a batch that
        the devices cannot share.
    """
    if strategy not in STRATEGIES:
        raise_unknown("strategy", strategy, STRATEGIES)
    if strategy != "mesh" and FSDP in mesh.shape:
        raise ValueError(
            "strategy must be 'mesh' where devices share a copy of the state; got "
            f"{strategy!r} with fsdp {mesh.shape[FSDP]}. Use 'mesh', or an fsdp of 1."
        )
    # An argument, since XLA would make a constant of what the program closes over.
    rest = () if stored is None else (stored,)
    if strategy == "pmap":
        program: Any = jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(None, 0, None)[: 2 + len(rest)],
            out_axes=None,
            devices=list(mesh.devices.flat),
        )
    else:
        copied: Any = replicated(mesh)
        specs = (copied.spec, PartitionSpec(AXIS), copied.spec)[: 2 + len(rest)]
        if strategy == "shard_map":
            # check_vma would sum gradients that the step averages by itself.
            step = jax.shard_map(
                step, mesh=mesh, in_specs=specs, out_specs=copied.spec, check_vma=False
            )
        elif FSDP in mesh.shape:
            step, copied = _cut(step, mesh), None
        if options is None:
            options = compilation.options(mesh.devices.flat[0])
        program = jax.jit(
            step,
            in_shardings=(copied, sharded(mesh), replicated(mesh))[: 2 + len(rest)],
            out_shardings=(copied, replicated(mesh)),
            donate_argnums=0,
            compiler_options=options,
        )

    def put(batch: PyTree) -> PyTree:
        local = mesh.size // jax.process_count()
        check_batch_size(len(jax.tree.leaves(batch)[0]), local)
        if strategy == "pmap":
            return jax.tree.map(lambda x: x.reshape(local, -1, *x.shape[1:]), batch)
        return shard(batch, mesh)

    return Step(program, put, rest)


def _cut(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Returns the step from a state that is cut to one that is cut alike."""

    def cut(state: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(state, state_sharding(state, mesh))

    def run(state: PyTree, *rest: PyTree) -> tuple[PyTree, PyTree]:
        new, metrics = step(cut(state), *rest)
        return cut(new), metrics

    return run


def check_batch_size(batch_size: int, devices: int) -> None:
    """Raises ValueError unless the devices can share the batch equally."""
    if batch_size % devices:
        raise ValueError(
            f"the batch size must be a multiple of the number of devices, {devices}; "
            f"got {batch_size}. The nearest that fit are "
            f"{max(batch_size // devices, 1) * devices} and "
            f"{(batch_size // devices + 1) * devices}."
        )


def persistent_cache(directory: str | os.PathLike[str]) -> None:
    """Keeps compiled programs in a folder, so that a second start compiles nothing.

    One that was chosen before, as by JAX_COMPILATION_CACHE_DIR, is left.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    # Small ones too: there are many.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
