"""One checkpoint on the disk: how it is read, and what is compared."""

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
"""In the name of a checkpoint that is being written."""
NOT_NOW = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Too many open files")
"""In what tensorstore says of data that may be whole all the same."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


class DamagedError(CheckpointError):
    """One that is not what was written. An older one may be."""

    def __init__(self, path: Path, why: str) -> None:
        self.why = why
        super().__init__(
            f"checkpoint {path} must be what was written there; got {why}. Use an "
            "older one, or bring this one back from a copy."
        )


def read(path: Path) -> tuple[manifest.Manifest, dict[str, np.ndarray]]:
    """Returns what a checkpoint says of itself, and its arrays, compared."""
    import orbax.checkpoint as ocp  # a third of a second, which `--help` need not wait
    from etils import epath

    try:
        about = manifest.read(path / "manifest")
        empty = {p: x for p, x in about.leaves.items() if 0 in x.shape}
        target = dict.fromkeys(about.leaves.keys() - empty.keys(), 0)
        how = dict.fromkeys(target, ocp.RestoreArgs(restore_type=np.ndarray))
        with _whatever_is_damaged(target):
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
            f"checkpoint {path} must be readable now; got {error or 'no memory'}. It "
            "may be whole: mend that, and start again."
        ) from error
    return about, arrays


@contextmanager
def _whatever_is_damaged(leaves: Iterable[str]) -> Iterator[None]:
    """Raises UnverifiedError for all kinds that orbax raises for damaged data."""
    hook = sys.unraisablehook
    # After the first error the other reads, in threads of tensorstore, end into an
    # event loop that is closed, and say so on stderr.
    sys.unraisablehook = lambda _: None
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        if any(word in str(error) for word in NOT_NOW):
            raise OSError(str(error)) from error
        time.sleep(0.02)  # by then they have ended
        named = [leaf for leaf in leaves if f'"{leaf}/' in str(error)]
        where = f" in {named[0]}" if named else ""
        raise manifest.UnverifiedError(f"data that cannot be read{where}") from error
    finally:
        sys.unraisablehook = hook


def give_back() -> None:
    """Gives memory that was freed back to the system.

    glibc keeps what lies between what is held, for each thread: a process would grow by
    30 KB a save. Other libraries have no such function, and keep less.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def to_disk(folder: Path) -> None:
    """Has on the disk what is being written, before it gets its name.

    A machine without power would else have the name, and nothing behind it.
    """
    for partial in folder.glob(f"*{PARTIAL}*"):
        for path in (*partial.rglob("*"), partial):
            with suppress(FileNotFoundError):
                file = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
