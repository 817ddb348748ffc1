"""Bounds and marks of a field, in its type: `Annotated[int, at_least(1), FREE]`."""

import dataclasses
import enum
import math
import operator
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

MOST = 2**31 - 1
"""Largest whole number where a field has no bound of its own: an int32 holds it."""
MOST_SEED = 2**32 - 1
"""JAX reads 32 bits of a seed: beyond, two seeds would be the same."""


class Must(NamedTuple):
    """A condition on a value, in words and as a function; None always passes."""

    words: str
    holds: Callable[[Any], bool]


class Entries(NamedTuple):
    """The most entries that a list may have."""

    most: int


class Mark(enum.Enum):
    """What a field decides."""

    FREE = enum.auto()
    """Speed, place or what is shown, not what is learned: a run may resume with another
    value."""
    SHAPE = enum.auto()
    """What is computed with the weights: trained weights fit one value only."""
    HOW = enum.auto()
    """How the network is computed, not what it is."""


FREE, SHAPE, HOW = Mark.FREE, Mark.SHAPE, Mark.HOW


def at_least(low: float) -> Must:
    """Returns the condition of a lower bound."""
    return Must(f"at least {low}", lambda value: value >= low)


def between(low: float, high: float) -> Must:
    """Returns the condition of two bounds, both allowed."""
    return Must(f"from {low} to {high}", lambda value: low <= value <= high)


_Held = Must(f"at most {MOST}", lambda value: value <= MOST)
Whole = Annotated[int, at_least(0), _Held]
Count = Annotated[int, at_least(1), _Held]
Seed = Annotated[int, between(0, MOST_SEED)]
Positive = Annotated[float, Must("above 0", lambda value: value > 0)]
Share = Annotated[float, Must("at least 0 and below 1", lambda value: 0 <= value < 1)]


def fields(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all fields and sections, as ('section.field', annotated type)."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        yield prefix + name, hint
        kind, _ = _parts(hint)
        if dataclasses.is_dataclass(kind):
            yield from fields(kind, f"{prefix}{name}.")


def marked(cls: Any, mark: Mark) -> list[str]:
    """Returns the names of the fields and sections with a mark."""
    return [name for name, hint in fields(cls) if mark in _parts(hint)[1]]


def problems(values: Any) -> Iterator[tuple[str, str, object]]:
    """Yields the values that break a bound: (field, what it must be, what was got)."""
    for name, hint in fields(type(values)):
        for must, got in _wrong(operator.attrgetter(name)(values), hint):
            yield name, must, got


def _wrong(value: Any, hint: Any) -> Iterator[tuple[str, object]]:
    if value is None:
        return
    kind, known = _parts(hint)
    for fact in known:
        if isinstance(fact, Must) and not fact.holds(value):
            yield fact.words, value
        if isinstance(fact, Entries) and len(value) > fact.most:
            yield f"at most {fact.most} entries", len(value)
    if isinstance(value, float) and not math.isfinite(value):
        yield "finite", value  # JSON could not give it back
    if isinstance(value, tuple):
        for entry in value:
            yield from _wrong(entry, typing.get_args(kind)[0])
    elif typing.get_args(kind)[1:] == (type(None),):
        yield from _wrong(value, typing.get_args(kind)[0])


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns a type without its annotations, and these."""
    if typing.get_origin(hint) is not Annotated:
        return hint, ()
    kind, *known = typing.get_args(hint)
    return kind, tuple(known)
