"""Parameters in a .safetensors file, with what has to be known of them as text."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from diffusion_jax.errors import DataError
from diffusion_jax.storage import tensor_files


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
      DataError: there is no such file, or it is damaged or no tree.
    """
    found = tensor_files.read(path)
    names = set(found.arrays)
    within = {n for name in names for n in _above(name) if n in names}
    if within:
        raise DataError(
            f"{path} must hold a tree, whose tensors have none below them; got some "
            f"below {', '.join(sorted(within)[:3])}. Write it again."
        )
    params = traverse_util.unflatten_dict(found.arrays, sep=".")
    return Stored(params, found.meta, found.sha256)


def check(params: Any, like: Any, path: Path) -> None:
    """Raises DataError where parameters are not those of a network, or not finite.

    Args:
      params: what `read` returned.
      like: of the network, a tree of arrays or shapes.
      path: of the file, for the error.
    """
    found, wanted = (
        traverse_util.flatten_dict(tree, sep=".") for tree in (params, like)
    )
    wrong = [f"no {name}" for name in wanted if name not in found]
    for name, array in found.items():
        described = f"{name} {array.dtype} {array.shape}"
        if name not in wanted:
            wrong.append(f"{name} too many")
        elif (array.shape, array.dtype) != (wanted[name].shape, wanted[name].dtype):
            wrong.append(f"{described}, not {wanted[name].dtype} {wanted[name].shape}")
        elif not np.isfinite(array).all():
            wrong.append(f"{name} with values that are not finite")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(
            f"{path} must hold the parameters of its network; got "
            f"{'; '.join(wrong[:3])}{more}. Write it again."
        )


def _above(name: str) -> list[str]:
    """Returns the names of what a tensor is in.

    >>> _above("a.b.c")
    ['a', 'a.b']
    """
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def digest(tree: Any) -> str:
    """Returns a sha256 over all arrays of a tree, with their names and types."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
