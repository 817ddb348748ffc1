"""Outcomes of cases, and how a check says that it does not hold."""

import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

PRIVATE = "TORTURE_MOUNTS_ARE_PRIVATE"
"""Set in the environment where what is mounted is gone with the case."""


class FailedError(AssertionError):
    """What was promised does not hold; str() says what was found instead."""


class SkippedError(Exception):
    """A case that this machine cannot run; str() says why."""


class Outcome(NamedTuple):
    """How a case ended: passed, failed or skipped; a line of the report."""

    verdict: str
    what: str
    seconds: float


def check(holds: object, said: str) -> None:
    """Raises FailedError with what was found, unless something holds."""
    if not holds:
        raise FailedError(said)


def outcome(what: str, function: Callable[[], str | None]) -> Outcome:
    """Returns how a case ended; what the function returns is added to its line."""
    began = time.monotonic()
    try:
        verdict, said = "passed", function()
    except SkippedError as error:
        verdict, said = "skipped", str(error)
    except Exception as error:
        if not isinstance(error, FailedError):
            traceback.print_exc()
        verdict, said = "failed", f"{type(error).__name__}: {error}"
    text = " ".join(f"{what}: {said}".split()) if said else what
    return Outcome(verdict, text, time.monotonic() - began)
