"""Values of the fields of dataclasses, as JSON has them: what fits a field."""

import dataclasses
import json
import math
import reprlib
import typing
from typing import Any, Literal

from diffusion_jax.errors import ConfigError


def read(
    values: Any,
    cls: Any,
    prefix: str,
    partial: bool,
    wrong: list[tuple[str, str, str]],
) -> Any:
    """Returns the dataclass that JSON's values are of; None where some are wrong.

    Args:
      values: as JSON has them.
      cls: the dataclass.
      prefix: of the names of its fields, such as "net.".
      partial: whether fields may be missing, and then have their defaults.
      wrong: what is wrong is added to it, as (field, what it must be, what was got).

    Raises:
      ConfigError: a key that no field has, or a field without a key.
    """
    if not isinstance(values, dict):
        where = prefix.rstrip(".") or "the whole"
        wrong.append((where, "an object with fields", _shown(values)))
        return None
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(
            f"the fields of {cls.__name__} must be among {', '.join(hints)}; got "
            f"{', '.join(unknown)}. Read the file with the version that wrote it."
        )
    missing = sorted(set(hints) - set(values))
    if missing and not partial:
        raise ConfigError(
            f"all fields of {cls.__name__} must be there; got none of "
            f"{', '.join(missing)}. Read the file with the version that wrote it."
        )
    before, fields = len(wrong), {}
    for name, value in values.items():
        hint, key = hints[name], prefix + name
        if dataclasses.is_dataclass(hint):
            fields[name] = read(value, hint, f"{key}.", partial, wrong)
        elif not _fits(value, hint):
            wrong.append((key, _words(hint), _shown(value)))
        elif isinstance(value, list):
            fields[name] = tuple(value)
        else:
            # JSON has one kind of number, and some write 2.0 as 2.
            whole = hint in (float, float | None) and value is not None
            fields[name] = float(value) if whole else value
    return cls(**fields) if len(wrong) == before else None


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a field of this type may have a value of JSON."""
    parts = typing.get_args(hint)
    if type(None) in parts:
        return value is None or _fits(value, parts[0])
    if typing.get_origin(hint) is Literal:
        return value in parts
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            return False
        hints = parts[:1] * len(value) if parts[1] is ... else parts
        return len(value) == len(hints) and all(map(_fits, value, hints))
    if hint is float:
        return is_finite(value)
    return is_whole(value) if hint is int else isinstance(value, hint)


def is_whole(value: Any) -> bool:
    """Returns whether a value of JSON is a whole number, which true is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Returns whether a value of JSON is a number that is finite as a float."""
    try:
        return (is_whole(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:
        return False


def _words(hint: Any) -> str:
    """Returns what a field of a type must be.

    >>> _words(tuple[int, ...]), _words(float | None)
    ('a list of whole numbers', 'null or a finite number')
    """
    parts = typing.get_args(hint)
    if type(None) in parts:
        return f"null or {_words(parts[0])}"
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(parts)}"
    if typing.get_origin(hint) is tuple:
        count = "" if parts[1] is ... else f"{len(parts)} "
        return f"a list of {count}{_words(parts[0]).removeprefix('a ')}s"
    words = {int: "a whole number", float: "a finite number", bool: "true or false"}
    return words.get(hint, "text")


def _shown(value: Any) -> str:
    """Returns a value as JSON has it; of a long one, its ends."""
    plain = value is None or isinstance(value, bool)
    return json.dumps(value) if plain else reprlib.repr(value)


def jsonable(value: Any) -> Any:
    """Returns a value as JSON has it: tuples are lists."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of all sections as {'section.field': value}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
