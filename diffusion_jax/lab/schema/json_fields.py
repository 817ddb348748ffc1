"""Reads JSON that may come from anywhere into dataclasses, checking every type."""

import dataclasses
import errno
import json
import math
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema.facts import Must

MOST = 2**24
"""Bytes that a file may have: thousands of times what a configuration has."""


def load(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged or far too large, or as `parse`.
    """
    if path.exists() and not path.is_file():  # a pipe may have no end
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with path.open("rb") as file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise ValueError(f"more than {MOST} bytes")
    return parse(content.decode("utf-8"))


def parse(text: str) -> Any:
    """Returns the content of JSON text.

    Raises:
      ValueError: it is damaged or nested too deeply, or an object has a name twice.

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


def read(
    values: Any,
    cls: Any,
    prefix: str = "",
    *,
    hint: str = "Read the file with the version that wrote it.",
) -> tuple[Any, list[tuple[str, str, str]]]:
    """Returns the dataclass with these values, and which of them are wrong.

    It is None where some are. A field without a value has its default.

    The prefix is of the names of its fields, such as "net."; `hint` says what to do
    about a key that no field has.

    Returns:
      The dataclass, and (field, what it must be, what was got) of each wrong value.

    Raises:
      ConfigError: a key that no field has.
    """
    if not isinstance(values, dict):
        where = prefix.rstrip(".") or "the whole"
        return None, [(where, "an object with fields", _shown(values))]
    hints = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - hints):
        raise ConfigError(
            f"the fields of {cls.__name__} must be among {', '.join(hints)}; got "
            f"{', '.join(unknown)}. {hint}"
        )
    wrong, fields = [], {}
    for name, value in values.items():
        kind, key = hints[name], prefix + name
        if dataclasses.is_dataclass(kind):
            fields[name], more = read(value, kind, f"{key}.", hint=hint)
            wrong += more
            continue
        must = _of_type(kind)
        if not must.holds(value):
            wrong.append((key, must.words, _shown(value)))
        # JSON has one kind of list, and of number: some write 2.0 as 2.
        elif isinstance(value, list):
            fields[name] = tuple(value)
        else:
            whole = kind in (float, float | None) and value is not None
            fields[name] = float(value) if whole else value
    return None if wrong else cls(**fields), wrong


def is_whole(value: Any) -> bool:
    """Returns whether a JSON value is a whole number; true is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Returns whether a JSON value is a number that is finite as a float."""
    try:
        return (is_whole(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:
        return False


_PLAIN = {
    int: Must("a whole number", is_whole),
    float: Must("a finite number", is_finite),
    bool: Must("true or false", lambda value: isinstance(value, bool)),
    str: Must("text", lambda value: isinstance(value, str)),
}


def _of_type(hint: Any) -> Must:
    """Returns the condition on a JSON value for a field of a type.

    >>> _of_type(tuple[int, ...]).words, _of_type(float | None).words
    ('a list of whole numbers', 'null or a finite number')
    >>> _of_type(int | tuple[int, int]).words
    'a whole number or a list of 2 whole numbers'
    """
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return Must(f"one of {', '.join(parts)}", lambda value: value in parts)
    if not parts:
        return _PLAIN[hint]
    of = _of_type(parts[0])
    if type(None) in parts:
        return Must(f"null or {of.words}", lambda v: v is None or of.holds(v))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        other = _of_type(parts[1])
        words = f"{of.words} or {other.words}"
        return Must(words, lambda value: of.holds(value) or other.holds(value))
    length = None if parts[1] is ... else len(parts)
    count = f"{length} " if length else ""
    return Must(
        f"a list of {count}{of.words.removeprefix('a ')}s",
        lambda value: (
            isinstance(value, list | tuple)
            and length in (None, len(value))
            and all(map(of.holds, value))
        ),
    )


def _shown(value: Any) -> str:
    """Returns a value as JSON writes it, shortened where it is long."""
    plain = value is None or isinstance(value, bool)
    return json.dumps(value) if plain else reprlib.repr(value)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of all sections as {'section.field': value}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
