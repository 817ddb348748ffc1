"""Parameters in a .safetensors file, with what has to be known of them as text."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class Stored(NamedTuple):
    """What was in a file."""

    params: Any
    """A tree of arrays, each of the shape and type that it was written with."""
    meta: dict[str, str]
    sha256: str
    """Of the file."""


def write(path: Path, params: Any, meta: dict[str, str]) -> None:
    """Writes a tree of arrays under a temporary name, then renames the file."""
    flat = traverse_util.flatten_dict(params, sep=".")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    save_file({k: np.asarray(v) for k, v in flat.items()}, partial, metadata=meta)
    partial.replace(path)


def read(path: Path) -> Stored:
    """Returns what `write` wrote.

    Raises:
      OSError: there is no such file.
      ValueError: it is damaged or no such file of ours.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            meta = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Stored(traverse_util.unflatten_dict(flat, sep="."), meta, digest)
