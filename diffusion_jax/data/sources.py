"""Finds and reads the data sets that are known by name."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from diffusion_jax.data.arrays import as_images, as_labels
from diffusion_jax.data.formats import (
    CIFAR10_ARCHIVES,
    find_cifar10,
    read_cifar10,
    read_idx,
)
from diffusion_jax.data.image_files import LazyImages
from diffusion_jax.data.prepared_tfds import read_tfds, tfds_folder
from diffusion_jax.errors import DataError, needs
from diffusion_jax.storage import download as downloading

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's digits, whose 17 grey levels are spread over 0..255."""
    needs("sklearn", "read the digits", "digits")
    # Its file, found without importing it: that alone takes longer than a second.
    spec = find_spec("sklearn")
    package = Path(spec.origin if spec and spec.origin else "sklearn")
    table = package.with_name("datasets") / "data" / "digits.csv.gz"
    if table.is_file():
        rows = np.loadtxt(table, delimiter=",", dtype=np.float64)
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        rows = np.column_stack([digits.data, digits.target])
    images = np.round(rows[:, :64] * (255 / 16)).astype(np.uint8)
    return images.reshape(-1, 8, 8, 1), rows[:, 64].astype(np.int32)


def cifar10(
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
) -> tuple[np.ndarray | LazyImages, np.ndarray | None]:
    """Returns CIFAR-10's `(images, labels)` from the first place that has it.

    Args:
      split: "train" (50,000 images) or "test" (10,000).
      data_dir: look here and nowhere else: the official archive, or a folder that
        holds it, what was extracted from it, or what tensorflow-datasets prepared.
      download: fetch the official archive into the cache where it is nowhere else.

    Raises:
      DataError: it is nowhere and cannot be fetched, or is damaged.
    """
    if data_dir is not None and find_cifar10(data_dir):
        return read_cifar10(data_dir, split)
    try:
        prepared = tfds_folder(data_dir)
        got = f"nothing at {prepared}"
        if (prepared / "cifar10").is_dir():
            return read_tfds("cifar10", split, data_dir=prepared)
    except DataError as error:  # there may still be a copy elsewhere
        got = str(error)
    # A path that was given is meant: nothing else stands in for it.
    if data_dir is not None:
        raise _no_cifar10(got)
    cache = downloading.cache_folder()
    if find_cifar10(cache) is None:
        if not download:
            raise _no_cifar10(f"{got}, nothing at {cache}, and download=False")
        try:
            archive = cache / CIFAR10_ARCHIVES[0]
            downloading.fetch(CIFAR10_URL, archive, sha256=_CIFAR10_SHA256)
        except DataError as error:
            raise _no_cifar10(f"{got}, nothing at {cache}, and: {error}") from error
    return read_cifar10(cache, split)


def _no_cifar10(got: str) -> DataError:
    return DataError(
        f"CIFAR-10 must be on this machine or within reach; got {got}\n"
        "Do one of these:\n"
        f"  - download {CIFAR10_URL} (162 MiB) where there is a network, and give its "
        f"path as data_dir, or put it in {downloading.cache_folder()};\n"
        f"  - give as data_dir a {CIFAR10_ARCHIVES[1]}, or the folder "
        "cifar-10-batches-bin or cifar-10-batches-py extracted from an archive;\n"
        "  - prepare it with tensorflow-datasets (needs TensorFlow, once): "
        "tfds.builder('cifar10', file_format='array_record').download_and_prepare(), "
        "into ~/tensorflow_datasets, TFDS_DATA_DIR or a folder given as data_dir;\n"
        "  - try without it: the source 'digits' needs no download."
    )


def mnist(
    kind: str, split: str, data_dir: str | os.PathLike[str] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns MNIST or Fashion-MNIST from its folder of IDX files."""
    where = data_dir or (FASHION_MNIST_FOLDER if kind == "fashion_mnist" else None)
    folder = Path(where) if where else None
    prefix = "train" if split == "train" else "t10k"
    found = []
    for stem in (f"{prefix}-images-idx3", f"{prefix}-labels-idx1"):
        # Both spellings are about: the official one, and that of some unpackers.
        names = (stem + "-ubyte", stem.replace("-idx", ".idx") + "-ubyte")
        paths = [folder / (n + z) for n in names for z in ("", ".gz")] if folder else []
        found += [path for path in paths if path.is_file()][:1]
    if len(found) == 2:
        return _images_and_labels(found[0], found[1])
    give = "Give"
    if kind == "fashion_mnist":
        give = "Install Debian's package dataset-fashion-mnist, or give"
    raise DataError(
        f"{kind} must have {prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte "
        f"(or .gz); got {folder or 'no data_dir'}, which does not hold both. {give} "
        f"as data_dir the folder that holds them, or prepare it with "
        f"tensorflow-datasets and load 'tfds:{kind}'."
    )


def idx(argument: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns images and labels of "<images file>[,<labels file>]"."""
    images, _, labels = argument.partition(",")
    if Path(argument).expanduser().is_file():  # a path may have a comma of its own
        images, labels = argument, ""
    return _images_and_labels(
        Path(images).expanduser(), Path(labels).expanduser() if labels else None
    )


def _images_and_labels(
    images_path: Path, labels_path: Path | None
) -> tuple[np.ndarray, np.ndarray | None]:
    images = as_images(read_idx(images_path), images_path)
    labels = None if labels_path is None else read_idx(labels_path)
    return images, as_labels(labels, len(images), labels_path or "")
