"""Reads tensors by name from files of several formats, and writes safetensors.

The format is told from the content, whatever a file is called:

  safetensors   with its metadata
  pytorch       state of a module (.bin, .pt, .pth), where PyTorch is installed
  tensorflow    a checkpoint of variables, where TensorFlow is installed

Nothing in a file is ever executed: of pickles only PyTorch's are opened, by its own
`weights_only` reader.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from diffusion_jax.errors import DataError, first_of
from diffusion_jax.storage import files, tensorflow_checkpoint
from diffusion_jax.storage.waiting import Bar

_CHUNK = 2**22
_HEAD = 512
# The library refuses headers of more than 100 MB.
_MAX_HEADER = 10**8
# How PyTorch began its files before 2020: the pickle of one known number.
_PYTORCH_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
# How pickles begin, of protocol 2 and later.
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


class Tensors(NamedTuple):
    """The content of a file."""

    arrays: dict[str, np.ndarray]
    """By the names that they have there; of the types that they have there."""
    meta: dict[str, str]
    """Metadata of a safetensors file; empty for others."""
    format: str
    """One of "safetensors", "pytorch" and "tensorflow"."""
    sha256: str
    """Of the file as it lies on disk, in hexadecimal. Of a TensorFlow checkpoint that
    of its data files (PREFIX.data-00000-of-00001 and so on), one after the other and
    without the index; of one data file it is that file's own."""


def kind_of(path: str | os.PathLike[str]) -> str:
    """Returns the format of a file, from its first bytes.

    Args:
      path: a file, or the prefix of a TensorFlow checkpoint, or either of the files
        that make one up: PREFIX.index and PREFIX.data-00000-of-00001.

    Returns:
      "safetensors", "pytorch", "tensorflow", "pickle" or "unknown".

    Raises:
      DataError: there is no such file.
    """
    path = Path(path)
    if tensorflow_checkpoint.prefix_of(path):
        return "tensorflow"
    return _kind(_head(path))


def read(path: str | os.PathLike[str], *, progress: bool = False) -> Tensors:
    """Returns all tensors of a file.

    Args:
      path: as `kind_of` takes it.
      progress: show a bar on standard error, where that is a terminal.

    Raises:
      DataError: no such file, damage, another format, a pickle that could run code, a
        type of tensors that cannot be read, or what reads the format is not installed.
    """
    path = Path(path)
    prefix = tensorflow_checkpoint.prefix_of(path)
    if prefix:
        return _read_tensorflow(prefix, progress)
    head = _head(path)
    kind = _kind(head)
    if kind == "safetensors":
        return _read_safetensors(path, progress)
    if kind == "pytorch":
        return _read_pytorch(path, progress)
    got = "a pickle, which is a program. It was not run"
    if kind != "pickle":
        got = f"a file that begins with {head[:24]!r}"
    raise DataError(
        f"{path} must be a safetensors file, one of PyTorch or the prefix of a "
        f"TensorFlow checkpoint; got {got}. Download it again, or save its tensors as "
        "safetensors where it comes from."
    )


def read_meta(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the metadata of a safetensors file; no tensor is read.

    Raises:
      DataError: no such file, another format, or damage.
    """
    path = Path(path)
    head = _head(path)
    if _kind(head) != "safetensors":
        raise DataError(
            f"{path} must be a safetensors file; got one that begins with "
            f"{head[:24]!r}. Give another, or convert it."
        )
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a safetensors file's tensors by name; none is read.

    Raises:
      DataError: as `read_meta`.
    """
    read_meta(path)
    with _opened(Path(path)) as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Any],
    meta: Mapping[str, str] | None = None,
) -> str:
    """Returns the SHA-256 of the safetensors file that now holds the arrays.

    The same arrays and metadata give the same file, to the byte.

    Args:
      path: where the file shall lie, whose folder is made; whatever was there is
        replaced at the end, and stays if anything fails.
      arrays: by name, of any type that safetensors has.
      meta: metadata, text by name.

    Raises:
      DataError: a type that safetensors lacks.
      OSError: the disk refuses.
    """
    meta = dict(sorted((meta or {}).items()))
    # The library takes the memory of an array as it lies, transposed or not.
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        content = safetensors.numpy.save(plain, meta or None)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"what {path} is to hold must be arrays of numbers, and words of text; got "
            f"{type(error).__name__}: {error}. Convert them first."
        ) from error
    # The library writes metadata in another order each time.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if meta:
        header["__metadata__"] = meta
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = memoryview(content)[8 + length :]
    digest = hashlib.sha256()
    with files.replacing(path, durable=True) as file:
        for piece in (len(text).to_bytes(8, "little"), text, data):
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError as error:
        raise DataError(
            f"{path} must be a file of tensors, or the prefix of a TensorFlow "
            f"checkpoint; got {error}. Check the path, or give one of the files that "
            "are there."
        ) from error


def _kind(head: bytes) -> str:
    # The length of a header, which is JSON. It comes first, since the numbers of a
    # length can be those that a pickle begins with.
    braced, length = head[8:9] == b"{", int.from_bytes(head[:8], "little")
    if braced and length <= _MAX_HEADER:
        return "safetensors"
    zipped = head.startswith(b"PK\x03\x04") and b"data.pkl" in head[:256]
    if zipped or head.startswith(_PYTORCH_MAGIC):
        return "pytorch"
    if head.startswith(_PICKLES):
        return "pickle"
    # With a length that cannot be: damaged, but meant as such.
    return "safetensors" if braced and head[9:10] in (b'"', b"}") else "unknown"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file whose header was found to fit its length."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(
            f"{path} must be a whole safetensors file; got {type(error).__name__}: "
            f"{error}. It was cut off or damaged: download or write it again."
        ) from error


def _read_safetensors(path: Path, progress: bool) -> Tensors:
    # The library holds the header to the length of the file, and tensors to following
    # each other without gaps; of two of one name it takes the last.
    with _opened(path) as file:
        _check_names(path)
        digest = _digest([path], progress)
        arrays = {}
        for name in file.keys():  # noqa: SIM118
            try:
                arrays[name] = file.get_tensor(name)
            # The first of NumPy, asked for a type that it lacks.
            except (AttributeError, safetensors.SafetensorError):
                raise DataError(
                    f"{path} must hold tensors of types that NumPy has; got {name} of "
                    f"{file.get_slice(name).get_dtype()}. Save them as float32 where "
                    "they come from."
                ) from None
        return Tensors(arrays, dict(file.metadata() or {}), "safetensors", digest)


def _check_names(path: Path) -> None:
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    listed = json.loads(header, object_pairs_hook=lambda pairs: [n for n, _ in pairs])
    counts = collections.Counter(listed)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(
            f"{path} must name each tensor once; got {first_of(twice)} twice. "
            "Write it again."
        )


def _digest(paths: list[Path], progress: bool) -> str:
    """Returns the SHA-256 of files, one after the other, with a bar of their bytes."""
    digest = hashlib.sha256()
    total = sum(path.stat().st_size for path in paths)
    with Bar(None, "reading", total, unit="B", unit_scale=True, shown=progress) as bar:
        for path in paths:
            with path.open("rb") as content:
                while chunk := content.read(_CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
    return digest.hexdigest()


def _read_pytorch(path: Path, progress: bool) -> Tensors:
    try:
        import torch
    except ImportError:
        raise DataError(
            f"PyTorch must be installed to read {path}; got no module named torch. "
            "Install it, or save the tensors as safetensors where it is installed."
        ) from None
    digest = _digest([path], progress)
    try:
        with path.open("rb") as file:  # of a path it would judge by the ending
            found = torch.load(file, map_location="cpu", weights_only=True)
        arrays = {str(name): _from_torch(name, x, torch) for name, x in found.items()}
    # PyTorch reports damage and refusals by a dozen types of exception.
    except Exception as error:
        # Its own advice is to run what is in the file.
        said = " ".join(str(error).split())
        said = said.partition("WeightsUnpickler error: ")[2] or said
        raise DataError(
            f"{path} must hold PyTorch tensors by name and nothing else; got "
            f"{type(error).__name__}: {said.partition('. ')[0][:200].rstrip('.')}. It "
            "was not run. Save the tensors as safetensors where the file comes from."
        ) from error
    return Tensors(arrays, {}, "pytorch", digest)


def _from_torch(name: Any, tensor: Any, torch: Any) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name!r} is a {type(tensor).__name__}")
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which PyTorch has no NumPy type for
        return np.asarray(tensor.view(torch.int16).numpy().view(jnp.bfloat16))
    return np.asarray(tensor.numpy())


def _read_tensorflow(prefix: Path, progress: bool) -> Tensors:
    paths = tensorflow_checkpoint.data_files(prefix)
    digest = _digest(paths, progress)
    arrays = tensorflow_checkpoint.variables(prefix)
    return Tensors(arrays, {}, "tensorflow", digest)
