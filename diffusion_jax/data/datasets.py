"""Data sets of images, and the order in which training sees them.

    dataset = load("cifar10")
    indices = batch_indices(seed, step, len(dataset.images), batch_size)
    batch = batch_at(dataset, indices[host_slice(batch_size, process, processes)])

Everything is NumPy on the host: images stay uint8 until the compiled step, which
scales and flips them. There is no iterator and no state to save: what step k sees is a
pure function of (seed, k), so training resumes exactly from the step number alone.
"""

from __future__ import annotations

import difflib
import functools
import operator
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data import image_files, image_folders, parquet
from diffusion_jax.data.image_files import LazyImages
from diffusion_jax.data.prepared_tfds import read_tfds
from diffusion_jax.data.sizes import Size, fitter, sides
from diffusion_jax.data.sources import cifar10, digits, idx, mnist, read_npz
from diffusion_jax.errors import DataError

__all__ = [
    "SOURCES",
    "DataError",
    "Dataset",
    "batch_at",
    "batch_indices",
    "choose",
    "host_slice",
    "load",
]

SOURCES = (
    "digits",
    "cifar10",
    "mnist",
    "fashion_mnist",
    "tfds:<name>",
    "folder:<path>",
    "hf:<path>[,<column of labels>]",
    "npz:<path>",
    "idx:<images file>[,<labels file>]",
)


class Dataset(NamedTuple):
    """Images and what belongs to them.

    Attributes:
      images: uint8 [N, H, W, C]; an array, or, beyond memory, a `LazyImages` that
        has `shape`, `len` and indexing by an array of integers.
      labels: int32 [N], or None.
      name: the source, as it was given to `load`.
      classes: names of the classes 0, 1, ...; empty where unknown.
    """

    images: np.ndarray | LazyImages
    labels: np.ndarray | None
    name: str
    classes: tuple[str, ...] = ()


def load(
    source: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    image_size: Size | None = None,
    fit: str | None = None,
    channels: int | None = None,
    download: bool = True,
    skip_unreadable: bool = False,
    labelled: bool = False,
    memory_limit: int = 2**31,
) -> Dataset:
    """Returns the images and labels of a source.

    Args:
      source: one of `SOURCES`. "digits" (1,797 8x8 digits) comes with scikit-learn.
        "cifar10" is looked for in `data_dir` if given, else among what
        tensorflow-datasets has prepared, else in the cache folder
        (`XDG_CACHE_HOME` or `~/.cache`)/diffusion_jax, else downloaded into that.
      split: "train" or "test"; for "tfds:" any split expression, such as
        "train[:10%]"; for "hf:" the files so named. Folders, npz and idx files, and
        digits are all "train".
      data_dir: for cifar10 the official archive, or a folder that holds it, what was
        extracted from it, or what tensorflow-datasets prepared; for mnist and
        fashion_mnist the folder of IDX files; for tfds its folder of prepared data.
      image_size: pixels a side, or height and width; None keeps the images' own. A
        folder and hf need it.
      fit: how images of another size become `image_size`: "pad" (the default) puts
        smaller ones on black; "crop" (always for a folder and hf) cuts the largest
        rectangle of that shape from the middle and resamples it.
      channels: folder and hf only: 3 (RGB, the default) or 1 (grey).
      download: cifar10 only: whether it may be fetched from the network.
      skip_unreadable: folder and hf only: leave out broken files, with a warning.
      labelled: folder and hf only: whether each image must have a label: of a folder
        what `dataset.json` says, else the place of its subfolder; of hf the column.
        Others have theirs anyway.
      memory_limit: bytes; folders and tfds beyond it are read batch by batch.

    Raises:
      DataError: the source is unknown, missing or damaged, or does not fit.

    >>> load("digits", image_size=16).images.shape
    (1797, 16, 16, 1)
    """
    kind, _, argument = source.partition(":")
    _check_arguments(source, kind, split, data_dir)
    images: np.ndarray | LazyImages
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    if kind == "digits":
        images, labels = digits()
    elif kind == "cifar10":
        images, labels = cifar10(split, data_dir, download=download)
    elif kind in ("mnist", "fashion_mnist"):
        images, labels = mnist(kind, split, data_dir)
    elif kind == "tfds":
        images, labels = read_tfds(
            argument,
            split,
            data_dir=data_dir,
            image_size=image_size,
            fit=fit,
            memory_limit=memory_limit,
        )
    elif kind in ("folder", "hf"):
        size = _folder_size(argument, image_size, fit, channels)
        if kind == "folder":
            files = image_folders.find(Path(argument).expanduser())
        else:
            files = parquet.find(argument, split)
        if labelled:  # what is wrong with them is said before any image is read
            labels, classes = files.labels()
        images, kept = image_files.read(
            files,
            size,
            channels=channels or 3,
            skip_unreadable=skip_unreadable,
            memory_limit=memory_limit,
        )
        labels = None if labels is None else labels[kept]
    elif kind == "npz":
        images, labels = read_npz(Path(argument).expanduser())
    else:
        images, labels = idx(argument)
    images = _fit(images, image_size, fit, channels, source)
    return Dataset(images, labels, source, classes)


def choose(available: int, most: int | None, seed: int) -> np.ndarray:
    """Returns the indices of a random choice of images, in order: at most `most`."""
    count = min(available, most or available)
    if count == available:
        return np.arange(available)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(available, count, replace=False))


def held_out(dataset: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Returns the images to train on and those held out, always the same ones.

    Args:
      dataset: the images.
      share: of them to hold out, above 0 and below 1; one image at least.

    Raises:
      DataError: there are too few to keep some for both.

    >>> [len(part.images) for part in held_out(load("digits"), 0.1)]
    [1617, 180]
    """
    count = len(dataset.images)
    size = max(1, round(share * count))
    if size >= count:
        raise DataError(
            f"the images must be more than those held out; got {count} in "
            f"{dataset.name}, and {size} to hold out. Give more images, or hold out "
            "fewer."
        )
    order = _permutation(0, 0, count)
    return _part(dataset, np.sort(order[size:])), _part(dataset, np.sort(order[:size]))


def _part(dataset: Dataset, chosen: np.ndarray) -> Dataset:
    images, labels = dataset.images, dataset.labels
    if isinstance(images, LazyImages):
        read, shape = images.read, (len(chosen), *images.shape[1:])
        part: Any = LazyImages(lambda i: read(int(chosen[i])), shape)
    else:
        part = images[chosen]
    return dataset._replace(
        images=part, labels=None if labels is None else labels[chosen]
    )


def middle(dataset: Dataset, size: tuple[int, int]) -> Dataset:
    """Returns the data set with the middle of each image, of a height and width.

    >>> middle(load("digits"), (6, 4)).images.shape
    (1797, 6, 4, 1)
    """
    images = dataset.images
    top, left = (np.array(images.shape[1:3]) - size) // 2
    if min(top, left) < 0:
        raise DataError(
            f"size must be at most that of the images; got {size} for "
            f"{images.shape[1:3]}. Load them larger."
        )
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    if isinstance(images, LazyImages):
        read, shape = images.read, (len(images), *size, images.shape[3])
        return dataset._replace(
            images=LazyImages(lambda i: read(i)[rows, columns], shape)
        )
    return dataset._replace(images=images[:, rows, columns])


def check_source(source: str) -> None:
    """Raises DataError for a source that `load` does not know; nothing is read."""
    kind, _, argument = source.partition(":")
    with_argument = {s.partition(":")[0]: ":" in s for s in SOURCES}
    if kind not in with_argument or with_argument[kind] != bool(argument):
        close = difflib.get_close_matches(kind, list(with_argument), n=1)
        meant = next((s for s in SOURCES if close and s.startswith(close[0])), "")
        raise DataError(
            f"source must be one of {', '.join(SOURCES)}; got {source!r}. "
            + (f"Did you mean {meant!r}?" if meant else "Give one of these; ")
            + ("" if meant else f"a folder of images is 'folder:{source}'.")
        )


def _check_arguments(
    source: str,
    kind: str,
    split: str,
    data_dir: str | os.PathLike[str] | None,
) -> None:
    """Raises where the source is unknown or is given what it does not take."""
    check_source(source)
    alone = kind in ("digits", "folder", "npz", "idx")
    splits = ("train",) if alone else ("train", "test")
    if kind != "tfds" and split not in splits:
        raise DataError(
            f"split of {kind} must be {' or '.join(map(repr, splits))}; got {split!r}. "
            "Give one of these, or hold images out in training: --data.hold-out 0.1."
        )
    if (alone or kind == "hf") and data_dir is not None:
        raise DataError(
            f"data_dir must not be given for {kind}; got {os.fspath(data_dir)!r}. "
            "Put the path in the source, after the colon."
        )


def _folder_size(
    argument: str, image_size: Size | None, fit: str | None, channels: int | None
) -> Size:
    """Returns the image size of a folder, after checking its options."""
    if image_size is None or fit not in (None, "crop") or channels not in (None, 1, 3):
        raise DataError(
            "image files must be loaded with image_size, fit='crop' (or none) and "
            f"channels 1 or 3; got image_size={image_size}, fit={fit!r}, "
            f"channels={channels} for {argument}. Give for instance image_size=64."
        )
    return sides(image_size)


def _fit(
    images: np.ndarray | LazyImages,
    image_size: Size | None,
    fit: str | None,
    channels: int | None,
    source: str,
) -> np.ndarray | LazyImages:
    """Returns the images at `image_size`; those that are already pass through."""
    if channels not in (None, images.shape[-1]):
        raise DataError(
            f"channels must be the images' own {images.shape[-1]} for {source}; got "
            f"{channels}. Give channels={images.shape[-1]}: only a folder's images are "
            "converted."
        )
    fit_image, fitted = fitter(images.shape[1:], image_size, fit, source)
    if fitted == images.shape[1:] or isinstance(images, LazyImages):
        return images
    return fit_image(images)


def batch_indices(
    seed: int, step: int, num_examples: int, batch_size: int
) -> np.ndarray:
    """Returns the int64 [batch_size] indices of the examples that a step sees.

    A pure function of its arguments. The stream of steps runs through one
    permutation an epoch, each drawn from (seed, epoch), with no break between epochs:
    a batch may hold the end of one and the beginning of the next, and no example is
    ever left out.

    Args:
      seed: 0 <= seed < 2**64.
      step: 0, 1, ...; step k sees places k * batch_size onwards of the stream.
      num_examples: size of the data set, 1 or more.
      batch_size: of the whole batch, over all hosts, 1 or more.

    Raises:
      DataError: an argument is out of range.

    >>> sorted(np.concatenate([batch_indices(0, k, 4, 2) for k in (0, 1)]).tolist())
    [0, 1, 2, 3]
    """
    seed = _whole("seed", seed, 0, 2**64)
    step = _whole("step", step, 0)
    num_examples = _whole("num_examples", num_examples, 1)
    batch_size = _whole("batch_size", batch_size, 1)
    place, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    while place < stop:
        epoch, first = divmod(place, num_examples)
        last = min(num_examples, first + stop - place)
        parts.append(_permutation(seed, epoch, num_examples)[first:last])
        place += last - first
    return np.concatenate(parts)


# Two epochs: the one under way and the next, which share a batch at the border.
@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    # The raw bits of Philox are fixed for all time, those of Generator.permutation
    # may change with NumPy: a run must resume alike after an upgrade.
    bits = np.random.Philox(key=seed + (epoch << 64)).random_raw(num_examples)
    return np.argsort(bits, kind="stable").astype(np.int64)


def host_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns the part of each global batch that one host reads.

    The slices of all hosts are disjoint and together are the batch.

    Args:
      batch_size: of the whole batch, a multiple of `process_count`.
      process_index: this host's, `jax.process_index()`.
      process_count: `jax.process_count()`.

    Raises:
      DataError: the batch cannot be shared out evenly, or there is no such host.

    >>> host_slice(128, 1, 4)
    slice(32, 64, None)
    """
    process_count = _whole("process_count", process_count, 1)
    process_index = _whole("process_index", process_index, 0, process_count)
    batch_size = _whole("batch_size", batch_size, 1)
    if batch_size % process_count:
        below = batch_size // process_count * process_count
        nearest = f"{below} or " if below else ""
        raise DataError(
            f"batch_size must be a multiple of process_count; got {batch_size} for "
            f"{process_count} hosts. Give {nearest}{below + process_count}."
        )
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def batch_at(dataset: Dataset, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns `{"image": uint8 [B, H, W, C]}`, and `"label": int32 [B]` if labelled.

    Args:
      dataset: what `load` returned.
      indices: integers [B], 0 <= index < N.
    """
    if not 0 <= np.min(indices) <= np.max(indices) < len(dataset.images):
        raise IndexError(
            f"indices must be in 0..{len(dataset.images) - 1}; got "
            f"{np.min(indices)}..{np.max(indices)}. Count images from 0."
        )
    batch = {"image": dataset.images[indices]}
    if dataset.labels is not None:
        batch["label"] = dataset.labels[indices]
    return batch


def _whole(name: str, value: int, low: int, high: int | None = None) -> int:
    """Returns value as a Python int, which cannot overflow."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if number < low or (high is not None and number >= high):
        bound = f"{low} <= {name}" + ("" if high is None else f" < {high}")
        raise DataError(
            f"{name} must be a whole number with {bound}; got {value!r}. "
            "Give one in that range."
        )
    return number
