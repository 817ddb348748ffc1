"""Whether the tests notice mistakes: `make mutations`, or `python -m tests.mutations`.

A breakage is a mistake that somebody could make, and the tests that must fail with it.
"""

from typing import NamedTuple


class Breakage(NamedTuple):
    """A text to be replaced, and who should notice."""

    name: str
    file: str
    """Relative to the repository."""
    old: str
    """What is there, once."""
    new: str
    tests: str
    """Arguments for pytest: the quickest tests that must fail."""
