"""Errors that a user can mend, and helpers that write their messages."""

import difflib
from collections.abc import Sequence
from importlib.util import find_spec


class DataError(ValueError):
    """Data cannot be used; the message says what must hold, was got, and to do."""


class MissingError(ImportError):
    """A package that an optional feature needs is not installed."""


def needs(package: str, to: str, extra: str) -> None:
    """Raises MissingError where a package is not installed; imports nothing.

    Args:
      package: its name, as it is imported.
      to: what it is needed for, a verb first.
      extra: of this project, which brings it.

    >>> needs("nowhere", "draw a plot", "plots")
    Traceback (most recent call last):
    diffusion_jax.errors.MissingError: cannot draw a plot: nowhere is missing. Install
    it with pip install 'diffusion-jax[plots]'.
    """
    if find_spec(package) is None:
        raise MissingError(
            f"cannot {to}: {package} is missing. Install it with "
            f"pip install 'diffusion-jax[{extra}]'."
        )


def check_positive(name: str, value: float, hint: str) -> None:
    """Raises ValueError where a number is not above 0.

    >>> check_positive("gamma", 0.0, "The usual value is 5.")
    Traceback (most recent call last):
    ValueError: gamma must be above 0; got 0.0. The usual value is 5.
    """
    if not value > 0:
        raise ValueError(f"{name} must be above 0; got {value}. {hint}")


def raise_unknown(what: str, got: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError for a name that is not among those allowed."""
    near = difflib.get_close_matches(str(got), allowed, 1, cutoff=0.3)
    hint = f"Did you mean {near[0]!r}?" if near else f"Choose {allowed[0]!r}, say."
    raise ValueError(f"{what} must be one of {', '.join(allowed)}; got {got!r}. {hint}")


def first_of(said: Sequence[str], most: int = 3) -> str:
    """Returns the first few problems as one line, and how many more there are.

    >>> first_of(["a", "b", "c", "d"])
    'a; b; c and 1 more'
    """
    more = f" and {len(said) - most} more" if len(said) > most else ""
    return "; ".join(said[:most]) + more


def counted(number: int, one: str, many: str = "") -> str:
    """Returns a number with its noun, in singular or plural.

    >>> counted(1, "step"), counted(1797, "image"), counted(0, "class", "classes")
    ('1 step', '1,797 images', '0 classes')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


class ConfigError(ValueError):
    """A command cannot do what was asked, and its user can mend that."""


class DivergedError(ConfigError):
    """Training diverged: too many steps in a row were not finite."""
