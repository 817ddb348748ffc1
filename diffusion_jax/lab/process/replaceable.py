"""Checks that a file named by a flag is new, or one that the command wrote."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from diffusion_jax.errors import ConfigError

HEAD = 4096
"""Bytes of a file in which it says what it is."""


def typed(command: str, argv: Sequence[str]) -> str:
    """Returns the command line, to be kept in the file that it makes.

    >>> typed("sample", ["digits", "--out", "a b.png"])
    "python -m experiments.sample digits --out 'a b.png'"
    """
    return shlex.join(["python", "-m", f"experiments.{command}", *argv])


def report_of(command: str) -> bytes:
    """Returns the mark of a JSON file whose first entry, `command`, is `typed`."""
    return f'"command": "{typed(command, [])}'.encode()


def check_file(path: Path, *marks: bytes, overwrite: bool) -> None:
    """Raises ConfigError where something else would be replaced.

    The marks are of what may be replaced, see `has`; with `overwrite` any file may be.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"cannot write {path}: that is no file. Name another.")
    if path.is_file() and not overwrite and not has(path, *marks):
        raise ConfigError(
            f"cannot write {path}: a file is there that this command did not write. "
            "Name another, or give --overwrite."
        )


def has(path: Path, *marks: bytes) -> bool:
    """Returns whether one of the marks is in the first bytes of a file."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    return any(mark in head for mark in marks)
