"""Draws samples in batches, or into a file that a later evaluation goes on with."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.errors import counted
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.process import hosts, progress
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import chains
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.storage import trees
from diffusion_jax.training import parallel


@functools.lru_cache(maxsize=16)
def _draw(config: Config, size: int) -> Callable[..., np.ndarray]:
    return chains.make_draw(config, size, parallel.make_mesh())


def in_batches(
    config: Config,
    drawable: Drawable,
    key: jax.Array,
    count: int,
    batch_size: int,
    done: int = 0,
) -> Iterator[np.ndarray]:
    """Yields batches of uint8 images, [B, H, W, C], `count` in all.

    All devices of all hosts draw, and every host gets all images.

    Image i depends on (key, i) alone; `done` of them are there already, and left out.
    """
    size = min(batch_size, count)
    draw = _draw(config, size)
    said = f"drawing: {counted(-(-(count - done) // size), 'batch', 'batches')}"
    if steps := chains.describe_sampling(config).get("steps"):
        said += f" of {counted(steps, 'step')}"
    with progress.clock(said, total=count, done=done, shown=hosts.first()) as bar:
        for first in range(done, count, size):
            # The last batch is drawn whole and cut, so that nothing compiles again.
            batch = draw(drawable, key, first)[: count - first]
            bar.update(len(batch))
            yield pictures.to_uint8(batch)


def to_disk(
    folder: Path,
    config: Config,
    drawable: Drawable,
    *,
    count: int,
    seed: int,
    batch_size: int,
) -> np.ndarray:
    """Returns uint8 samples, [count, H, W, C], drawing those that are not there yet.

    All devices of all hosts draw; only the first host gets the samples.

    The file is named after all that decides what is in it, so that other weights or
    another sampler never meet old samples.

    Image i depends on (seed, i) alone.
    """
    # A digest leaves out what is None.
    names = "x0_variance", "classifier", "space"
    added = {name: getattr(drawable, name) for name in names}
    about = {
        "weights": trees.digest({**drawable.params, **added}),
        "seed": seed,
        "count": count,
        **chains.describe_sampling(config),
    }
    name = runs.name_by(about)
    path, record = folder / f"{name}.npy", folder / f"{name}.json"
    shape = (count, *config.data.shape)
    # The first host decides, and writes.
    done = hosts.tell(_done(path, record, about, shape))
    array: Any = np.zeros(0, np.uint8)
    if hosts.first():
        folder.mkdir(parents=True, exist_ok=True)
        if not done:
            record.unlink(missing_ok=True)  # it must not outlive its samples
        mode: Any = "r+" if done else "w+"
        array = np.lib.format.open_memmap(path, mode, np.uint8, shape)
    if done == count:
        return array
    if done:
        print(f"going on from sample {done:,} of {count:,}")
    drawable, key = jax.tree.map(np.asarray, drawable), jax.random.key(seed)
    for batch in in_batches(config, drawable, key, count, batch_size, done):
        first, done = done, done + len(batch)
        if hosts.first():
            array[first:done] = batch
            # The samples reach the disk before the record that counts them.
            array.flush()
            runs.write_json(record, {**about, "done": done})
    return array


def _done(
    path: Path, record: Path, about: dict[str, Any], shape: tuple[int, ...]
) -> int:
    """Returns how many samples are on disk: none, unless file and note are whole."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return 0
    whole = stored.shape == shape and stored.dtype == np.uint8
    done = runs.recalled(record, about, lambda done: int(done)) if whole else 0
    return done if done and 0 <= done <= shape[0] else 0
