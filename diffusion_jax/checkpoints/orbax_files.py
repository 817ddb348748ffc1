"""The files of one checkpoint: read and compared, and flushed to disk."""

import ctypes
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from diffusion_jax.checkpoints import manifest

PARTIAL = ".orbax-checkpoint-tmp"
"""Part of the name of a checkpoint that is being written."""
NOT_NOW = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Too many open files")
"""Parts of tensorstore's errors where the data may be whole."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was written. An older one may be whole."""

    def __init__(self, path: Path, why: str) -> None:
        self.why = why
        super().__init__(
            f"checkpoint {path} must be what was written there; got {why}. Use an "
            "older one, or bring this one back from a copy."
        )


def read(path: Path) -> tuple[manifest.Manifest, dict[str, np.ndarray]]:
    """Returns the manifest of a checkpoint and its arrays, compared with it.

    Raises:
      CheckpointError: it is damaged, of another format, or cannot be read now.
    """
    import orbax.checkpoint as ocp  # takes a third of a second, too long for `--help`
    from etils import epath

    try:
        about = manifest.read(path / "manifest")
        empty = {p: x for p, x in about.leaves.items() if 0 in x.shape}
        target = dict.fromkeys(about.leaves.keys() - empty.keys(), 0)
        how = dict.fromkeys(target, ocp.RestoreArgs(restore_type=np.ndarray))
        with _damage_as_unverified(target):
            arrays = ocp.PyTreeCheckpointHandler().restore(
                epath.Path(path.resolve()) / "state",
                args=ocp.args.PyTreeRestore(item=target, restore_args=how),
            )
        arrays |= {p: np.zeros(x.shape, jnp.dtype(x.dtype)) for p, x in empty.items()}
        manifest.check(about.leaves, arrays)
    except manifest.UnverifiedError as error:
        raise DamagedError(path, str(error)) from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, MemoryError) as error:
        raise CheckpointError(
            f"cannot read checkpoint {path} now: {error or 'no memory'}. It may be "
            "whole: solve that, and start again."
        ) from error
    return about, arrays


@contextmanager
def _damage_as_unverified(leaves: Iterable[str]) -> Iterator[None]:
    """Raises UnverifiedError for the many errors that orbax has for damaged data."""
    hook = sys.unraisablehook
    # After the first error, other reads of tensorstore's threads find the event loop
    # closed, and print errors.
    sys.unraisablehook = lambda _: None
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        if any(word in str(error) for word in NOT_NOW):
            raise OSError(str(error)) from error
        time.sleep(0.02)  # until they have ended
        named = [leaf for leaf in leaves if f'"{leaf}/' in str(error)]
        where = f" in {named[0]}" if named else ""
        raise manifest.UnverifiedError(f"data that cannot be read{where}") from error
    finally:
        sys.unraisablehook = hook


def trim_memory() -> None:
    """Returns freed memory to the system.

    glibc keeps free memory between used blocks, for each thread: a process would grow
    by 30 KB a save. Other C libraries have no such function, and keep less.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def to_disk(folder: Path) -> None:
    """Flushes a checkpoint that is being written to disk, before it is renamed.

    Otherwise a power failure might leave its name without its content.
    """
    for partial in folder.glob(f"*{PARTIAL}*"):
        for path in (*partial.rglob("*"), partial):
            with suppress(FileNotFoundError):
                file = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
