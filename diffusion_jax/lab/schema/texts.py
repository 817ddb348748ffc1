"""JSON that may come from anywhere: bounded, and each name in it once."""

import json
from pathlib import Path
from typing import Any

MOST = 2**24
"""Bytes of a file: thousands of times what a configuration has."""


def read(path: Path) -> Any:
    """Returns what a file of JSON holds.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged or far too large, or as `parse`.
    """
    with path.open("rb") as file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise ValueError(f"more than {MOST} bytes")
    return parse(content.decode("utf-8"))


def parse(text: str) -> Any:
    """Returns what JSON says.

    Raises:
      ValueError: it is damaged or nested too deeply, or an object has a name twice, of
        which readers take one or the other.

    >>> parse('{"blocks": 2, "blocks": 3}')
    Traceback (most recent call last):
    ValueError: the name 'blocks' twice in one object
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("brackets within brackets, too many") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} twice in one object")
        found[name] = value
    return found
