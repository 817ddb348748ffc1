"""Outcomes of cases, and how a check says that it does not hold."""

import time
import traceback
from collections.abc import Callable
from typing import Literal, NamedTuple


class FailedError(AssertionError):
    """What was promised does not hold; str() says what was found instead."""


class SkippedError(Exception):
    """A case that this machine cannot run; str() says why."""


class Outcome(NamedTuple):
    """How a case ended: a line of the report."""

    verdict: Literal["passed", "failed", "skipped"]
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
        said = function()
        verdict: Literal["passed", "failed", "skipped"] = "passed"
    except SkippedError as error:
        verdict, said = "skipped", str(error)
    except FailedError as error:
        verdict, said = "failed", str(error)
    except Exception as error:
        traceback.print_exc()
        verdict, said = "failed", f"{type(error).__name__}: {error}"
    text = " ".join(f"{what}: {said}".split()) if said else what
    return Outcome(verdict, text, time.monotonic() - began)


def shown(result: Outcome) -> str:
    """Returns the line of an outcome.

    >>> shown(Outcome("passed", "kill -9 during a save", 12.14))
    'passed   kill -9 during a save, 12.1 s'
    """
    return f"{result.verdict:<8} {result.what}, {result.seconds:.1f} s"


def summary(results: list[Outcome]) -> str:
    """Returns the last line of a report.

    >>> summary([Outcome("passed", "a", 1.0), Outcome("skipped", "b", 0.0)])
    '1 passed, 0 failed, 1 skipped'
    """
    count = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for result in results:
        count[result.verdict] += 1
    said = f"{count['passed']} passed, {count['failed']} failed"
    return said + f", {count['skipped']} skipped" * bool(count["skipped"])
