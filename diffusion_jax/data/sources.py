"""Finds the data sets that are known by name, and reads files of data.

CIFAR-10 batches, IDX (MNIST) and npz: a file that is not what it should be raises
`DataError`. Archives are read without being extracted, and pickles without being run.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import pickletools
import struct
import warnings
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from diffusion_jax.data import arrays
from diffusion_jax.data.arrays import as_images, as_labels
from diffusion_jax.data.image_files import LazyImages
from diffusion_jax.data.prepared_tfds import read_tfds, tfds_folder
from diffusion_jax.errors import DataError, needs
from diffusion_jax.storage import archives
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


CIFAR10_ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")

# What the two archives hold, with what the names of batches in them end in.
_FOLDERS = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}
_BATCHES = {
    "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test": ("test_batch",),
}
_PIXELS = 3 * 32 * 32
_BATCH_LENGTH = 10_000
# Unpacked the archives have 186 MB.
_MAX_ARCHIVE_BYTES = 2**29
# Operations of a pickle; an official batch has 60,000.
_MAX_OPERATIONS = 200_000


def read_cifar10(
    path: str | os.PathLike[str], split: str = "train"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns CIFAR-10 `(images uint8 [N, 32, 32, 3], labels int32 [N])` of a split.

    Args:
      path: an official archive (`cifar-10-binary.tar.gz` or
        `cifar-10-python.tar.gz`), the folder extracted from one, or a folder that
        holds either of these.
      split: "train" (five batches, in their order) or "test" (one).

    Raises:
      DataError: nothing of the kind is there, or a batch is missing or damaged.
    """
    found = find_cifar10(path)
    if found is None:
        raise DataError(
            f"CIFAR-10 must be an official archive or a folder that holds one; got "
            f"{path}, in which there is none. Put {CIFAR10_ARCHIVES[0]} there, or the "
            f"folder {next(iter(_FOLDERS))} extracted from it."
        )
    parsed = [
        _parse_batch(raw, f"{path}: {name}", binary=name.endswith(".bin"))
        for name, raw in _batches(found, split).items()
    ]
    counts = [len(labels) for _, labels in parsed]
    if any(count != _BATCH_LENGTH for count in counts):
        warnings.warn(
            f"each batch of the official CIFAR-10 holds 10000 images; {path} holds "
            f"{counts}. Scores on it do not compare with published ones.",
            stacklevel=2,
        )
    images, labels = zip(*parsed, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def find_cifar10(path: str | os.PathLike[str]) -> Path | None:
    """Returns where CIFAR-10 lies: a folder of batches or an archive; None if nowhere.

    A path that is a file is the archive. In a folder, an extracted one is preferred to
    an archive, and binary files to pickles.
    """
    folder = Path(path)
    if folder.is_file():
        return folder
    for candidate in (folder, *(folder / name for name in _FOLDERS)):
        if any((candidate / f"test_batch{end}").is_file() for end in (".bin", "")):
            return candidate
    return next(
        (folder / name for name in CIFAR10_ARCHIVES if (folder / name).is_file()), None
    )


def _batches(found: Path, split: str) -> dict[str, bytes]:
    """Returns the content of the batches of a split by their names, in order."""
    kinds = {
        folder: [f"{name}{end}" for name in _BATCHES[split]]
        for folder, end in _FOLDERS.items()
    }
    if found.is_dir():
        there = [found / name for names in kinds.values() for name in names]
        content = {file.name: file.read_bytes() for file in there if file.is_file()}
    else:
        # Matched by their whole names: "../test_batch" is none of them.
        wanted = {f"{folder}/{name}" for folder in kinds for name in kinds[folder]}
        content = _members(found, lambda name: name.removeprefix("./") in wanted)
    names = max(kinds.values(), key=lambda names: len(content.keys() & {*names}))
    if missing := [name for name in names if name not in content]:
        raise DataError(
            f"CIFAR-10 at {found} must hold every batch of the split; got none named "
            f"{', '.join(missing)}. Download the official archive again, or name the "
            "folder that was extracted from it."
        )
    return {name: content[name] for name in names}


def _members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Returns the wanted files of an archive, by their names without folders."""
    try:
        with path.open("rb") as file:
            found = archives.read_tar(file, wanted, most=_MAX_ARCHIVE_BYTES)
    except (archives.ArchiveError, OSError) as error:
        raise DataError(
            f"{path} must be a whole tar archive of CIFAR-10; got {error}. "
            "Download it again: it may have been cut off."
        ) from error
    return {name.rpartition("/")[2]: raw for name, raw in found.items()}


def _parse_batch(
    raw: bytes, what: str, *, binary: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(images uint8 [N, 32, 32, 3], labels int32 [N])` of one batch."""
    if binary:
        if not raw or len(raw) % (1 + _PIXELS):
            raise DataError(
                f"{what} must hold whole records of 3073 bytes; got {len(raw)} bytes. "
                "The file is cut off or is no CIFAR-10 batch: download it again."
            )
        records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + _PIXELS)
        pixels, labels = records[:, 1:], records[:, 0].astype(np.int32)
    else:
        try:
            pixels, labels = _look_through(raw)
        except ValueError as error:
            raise DataError(
                f"{what} must be a whole pickle; got {error}. Download the official "
                "archive again."
            ) from error
        if not labels.size or pixels.size != labels.size * _PIXELS:
            raise DataError(
                f"{what} must hold labels and 3072 pixels for each; got {labels.size} "
                f"labels and {pixels.size} bytes. Download the official archive again."
            )
    if labels.min() < 0 or labels.max() > 9:
        raise DataError(
            f"labels in {what} must lie in 0..9; got {labels.min()}..{labels.max()}. "
            "The file is damaged or is CIFAR-100: download CIFAR-10 again."
        )
    # On disk the colour planes follow one another; here channels come last.
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _look_through(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns all pixels and labels in the pickle of a batch, which is never run.

    The pixels are the longest string of it; labels are the integers that come between
    the string "labels" and the next one.
    """
    pixels, labels, last = b"", [], b""
    operations = itertools.islice(pickletools.genops(raw), _MAX_OPERATIONS)
    for operation, argument, _ in operations:
        if isinstance(argument, str):
            argument = argument.encode("latin1")
        if isinstance(argument, bytes | bytearray):
            last = bytes(argument)
            pixels = max(pixels, last, key=len)
        elif last == b"labels" and operation.name.startswith("BININT"):
            labels.append(argument)
    return np.frombuffer(pixels, np.uint8), np.array(labels, np.int32)


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the uint8 array in an IDX file (MNIST's format), plain or gzipped.

    Args:
      path: the file; whether it is gzipped is read from its first bytes.

    Raises:
      DataError: the file is missing, is not IDX of unsigned bytes, or is cut off.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe may have no end
            raise OSError("no regular file")
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            return _parse_idx(cast(BinaryIO, file), path)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, MemoryError, zlib.error, struct.error) as e:
        raise DataError(
            f"{path} must be a readable, whole IDX file; got {type(e).__name__}: {e}. "
            "Check the path, or download it again."
        ) from e


def _parse_idx(file: BinaryIO, path: Path) -> np.ndarray:
    head = file.read(4)
    if len(head) < 4 or head[:3] != b"\x00\x00\x08" or not 1 <= head[3] <= 4:
        raise DataError(
            "an IDX file of unsigned bytes must begin with 00 00 08 and its number "
            f"of axes (1 to 4); got {head.hex(' ') or 'nothing'} in {path}. "
            "Give one of MNIST's *-ubyte files."
        )
    shape = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
    count = math.prod(shape)
    archives.check_packed(count, path.stat().st_size, "an array")
    raw = file.read(count + 1)  # one more shows a file that goes on
    if len(raw) != count:
        got = "more" if len(raw) > count else str(len(raw))
        raise DataError(
            f"{path} must hold {count} bytes for its shape {shape}; got {got}. "
            "The file is damaged: download it again."
        )
    return np.frombuffer(raw, np.uint8).reshape(shape)


def read_npz(
    path: str | os.PathLike[str],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns `(images uint8 [N, H, W, C], labels int32 [N] or None)` of an npz file.

    Args:
      path: an .npz file. The images are its array `images`, else `arr_0`, else its
        only array, as `arrays.as_uint8` and `as_images` take them; `labels` optional.

    Raises:
      DataError: no such file, no such array, or one of another type or shape.
    """

    def choose(names: list[str]) -> list[str]:
        others = [name for name in names if name != "labels"]
        likely = [name for name in ("images", "arr_0") if name in others]
        chosen = likely or (others if len(others) == 1 else [])
        if not chosen:
            raise archives.ArchiveError(
                f"{', '.join(names[:8]) or 'none'}, of which no array is named "
                "images or arr_0, nor alone"
            )
        return [chosen[0], *(name for name in names if name == "labels")]

    try:
        found = archives.read_npz(path, choose)
    except (archives.ArchiveError, OSError) as error:
        raise DataError(
            f"{path} must be an npz file of plain arrays; got {error}. Check the path, "
            "or save it with np.savez(path, images=images), images being uint8."
        ) from error
    labels = found.pop("labels", None)
    (images,) = found.values()
    images = arrays.as_images(arrays.as_uint8(images, path), path)
    return images, arrays.as_labels(labels, len(images), path)
