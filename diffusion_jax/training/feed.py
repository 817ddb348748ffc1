"""How batches reach the training step: from the device, from grain, or from the host.

    feed = make(dataset, mesh, seed=0, batch_size=128)
    if feed.stored is not None:
        step = gathering(step)
    step = data_parallel(step, mesh, stored=feed.stored)
    for batch in feed.batches(0, 1000):
        state, metrics = step(state, batch)

  device  All images are on every device, and the compiled step is given indices.
  grain   The library of that name prepares batches in threads, and each is sent to the
          devices a step before it is needed.
  host    Each batch is gathered before its step, while the devices run the last one.

Step k sees the same by all three, to the bit: a pure function of (seed, k).
"""

from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.data import datasets
from diffusion_jax.data.image_files import LazyImages
from diffusion_jax.errors import needs
from diffusion_jax.training import parallel

Batch = dict[str, Any]
Batches = Generator[Batch, None, None]
Source = Literal["auto", "device", "grain", "host"]

SHARE = 1 / 8
"""Of a device's memory, for images that stay on it."""
LIMIT = 2**31
"""Bytes for all copies of them, where the memory of devices is not known."""
THREADS, WAITING = 2, 4
"""Threads of grain, and batches that they prepare ahead."""


class Feed(NamedTuple):
    """Where batches come from."""

    source: str
    """device, grain or host."""
    batches: Callable[[int, int], Batches]
    """From the first step and the one after the last to their batches, in order. A
    generator that is left before its end must be closed: grain has threads."""
    stored: Any = None
    """With "device", the images, and labels if used, on every device."""


def make(
    dataset: datasets.Dataset,
    mesh: Mesh,
    *,
    seed: int,
    batch_size: int,
    labels: bool = False,
    source: Source = "auto",
    strategy: str = "mesh",
) -> Feed:
    """Returns the feed of a data set.

    Args:
      dataset: what `data.load` returned.
      mesh: the devices.
      seed: of the order of the images.
      batch_size: of the whole batch, over all hosts.
      labels: whether batches have labels.
      source: "device", "grain" or "host"; "auto" is the device where the images fit,
        else grain if it is installed, else the host.
      strategy: that of `parallel.data_parallel`.

    Raises:
      ValueError: the images cannot be on the device.
      MissingError: grain is asked for and not there.
    """
    source = choose(source, dataset, mesh)
    batch_of = partial(batch_at, dataset, labels, seed, batch_size)
    indices_of = partial(indices_at, dataset, seed, batch_size)

    def put(batch: Batch) -> Batch:
        # pmap takes batches that are on the host.
        return batch if strategy == "pmap" else parallel.shard(batch, mesh)

    def in_turn(of: Callable[[int], Batch], begin: int, end: int) -> Batches:
        return (of(step) for step in range(begin, end))

    if source == "host":
        return Feed(source, partial(in_turn, batch_of))
    if source == "grain":
        return Feed(source, partial(in_background, batch_of, put))
    stored: Batch = {"image": dataset.images}
    if labels:
        stored["label"] = dataset.labels
    copied = jax.tree.map(lambda _: parallel.replicated(mesh), stored)
    return Feed(source, partial(in_turn, indices_of), parallel.place(stored, copied))


def choose(source: Source, dataset: datasets.Dataset, mesh: Mesh) -> Source:
    """Returns the source, or the one that "auto" stands for; raises as `make`."""
    allowed = size_limit(mesh)
    held = 0 if isinstance(dataset.images, LazyImages) else dataset.images.nbytes
    fits = 0 < held <= allowed
    if source == "device" and not fits:
        got = f"{held / 2**20:.3g} MiB" if held else "images that are read as needed"
        raise ValueError(
            f"images on the device must be in memory, at most {allowed / 2**20:.3g} "
            f"MiB; got {got}. Use grain or host as the input."
        )
    if source == "grain":
        needs("grain", "prepare batches in the background", "grain")
    if source == "auto":
        return "device" if fits else "grain" if find_spec("grain") else "host"
    return source


def describe(feed: Feed) -> str:
    """Returns a feed's source in words."""
    if feed.source == "device":
        size = sum(x.nbytes for x in jax.tree.leaves(feed.stored)) / 2**20
        return f"images stay on the device, {size:.3g} MiB on each"
    if feed.source == "grain":
        return "prepared in the background by grain"
    return "from the host, a batch before each step"


def size_limit(mesh: Mesh) -> int:
    """Returns how many bytes of images may stay on each device of a mesh."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    known = [s["bytes_limit"] for s in stats if "bytes_limit" in s]
    if known:
        return int(min(known) * SHARE)
    # CPU devices share the memory of the host.
    return LIMIT // max(len(mesh.local_devices), 1)


def indices_at(
    dataset: datasets.Dataset, seed: int, batch_size: int, step: int
) -> Batch:
    """Returns this host's share of the "index" and "position" of a step, int32 [B]."""
    mine = datasets.host_slice(batch_size, jax.process_index(), jax.process_count())
    index = datasets.batch_indices(seed, step, len(dataset.images), batch_size)
    position = np.arange(batch_size, dtype=np.int32)
    return {"index": index[mine].astype(np.int32), "position": position[mine]}


def batch_at(
    dataset: datasets.Dataset, labels: bool, seed: int, batch_size: int, step: int
) -> Batch:
    """Returns this host's share of the batch of a step, with labels or without."""
    batch = indices_at(dataset, seed, batch_size, step)
    found = datasets.batch_at(dataset, batch.pop("index"))
    if not labels:
        found.pop("label", None)
    return {**found, **batch}


def gathering(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the step of (state, batch, stored) that finds its batch by "index"."""

    def gathered(state: Any, batch: Batch, stored: Any) -> Any:
        rest = {name: x for name, x in batch.items() if name != "index"}
        at = batch["index"]  # always in bounds
        found = {k: x.at[at].get(mode="promise_in_bounds") for k, x in stored.items()}
        # A barrier, to compile the step as for batches of the host: equal bits.
        return step(state, rest | jax.lax.optimization_barrier(found))

    return gathered


def in_background(
    batch_of: Callable[[int], Batch], put: Callable[[Batch], Batch], *ends: int
) -> Batches:
    """Yields the batches of steps ends[0]..ends[1]-1, made in grain's threads.

    Args:
      batch_of: from a step to its batch; called in threads.
      put: starts the transfer of a batch, one step before it is yielded.
      ends: the first step, and the one after the last.
    """
    import grain

    if not range(*ends):
        return
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=WAITING)
    steps = grain.MapDataset.range(*ends)
    with closing(iter(steps.map(batch_of).to_iter_dataset(options))) as batches:
        waiting = put(next(batches))
        for batch in batches:
            # The transfer of the next one starts before this one is used.
            now, waiting = waiting, put(batch)
            yield now
        yield waiting
