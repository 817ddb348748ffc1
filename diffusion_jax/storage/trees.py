"""Trees of arrays (pytrees): their leaves by name, and .safetensors files of them.

In a file a leaf is called by its keys, joined by dots; metadata are text by name.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.errors import DataError, first_of
from diffusion_jax.storage import tensor_files


class Stored(NamedTuple):
    """The content of a file."""

    params: Any
    """A tree of arrays, each of the shape and type that it was written with."""
    meta: dict[str, str]
    sha256: str
    """Of the file."""


def by_path(tree: Any, separator: str = "/") -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, in their order.

    Raises:
      ValueError: two leaves have the same path.

    >>> by_path({"a": [1, 2]})
    {'a/0': 1, 'a/1': 2}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {
        jax.tree_util.keystr(path, simple=True, separator=separator): leaf
        for path, leaf in leaves
    }
    if len(found) < len(leaves):
        raise ValueError(
            f"every leaf must have a path of its own, with its keys joined by "
            f"{separator!r}; got {len(leaves)} leaves with {len(found)} paths. Use "
            f"keys without {separator!r}."
        )
    return found


def misfits(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lists the leaves that are missing, unknown or wrong, a few words each.

    Types and shapes have to be the same, and values finite where there are values.

    Args:
      found: arrays, or what has the type and the shape of one.
      wanted: the same.

    >>> misfits({"a": np.zeros(2)}, {"a": np.zeros(3), "b": np.float32(0)})
    ['a: float64[2] for float64[3]', 'b: nothing for float32[]']
    """
    wrong = []
    for name in sorted(found.keys() | wanted.keys()):
        leaf = found.get(name)
        had, want = _in_words(leaf), _in_words(wanted.get(name))
        if had != want:
            wrong.append(f"{name}: {had} for {want}")
        elif isinstance(leaf, np.ndarray) and not np.isfinite(leaf).all():
            wrong.append(f"{name}: values that are not finite")
    return wrong


def _in_words(leaf: Any) -> str:
    if leaf is None:
        return "nothing"
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def check(params: Any, like: Any, path: Path) -> None:
    """Raises DataError where parameters do not fit a network, or are not finite.

    Args:
      params: what `read` returned.
      like: of the network, a tree of arrays or shapes.
      path: of the file, for the error.
    """
    wrong = misfits(by_path(params, "."), by_path(like, "."))
    if wrong:
        raise DataError(
            f"{path} must hold the parameters of its network; got {first_of(wrong)}. "
            "Write it again."
        )


def write(path: Path, params: Any, meta: Mapping[str, str]) -> str:
    """Returns the SHA-256 of the file that now holds a tree of arrays.

    Raises:
      DataError: a type that safetensors lacks.
      ValueError: two leaves have the same path.
      OSError: the disk refuses.
    """
    return tensor_files.write_safetensors(path, by_path(params, "."), meta)


def read(path: Path) -> Stored:
    """Returns what `write` wrote.

    Raises:
      DataError: there is no such file, or it is damaged or no tree.
    """
    from flax import traverse_util  # a fifth of a second, which `--help` need not wait

    found = tensor_files.read(path)
    above = {name[:i] for name in found.arrays for i, c in enumerate(name) if c == "."}
    if within := sorted(found.arrays.keys() & above):
        raise DataError(
            f"{path} must hold a tree, whose tensors have none below them; got some "
            f"below {first_of(within)}. Write it again."
        )
    params = traverse_util.unflatten_dict(found.arrays, sep=".")
    return Stored(params, found.meta, found.sha256)


def digest(tree: Any) -> str:
    """Returns a sha256 over all arrays of a tree, with their names and types."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
