"""Samples on disk: drawn in batches, so that an interrupted evaluation goes on."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from diffusion_jax.evaluation import images
from diffusion_jax.training import parallel
from experiments import build, runs
from experiments.config import Config


def digest(tree: Any) -> str:
    """Returns a sha256 over all arrays of a tree, with their names and types."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def to_disk(
    folder: Path,
    config: Config,
    params: Any,
    *,
    count: int,
    seed: int,
    steps: int,
    variance: str,
    batch_size: int,
) -> np.ndarray:
    """Returns uint8 samples, [count, H, W, C], drawing those that are not there yet.

    The file is named after all that decides what is in it, so that other weights or
    another sampler never meet old samples.

    Args:
      folder: where the samples go.
      config: of the run.
      params: the weights to draw with.
      count: how many images.
      seed: of the noise; image i depends on (seed, i) alone.
      steps: reverse steps.
      variance: of the reverse steps.
      batch_size: images at a time.
    """
    about = {
        "weights": digest(params),
        "seed": seed,
        "count": count,
        "steps": steps,
        "variance": variance,
        "clip": config.sample.clip,
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path, record = folder / f"{name}.npy", folder / f"{name}.json"
    shape = (count, *(config.data.image_size,) * 2, config.data.channels)
    done = 0
    if path.exists() and record.exists():
        done = json.loads(record.read_text())["done"]
    folder.mkdir(parents=True, exist_ok=True)
    mode: Any = "r+" if done else "w+"
    array = np.lib.format.open_memmap(path, mode, np.uint8, shape)
    if done == count:
        return array
    if done:
        print(f"going on from sample {done:,} of {count:,}")
    size = min(batch_size, count)
    draw = build.make_draw(
        config, size, parallel.make_mesh(), steps=steps, variance=variance
    )
    key = jax.random.key(seed)
    bar = tqdm(total=count, initial=done, unit="image", disable=not sys.stderr.isatty())
    with bar:
        for first in range(done, count, size):
            batch = images.to_uint8(draw(params, key, first)[: count - first])
            array[first : first + len(batch)] = batch
            # The samples reach the disk before the note that says they are there.
            array.flush()
            runs.write_json(record, {**about, "done": first + len(batch)})
            bar.update(len(batch))
    return array
