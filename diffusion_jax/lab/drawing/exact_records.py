"""Exact drawings, with a file by which another machine draws the same."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.codec import certified
from diffusion_jax.codec.certified import NONE, Listed
from diffusion_jax.errors import ConfigError, counted
from diffusion_jax.lab.drawing import exact
from diffusion_jax.lab.drawing.exact import Walk
from diffusion_jax.lab.process import progress, replaceable
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import json_fields
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.trained.exact import denoise64
from diffusion_jax.lab.wiring.chains import Drawable

MARK = replaceable.report_of("sample")
"""By which such a file is known."""
FREE = ("command", "network", "weights")
"""What a drawing says of itself that may differ between machines."""
HELP = "Give the .json that sample --exact wrote beside its picture."


class Record(NamedTuple):
    """What a file says of a drawing."""

    walk: Walk
    """The numbers of its steps."""
    listed: Listed
    """The values that were in doubt, as `exact.batch` counts them."""
    images: int
    """How many."""
    sha256: str
    """Of all pixels, image by image."""


def in_batches(
    config: Config,
    drawable: Drawable,
    made: dict[str, Any],
    out: Path,
    *,
    count: int,
    batch_size: int,
    given: Path | None = None,
) -> Iterator[np.ndarray]:
    """Returns batches of uint8 images, [B, H, W, C], which write a file at their end.

    Args:
      config: of the run, with the way to sample.
      drawable: the weights to draw with.
      made: as of `outputs.about`; its seed is taken.
      out: the file, by which another machine draws the same.
      count: how many images.
      batch_size: images at a time, at most.
      given: such a file of another machine, to draw the same by.

    Raises:
      ConfigError: a way to sample that is not exact; or the given file is of something
        else, or damaged, or the images are not those that it is of.
    """
    own, size = exact.walk_of(config, drawable), min(batch_size, count)
    theirs = None if given is None else read(given, own, made, config.data.shape)
    walk, known = (own, NONE) if theirs is None else (theirs.walk, theirs.listed)
    denoise, steps = denoise64(config, drawable), len(walk.times)

    def drawn() -> Iterator[np.ndarray]:
        digest, found = hashlib.sha256(), []
        batches = counted(-(-count // size), "batch", "batches")
        said = f"drawing exactly: {batches} of {counted(steps, 'step')}"
        with progress.clock(said, total=count) as bar:
            for first in range(0, count, size):
                # The last batch is drawn whole: nothing compiles again.
                shape, seed = (size, *config.data.shape), made["seed"]
                images, listed = exact.batch(
                    denoise, walk, shape, seed=seed, first=first, known=known
                )
                found.append(listed)
                digest.update(images[: count - first].tobytes())
                bar.update(len(images[: count - first]))
                yield images[: count - first]
        sha256, whole = digest.hexdigest(), certified.joined(found)
        if theirs is not None and theirs.images == count and theirs.sha256 != sha256:
            raise ConfigError(
                f"the pixels must have the sha256 of {given}, {theirs.sha256[:12]}; "
                f"got {sha256[:12]}. This machine's network differs from that one by "
                f"more than {certified.SURE:.1e}: other weights, or float64 that is "
                "none."
            )
        inside = whole.place < count * steps * int(np.prod(config.data.shape))
        kept = Listed(whole.place[inside], whole.value[inside])
        write(out, Record(walk, kept, count, sha256), made, config.data.shape)
        listed_in_all = counted(len(kept.place), "value")
        print(f"sha256 of the pixels: {sha256}; {listed_in_all} listed")

    return drawn()


def write(
    path: Path, record: Record, made: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """Writes what is to be known of a drawing.

    Args:
      path: of the file.
      record: of the drawing.
      made: as of `outputs.about`.
      shape: of an image.
    """
    walk, sizes = record.walk, (record.images, len(record.walk.times), np.prod(shape))
    places = np.unravel_index(record.listed.place, sizes)
    steps = np.concatenate([walk.times[:, None], walk.steps], axis=1)
    listed = np.stack([*places, record.listed.value], axis=1)
    said = {
        "images": record.images,
        "pixels_sha256": record.sha256,
        "start": walk.start,
        "walk": [" ".join(map(str, row)) for row in steps.tolist()],
        "listed": [" ".join(map(str, row)) for row in listed.tolist()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, made | said)


def read(path: Path, own: Walk, made: dict[str, Any], shape: tuple[int, ...]) -> Record:
    """Returns what a file says of a drawing.

    Args:
      path: of the file.
      own: the walk as this machine computes it.
      made: as of `outputs.about` here.
      shape: of an image.

    Raises:
      ConfigError: it is no such file, or of another network, seed or way to sample.
    """
    try:
        said = json_fields.load(path)
        differ = [name for name in made if name not in FREE]
        differ = [name for name in differ if said.get(name) != made[name]]
        count, sha256, start = said["images"], said["pixels_sha256"], said["start"]
        steps, listed = _table(said["walk"]), _table(said["listed"])
        if not (json_fields.is_whole(count) and 0 < count < 2**32):
            raise ValueError(f"{count!r} images")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. {HELP}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"cannot read {path}: no record of a drawing ({error}). {HELP}"
        ) from error
    if differ:
        raise ConfigError(
            f"{path} must be of the same drawing; got another {', '.join(differ)}. "
            "Give the flags that it says it was made with."
        )
    here = np.concatenate([own.times[:, None], own.steps], axis=1)
    near = steps.shape == here.shape and np.abs(steps - here).max() <= 1
    sizes = (count, len(here), int(np.prod(shape)))
    inside = (listed[:, :3] >= 0) & (listed[:, :3] < sizes)
    if not (near and start == own.start and inside.all()):
        raise ConfigError(
            f"{path} must be of the steps that this chain has; got others. The file is "
            "damaged, or of another version."
        )
    place = np.ravel_multi_index(tuple(listed[:, :3].T), sizes)
    order = np.argsort(place)
    walk = Walk(own.times, steps[:, 1:], start)
    return Record(walk, Listed(place[order], listed[order, 3]), count, sha256)


def _table(rows: list[str]) -> np.ndarray:
    """Returns rows of four whole numbers of at most 18 digits, int64 [N, 4]."""
    found = [[int(word[:20]) for word in row.split()] for row in rows]
    if any(len(row) != 4 or max(map(abs, row)) >= 10**18 for row in found):
        raise ValueError("rows of other than four whole numbers")
    return np.array(found, np.int64).reshape(-1, 4)
