"""Locks a run's folder, so that one process at a time trains into it.

The lock is `flock`'s, on <run>/.lock. The kernel drops it when its owner is gone,
however that died, so there is none to clear by hand. The file names the owner.

On a file system without locks (some of clusters are mounted so) a note is printed, and
training goes on.
"""

import datetime
import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock
import jax

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import hosts

NAME = ".lock"
# Errors of `flock` where the file system has no locks.
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class LockedError(ConfigError):
    """A run that another process trains."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps all other processes from training into a folder, which is made.

    On several hosts the first one holds the lock for all, and all must call this alike.
    Where the folder was made and nothing was written into it, it is gone afterwards.

    Raises:
      LockedError: another process has it.
      ConfigError: the folder cannot be made, or nothing can be written into it.
    """
    # `jax.process_count` would start the devices: a second process must be refused
    # before it takes memory of theirs from the first.
    joined = jax.distributed.is_initialized()
    error: ConfigError | None = None
    with ExitStack() as left:
        if not joined or hosts.first():
            try:
                _take(folder, left.callback)
            except ConfigError as raised:
                error = raised
        if joined and hosts.tell(error is not None) and error is None:
            error = ConfigError(
                f"cannot train into {folder}: host 0 cannot write it, or another job "
                "trains into it. Host 0 says which."
            )
        if error is not None:
            raise error
        yield


def _take(folder: Path, afterwards: Callable[..., object]) -> None:
    """Makes a folder and takes its lock; `afterwards` undoes both."""
    path = folder / NAME
    new = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for each in reversed(new):
            afterwards(_remove, each)
        own = filelock.FileLock(path, blocking=False, fallback_to_soft=False)
        try:
            own.acquire()
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
            hosts.say(
                f"note: the file system of {folder} has no locks ({error.strerror}): "
                "nothing keeps a second process from this run"
            )
            return
        afterwards(_let_go, path, path.stat(), own)
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        path.write_text(
            f"process {os.getpid()} on {socket.gethostname()}, since {now}\n"
        )
    except filelock.Timeout:
        owner = ""
        with suppress(OSError):  # it may have ended by now
            owner = path.read_text(errors="replace").strip()
        raise LockedError(
            f"cannot train {folder}: {owner or 'another process'} trains it. Wait for "
            "its end, stop it, or start another run with --name NAME."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot train into {folder}: {error.strerror} ({error.filename or path}). "
            "Mend that, or choose another folder with --output and --name."
        ) from error


def _let_go(path: Path, taken: os.stat_result, own: filelock.BaseFileLock) -> None:
    with suppress(OSError):
        # A forked child has no lock. And the folder may have been moved, and another
        # run have its own lock here.
        if own.is_locked and os.path.samestat(taken, path.stat()):
            path.unlink()
    own.release()


def _remove(folder: Path) -> None:
    with suppress(OSError):  # something is in it
        folder.rmdir()
