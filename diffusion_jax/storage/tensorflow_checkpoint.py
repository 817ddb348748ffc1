"""Checkpoints of TensorFlow: PREFIX.index and PREFIX.data-00000-of-00001.

They are read by TensorFlow itself, which is imported only then.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import DataError, first_of, needs

# The last bytes of the table of a TensorFlow checkpoint, its .index.
_TABLE_MAGIC = bytes.fromhex("57fb808b247547db")
_PART = re.compile(r"\.(index|data-\d{5}-of-\d{5})$")


def prefix_of(path: Path) -> Path | None:
    """Returns the prefix of a TensorFlow checkpoint, if a path belongs to one."""
    named = _PART.search(path.name)
    if not named and path.exists():
        return None
    prefix = path.with_name(_PART.sub("", path.name))
    if data_files(prefix):
        return prefix
    # Without its data; then only the table shows that it is one.
    with contextlib.suppress(OSError), _index(prefix).open("rb") as file:
        file.seek(-len(_TABLE_MAGIC), os.SEEK_END)
        if file.read() == _TABLE_MAGIC:
            return prefix
    return None


def _index(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


def data_files(prefix: Path) -> list[Path]:
    """Returns the files of values of a checkpoint, in their order."""
    pattern = f"{glob.escape(prefix.name)}.data-*"
    return sorted(f for f in prefix.parent.glob(pattern) if _PART.search(f.name))


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each variable; no values are read.

    Args:
      path: the prefix of the checkpoint, or one of its files.

    Raises:
      DataError: it is no checkpoint, or damaged, or TensorFlow is not installed.
    """
    with _reader(prefix_of(path) or path) as reader:
        found = reader.get_variable_to_shape_map()
        return {name: tuple(found[name]) for name in sorted(found)}


def variables(prefix: Path) -> dict[str, np.ndarray]:
    """Returns the values of all variables of a checkpoint, by name.

    Raises:
      DataError: files are missing or damaged, or TensorFlow is not installed.
    """
    with _reader(prefix) as reader:
        names = sorted(reader.get_variable_to_shape_map())
        arrays = {name: np.asarray(reader.get_tensor(name)) for name in names}
    texts = [name for name, array in arrays.items() if array.dtype.kind in "OSU"]
    if texts:
        raise DataError(
            f"the checkpoint {prefix} must hold numbers, as a Saver of variables "
            f"writes them; got text for {first_of(texts)}. Save the variables by "
            "their names."
        )
    return arrays


@contextlib.contextmanager
def _reader(prefix: Path) -> Iterator[Any]:
    files = data_files(prefix)
    if not files or not _index(prefix).is_file():
        there = "no data beside its index" if not files else "data without an index"
        raise DataError(
            f"the checkpoint {prefix} must have {prefix.name}.index and "
            f"{prefix.name}.data-00000-of-00001 beside each other; got {there}. Put "
            "both files there."
        )
    # TensorFlow is kept quiet and off the accelerators.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Nothing is computed with it; it tells of this one whatever its level.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    needs("tensorflow", f"read the checkpoint {prefix}", "tensorflow")
    import tensorflow

    with contextlib.suppress(RuntimeError):  # in use already
        tensorflow.config.set_visible_devices([], "GPU")
    # TensorFlow reports damage by half a dozen types of exception.
    try:
        yield tensorflow.train.load_checkpoint(str(prefix))
    except Exception as error:
        raise DataError(
            f"the checkpoint {prefix} must be whole; got {type(error).__name__}: "
            f"{str(error)[:200]}. It was cut off or damaged: download both files again."
        ) from error
