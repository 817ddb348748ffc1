"""Parameters in a .safetensors file, with what has to be known of them as text."""

from pathlib import Path
from typing import Any, NamedTuple

from flax import traverse_util

from diffusion_jax.nets import tensor_files


class Stored(NamedTuple):
    """What was in a file."""

    params: Any
    """A tree of arrays, each of the shape and type that it was written with."""
    meta: dict[str, str]
    sha256: str
    """Of the file."""


def write(path: Path, params: Any, meta: dict[str, str]) -> None:
    """Writes a tree of arrays under a temporary name, then renames the file.

    Raises:
      DataError: the disk refuses.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    tensor_files.write_safetensors(path, flat, meta)


def read(path: Path) -> Stored:
    """Returns what `write` wrote.

    Raises:
      DataError: there is no such file, or it is damaged.
    """
    found = tensor_files.read(path)
    params = traverse_util.unflatten_dict(found.arrays, sep=".")
    return Stored(params, found.meta, found.sha256)
