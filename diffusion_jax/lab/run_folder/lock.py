"""One process a run: who trains into a folder has a lock on it until it ends.

The lock is `flock`'s, on <run>/.lock. The kernel drops it when its owner is gone,
however that died, so there is none to clear by hand. The file names the owner.

A file system without locks (some of clusters are mounted so) is said, and trained on.
"""

import datetime
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import hosts

NAME = ".lock"
# As `flock` fails where the file system knows no locks.
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
HELD, UNWRITABLE, FINE = 2, 1, 0

_open: set[int] = set()
"""Files that this process holds locks by."""


class LockedError(ConfigError):
    """A run that another process trains."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps all other processes from training into a folder, which is made.

    On several hosts the first one holds the lock for all, and all must call this alike.
    Where the folder was made and nothing was written into it, it is gone afterwards.

    Args:
      folder: of the run.

    Raises:
      LockedError: another process has it.
      ConfigError: the folder cannot be made, or nothing can be written into it.
    """
    made: list[Path] = []
    file: int | None = None
    error: ConfigError | None = None
    # Asked of JAX itself, this would start its devices: a second process must go
    # before it takes memory of theirs from the first.
    joined = jax.distributed.is_initialized()
    if not joined or hosts.first():
        try:
            made = _make(folder)
            file = _take(folder / NAME)
        except ConfigError as raised:
            error = raised
    if joined:
        _agree(folder, error)
    if error is not None:
        _leave(folder, file, made)
        raise error
    try:
        yield
    finally:
        _leave(folder, file, made)


def _make(folder: Path) -> list[Path]:
    """Returns the folders that had to be made, the innermost first."""
    made = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return made


def _take(path: Path) -> int | None:
    """Returns the open file that holds the lock; None where there are no locks."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(path.parent, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(file)
            os.close(file)
            raise LockedError(
                f"a run must be trained by one process; got {path.parent} in the hands "
                f"of {owner}. Wait for its end, stop it, or start another run with "
                "--name NAME."
            ) from None
        except OSError as error:
            os.close(file)
            if error.errno not in UNKNOWN:
                raise _unwritable(path.parent, error) from error
            hosts.say(
                f"note: the file system of {path.parent} has no locks "
                f"({error.strerror}): nothing keeps a second process from this run"
            )
            return None
        # Its owner removes the file before it lets go: who waited in between has a lock
        # on a file that nobody else will ever find.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)
    _open.add(file)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"{_me()}\n".encode(), 0)
    except OSError as error:
        _let_go(path, file)
        raise _unwritable(path.parent, error) from error
    return file


def _me() -> str:
    """Who this process is, in words."""
    began = datetime.datetime.fromtimestamp(_began()).astimezone()
    since = began.isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, started {since}"


def _began() -> float:
    """When this process was started, in seconds since 1970."""
    try:
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(stat[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks)
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()  # no Linux: it cannot be long ago


def _read(file: int) -> str:
    """Who holds a lock that this process did not get."""
    said = os.pread(file, 200, 0).decode(errors="replace").strip()
    return said or "a process that has just taken it"


def _agree(folder: Path, error: ConfigError | None) -> None:
    """Raises ConfigError on the other hosts where the first one could not go on."""
    code = HELD if isinstance(error, LockedError) else UNWRITABLE if error else FINE
    code = hosts.tell(code)
    if code == FINE or error is not None:
        return
    if code == HELD:
        raise LockedError(
            f"a run must be trained by one job; got {folder} in the hands of another. "
            "Host 0 says whose."
        )
    raise ConfigError(
        f"{folder} must be a folder that host 0 can write; got an error there. Host 0 "
        "says which."
    )


def _leave(folder: Path, file: int | None, made: list[Path]) -> None:
    """Lets go of the lock, and of folders that nothing was written into."""
    if file is not None:
        _let_go(folder / NAME, file)
    with suppress(OSError):
        for path in made:
            path.rmdir()


def _let_go(path: Path, file: int) -> None:
    with suppress(OSError):
        # The folder may have been moved, and another run have its own lock here.
        if os.path.samestat(os.fstat(file), os.stat(path)):
            path.unlink()
    _open.discard(file)
    os.close(file)


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{folder} must be a folder that can be made and written; got "
        f"{error.strerror} for {error.filename or folder / NAME}. Mend that, or choose "
        "another with --output and --name."
    )


def _forget() -> None:
    """Closes, in a forked child, what would hold the lock after its parent's death."""
    for file in _open:
        with suppress(OSError):
            os.close(file)
    _open.clear()


os.register_at_fork(after_in_child=_forget)
