"""One pure step on many devices, by three strategies that give the same gradients.

  mesh       `jit` over a mesh of devices with named shardings: the default. The step
             sees the whole batch, so what it draws at random does not depend on the
             number of devices.
  pmap       `jax.pmap`: each device runs the step on its share of the batch and takes
             part in a `pmean` by name. JAX keeps pmap in maintenance mode.
  shard_map  the same program as pmap on JAX's present interface.

pmap and shard_map need a step that averages over the axis "data"
(`make_step(..., axis_name=parallel.AXIS)`).
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
STRATEGIES = ("mesh", "pmap", "shard_map")

PyTree = Any


def make_mesh(devices: int | None = None) -> Mesh:
    """Returns a mesh with one axis, "data", over the devices of all hosts.

    Args:
      devices: how many devices to use; all when not given.

    Raises:
      ValueError: there are not that many.
    """
    found = jax.devices()
    if devices is not None and not 1 <= devices <= len(found):
        raise ValueError(
            f"devices must be in 1..{len(found)}, what JAX finds here; got {devices}. "
            "Leave it out to use all."
        )
    return jax.make_mesh(
        (devices or len(found),),
        (AXIS,),
        axis_types=(AxisType.Auto,),
        devices=found[:devices],
    )


def split_cpu() -> None:
    """Makes every CPU core a device of its own, where there is no accelerator.

    XLA runs much of a small network on one core; chains that share nothing are drawn
    faster by a core each. Nothing happens once JAX has looked for devices, or where
    XLA_FLAGS says how many there are.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", len(cores()))


def cores() -> list[int]:
    """Returns the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # as on macOS, which ties nobody down


def take_cores(chosen: set[int]) -> None:
    """Ties this process to some cores, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, chosen)


def local_mesh() -> Mesh:
    """Returns a mesh with one axis, "data", over the devices of this host alone."""
    found = jax.local_devices()
    axis_types = (AxisType.Auto,)
    return jax.make_mesh((len(found),), (AXIS,), axis_types=axis_types, devices=found)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that holds a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that cuts the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


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


def data_parallel(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    mesh: Mesh,
    *,
    strategy: str = "mesh",
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Returns the step compiled for a mesh: the batch is cut, the state is copied.

    Args:
      step: a pure function from (state, batch) to (state, metrics).
      mesh: the devices.
      strategy: "mesh", "pmap" or "shard_map"; the latter two need a step that
        averages over the axis "data".

    Returns:
      A function of (state, batch) with batch as in `shard`. Under "mesh" and
      "shard_map" the state passed in is used up.

    Raises:
      ValueError: an unknown strategy, or a batch that the devices cannot share.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}. "
            "Use 'mesh' unless you need per-device semantics."
        )
    count = mesh.size
    if strategy == "pmap":
        mapped = jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=list(mesh.devices.flat),
        )
    else:
        inner = step
        if strategy == "shard_map":
            # check_vma=False: the step's own pmean is the only mean there is.
            inner = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
        compiled = jax.jit(
            inner,
            in_shardings=(replicated(mesh), sharded(mesh)),
            out_shardings=replicated(mesh),
            donate_argnums=0,
        )

    def run(state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        check_batch_size(len(jax.tree.leaves(batch)[0]), count // jax.process_count())
        if strategy == "pmap":
            local = count // jax.process_count()
            cut = jax.tree.map(lambda x: x.reshape(local, -1, *x.shape[1:]), batch)
            return mapped(state, cut)
        return compiled(state, shard(batch, mesh))

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

    A folder that was chosen before, as by JAX_COMPILATION_CACHE_DIR, stays.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
