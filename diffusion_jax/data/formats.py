"""Parsers of data files: CIFAR-10 archives, IDX (MNIST), npz.

Each reader takes a path and returns NumPy arrays; a file that is not what it should
be raises `DataError`, whose message says what must hold, what was got and what to do.
Nothing here trusts its input: archive members are read without being extracted,
pickles can build plain containers and uint8 arrays only, and the size of everything
is checked before it is believed.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import pickletools
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffusion_jax.errors import DataError
from diffusion_jax.storage import archives

CIFAR10_ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")

# Of the two archives, with what the names of batches in them end in.
_CIFAR10_FOLDERS = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}
_CIFAR10_BATCHES = {
    "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test": ("test_batch",),
}
_CIFAR10_PIXELS = 3 * 32 * 32
_CIFAR10_BATCH_LENGTH = 10_000
# An official batch holds 31 MB, an archive 186 MB, one of both
# formats 370 MB; what is far larger is a bomb.
_MAX_BATCH_BYTES = 64 * 2**20
_MAX_ARCHIVE_BYTES = 2**29
# Steps of the machine that a pickle is a program for; an official batch takes 60,000.
_MAX_PICKLE_STEPS = 1_000_000


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
      DataError: nothing of the kind is there, a batch is missing or damaged, or a
        pickle refers to anything but plain containers and arrays.
    """
    if split not in _CIFAR10_BATCHES:
        raise DataError(
            f"split of CIFAR-10 must be 'train' or 'test'; got {split!r}. "
            "Give one of the two."
        )
    found = find_cifar10(path)
    if found is None:
        raise DataError(
            f"CIFAR-10 must be an official archive or a folder that holds one; got "
            f"{path}, in which there is none. Put {CIFAR10_ARCHIVES[0]} there, or the "
            f"folder {next(iter(_CIFAR10_FOLDERS))} extracted from it."
        )
    read = _cifar10_archive if found.is_file() else _cifar10_folder
    parsed = [
        _parse_batch(raw, f"{path}: {member}", binary=member.endswith(".bin"))
        for member, raw in read(found, split).items()
    ]
    counts = [len(labels) for _, labels in parsed]
    if any(count != _CIFAR10_BATCH_LENGTH for count in counts):
        warnings.warn(
            f"each batch of the official CIFAR-10 holds 10000 images; {path} holds "
            f"{counts}. Scores on it do not compare with published ones.",
            stacklevel=2,
        )
    images = np.concatenate([images for images, _ in parsed])
    return images, np.concatenate([labels for _, labels in parsed])


def find_cifar10(path: str | os.PathLike[str]) -> Path | None:
    """Returns where CIFAR-10 lies: a folder of batches or an archive; None if nowhere.

    A path that is a file is the archive. In a folder, an extracted one is preferred to
    an archive, and binary files to pickles.
    """
    folder = Path(path)
    if folder.is_file():
        return folder
    first = _CIFAR10_BATCHES["test"][0]
    for candidate in (folder, *(folder / name for name in _CIFAR10_FOLDERS)):
        if any((candidate / f"{first}{ending}").is_file() for ending in (".bin", "")):
            return candidate
    for name in CIFAR10_ARCHIVES:
        if (folder / name).is_file():
            return folder / name
    return None


def _cifar10_folder(folder: Path, split: str) -> dict[str, bytes]:
    """Returns the raw batches `{file name: bytes}` of a split from a folder."""
    names = _CIFAR10_BATCHES[split]
    ending = ".bin" if (folder / f"{_CIFAR10_BATCHES['test'][0]}.bin").exists() else ""
    batches = {}
    for name in (f"{name}{ending}" for name in names):
        if not (folder / name).is_file():
            raise _missing_batches(folder, [name])
        size = (folder / name).stat().st_size
        if size > _MAX_BATCH_BYTES:
            raise DataError(
                f"a CIFAR-10 batch must be at most {_MAX_BATCH_BYTES} bytes; got "
                f"{size} in {folder / name}. Use the official archive."
            )
        batches[name] = (folder / name).read_bytes()
    return batches


def _cifar10_archive(path: Path, split: str) -> dict[str, bytes]:
    """Returns the raw batches `{member: bytes}` of a split from a tar archive.

    Members are read in memory and matched by their whole official name, so one that
    is called "../data_batch_1" is never looked at, and nothing touches the disk.
    """
    kinds = [
        [f"{folder}/{name}{ending}" for name in _CIFAR10_BATCHES[split]]
        for folder, ending in _CIFAR10_FOLDERS.items()
    ]
    wanted = {name for names in kinds for name in names}
    try:
        with path.open("rb") as file:
            members = archives.read_tar(
                file,
                lambda name: name.removeprefix("./") in wanted,
                most=_MAX_BATCH_BYTES,
                total=_MAX_ARCHIVE_BYTES,
            )
    except (archives.ArchiveError, OSError) as error:
        raise DataError(
            f"{path} must be a whole tar archive of CIFAR-10; got {error}. "
            "Download it again: it may have been cut off."
        ) from error
    found = {name.removeprefix("./"): raw for name, raw in members.items()}
    for names in kinds:
        if all(name in found for name in names):
            return {name: found[name] for name in names}
    raise _missing_batches(path, sorted(wanted - set(found)))


def _missing_batches(where: Path, missing: list[str]) -> DataError:
    """Returns the error for an archive or folder that lacks batches."""
    return DataError(
        f"CIFAR-10 at {where} must hold every batch of the split; got none named "
        f"{', '.join(missing)}. Download the official archive again, or name the "
        "folder that was extracted from it."
    )


def _parse_batch(
    raw: bytes, what: str, *, binary: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(images uint8 [N, 32, 32, 3], labels int32 [N])` of one batch."""
    if binary:
        if not raw or len(raw) % (1 + _CIFAR10_PIXELS):
            raise DataError(
                f"{what} must hold whole records of 3073 bytes; got {len(raw)} bytes. "
                "The file is cut off or is no CIFAR-10 batch: download it again."
            )
        records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + _CIFAR10_PIXELS)
        pixels, labels = records[:, 1:], records[:, 0].astype(np.int32)
    else:
        content = _unpickle(raw, what)
        try:
            pixels = _array_of(content[b"data"])
            listed = content[b"labels"]
            # Lists of lists of one list have more entries than there is memory.
            if not all(type(label) is int for label in listed):
                raise TypeError("labels that are no whole numbers")
            labels = np.asarray(listed, np.int32)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as e:
            raise DataError(
                f"{what} must be a dict with an array b'data' and a list b'labels'; "
                f"got {_describe(e)}. Download the official archive again."
            ) from e
        if pixels.shape != (labels.size, _CIFAR10_PIXELS) or not labels.size:
            raise DataError(
                f"{what} must hold data of shape (N, 3072) and N labels; got data of "
                f"shape {pixels.shape} and {labels.size} labels. Download the "
                "official archive again."
            )
    if labels.min() < 0 or labels.max() > 9:
        raise DataError(
            f"labels in {what} must lie in 0..9; got {labels.min()}..{labels.max()}. "
            "The file is damaged or is CIFAR-100: download CIFAR-10 again."
        )
    # On disk the colour planes follow one another; here channels come last.
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


class _Pickled:
    """Stands for NumPy's arrays and types in a pickle: keeps what it is given.

    NumPy's own trust a file with the layout of memory, so they never see one from
    outside.
    """

    def __init__(self, *given: Any):
        self.given = given
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _array_of(pickled: _Pickled) -> np.ndarray:
    """Returns the uint8 array that a stand-in is of; raises where it is none."""
    if pickled.state:
        _, shape, dtype, fortran, raw = pickled.state
    else:  # as pickle protocol 5 spells it
        raw, dtype, shape, order = pickled.given
        fortran = order == "F"
    name = dtype.given[0]
    name = name.decode("latin1") if isinstance(name, bytes) else name
    if name not in ("u1", "uint8", "|u1"):
        raise ValueError(f"an array of type {name}")
    if not isinstance(raw, bytes | bytearray):  # of a number it makes zeros
        raise TypeError(f"a {type(raw).__name__} in place of bytes")
    flat = np.frombuffer(raw, np.uint8)
    return flat.reshape(shape, order="F" if fortran else "C")


# The only names that a pickle may refer to: NumPy's constructors, under their paths
# before and since NumPy 2.
_CONSTRUCTORS = {
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickler of plain containers and stand-ins; refuses all else unrun."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CONSTRUCTORS:
            return _Pickled
        raise DataError(
            "a CIFAR-10 pickle must hold only dicts, lists, strings, numbers and NumPy "
            f"arrays; got a reference to {module}.{name}. It was not run. Do not open "
            "this file elsewhere: download the official archive."
        )


def _unpickle(raw: bytes, what: str) -> Any:
    """Returns the content of a pickle of plain containers and arrays."""
    try:
        _check_steps(raw)
        return _RestrictedUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{what}: {error}") from None
    # A damaged pickle can fail in any operation of the machine it is a program for.
    except Exception as error:
        raise DataError(
            f"{what} must be a whole pickle; got {_describe(error)}. "
            "Download the official archive again."
        ) from error


def _check_steps(raw: bytes) -> None:
    """Raises where a pickle would take much time, or memory that it has not filled."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(raw)):
        # The memo is an array as long as the largest place in it.
        far = "PUT" in operation.name and int(argument or 0) > _MAX_PICKLE_STEPS
        if far or count > _MAX_PICKLE_STEPS:
            raise ValueError(f"more than {_MAX_PICKLE_STEPS} steps or places")


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the uint8 array in an IDX file (MNIST's format), plain or gzipped.

    Args:
      path: the file; whether it is gzipped is read from its first bytes.

    Raises:
      DataError: the file is missing, is not IDX of unsigned bytes, or is cut off.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise archives.ArchiveError("no regular file")
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
            return _parse_idx(stream, path, zipped=zipped)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise DataError(
            f"an IDX file must exist; got {path}, which does not. Check the path."
        ) from None
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} must be a readable, whole file; got {_describe(error)}. "
            "Download it again."
        ) from error


def _parse_idx(stream: BinaryIO, path: Path, *, zipped: bool) -> np.ndarray:
    head = stream.read(4)
    if len(head) < 4 or head[:3] != b"\x00\x00\x08" or not 1 <= head[3] <= 4:
        raise DataError(
            "an IDX file of unsigned bytes must begin with 00 00 08 and its number "
            f"of axes (1 to 4); got {head.hex(' ') or 'nothing'} in {path}. "
            "Give one of MNIST's *-ubyte files."
        )
    sizes = stream.read(4 * head[3])
    shape = tuple(int(n) for n in np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4"))
    count = math.prod(shape) if len(shape) == head[3] else 0
    length = path.stat().st_size
    if zipped:
        archives.check_packed(count, length, "an array")
    # One byte more than wanted shows a file that goes on; no more is ever unpacked.
    raw = stream.read(count + 1 if zipped else min(count + 1, length))
    if len(shape) != head[3] or len(raw) != count:
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
        only array: uint8, [N, H, W, C] or [N, H, W]. `labels` is optional.

    Raises:
      DataError: no such file, no such array, or one of another type or shape.
    """

    def choose(names: list[str]) -> list[str]:
        others = [name for name in names if name != "labels"]
        # By these names in turn; failing them, the only array there is.
        only = others if len(others) == 1 else []
        keys = [k for k in ("images", "arr_0") if k in names] + only
        if not keys:
            raise archives.ArchiveError(
                f"{', '.join(names[:8]) or 'none'}, of which no array is named "
                "images or arr_0, nor alone"
            )
        return [keys[0], *(name for name in names if name == "labels")]

    try:
        arrays = archives.read_npz(path, choose)
    except FileNotFoundError:
        raise DataError(
            f"an npz file must exist; got {path}, which does not. Check the path."
        ) from None
    except (archives.ArchiveError, ValueError, OSError) as error:
        raise DataError(
            f"{path} must be an npz file of plain arrays; got {error}. "
            "Save it with np.savez(path, images=images), images being uint8."
        ) from error
    labels = arrays.pop("labels", None)
    (images,) = arrays.values()
    return as_images(images, path), as_labels(labels, len(images), path)


def as_images(images: np.ndarray, what: str | os.PathLike[str]) -> np.ndarray:
    """Returns images as [N, H, W, C], having checked type and number of axes."""
    if images.dtype == np.uint8 and images.ndim in (3, 4) and images.size:
        return images if images.ndim == 4 else images[..., np.newaxis]
    got = f"{images.dtype} of shape {images.shape}"
    if not images.size:
        advice = "Give one image or more."
    elif images.dtype == np.uint8:
        advice = "Put them along a first axis; a single image is images[None]."
    elif images.dtype.kind in "biuf":
        low, high = float(images.min()), float(images.max())  # NaN, if one is
        got += f", from {low:g} to {high:g}"
        advice = _to_uint8(low, high)
    else:
        advice = "Give an array of numbers."
    raise DataError(
        f"images in {what} must be uint8 of shape [N, H, W, C] or [N, H, W]; got "
        f"{got}. {advice}"
    )


def _to_uint8(low: float, high: float) -> str:
    """Returns how images with values in a range, or NaN, become uint8."""
    if not math.isfinite(low + high):
        return "Find out where they stopped being finite."
    if 0 <= low <= high <= 1:
        return (
            "If they are scaled to [0, 1]: np.round(images * 255.0).astype(np.uint8)."
        )
    if -1 <= low <= high <= 1:
        return (
            "If they are scaled to [-1, 1]: "
            "np.round((images + 1) * 127.5).astype(np.uint8)."
        )
    if 0 <= low <= high <= 255:
        return "Convert them: np.round(images).astype(np.uint8)."
    return "Scale them to 0..255, then np.round(images).astype(np.uint8)."


def as_labels(
    labels: np.ndarray | None, num_images: int, what: str | os.PathLike[str]
) -> np.ndarray | None:
    """Returns labels as int32 [N], having checked that there is one an image."""
    if labels is None:
        return None
    fits = labels.dtype.kind in "iu" and labels.shape == (num_images,)
    if not fits or labels.min() < -(2**31) or labels.max() >= 2**31:
        raise DataError(
            f"labels in {what} must be {num_images} whole numbers below 2**31, one an "
            f"image; got {labels.dtype} of shape {labels.shape}. Make them int32, "
            "those of names by np.unique(names, return_inverse=True)[1]."
        )
    return labels.astype(np.int32)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
