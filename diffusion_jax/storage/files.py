"""Replaces files atomically."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replacing(
    path: str | os.PathLike[str], *, durable: bool = False
) -> Iterator[IO[bytes]]:
    """Opens a file that replaces another once all of it is written.

    Until then it is .<name>.<process>.<random>.tmp beside it: several hosts that share
    the folder may write it at once, and the last to finish wins.

    Args:
      path: of the file; its folder is made.
      durable: whether to sync it to the disk before it is renamed, so that it survives
        a power failure; that takes milliseconds.

    Raises:
      OSError: it cannot be written, with its path. Nothing is left of it, and what was
        there stays.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk has no name of its own
        raise
