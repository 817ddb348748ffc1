"""Two processes on one folder: the second is refused, a dead owner holds no lock."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from . import moments, trainings
from .cases import Outcome, check, outcome

STEPS = 400
WITHIN = 15.0
"""Seconds in which a second process must be refused."""
ROUNDS = 4


def cases(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes."""
    rng = random.Random(seed)
    cache, flags = folder / "cache", ["--train.steps", STEPS]
    run, whole = folder / "both" / "digits", folder / "whole" / "digits"
    yield trainings.undisturbed(whole, STEPS, cache=cache)

    def refused(number: int) -> str:
        logs = [folder / f"{name}{number}.log" for name in ("owner", "second")]
        owner = trainings.start(run, *flags, log=logs[0], cache=cache)
        moments.wait(owner, moments.stepping(owner))
        check(owner.process.poll() is None, trainings.last_words(logs[0]))
        # It would be at its end before the other one has loaded its modules.
        owner.process.send_signal(signal.SIGSTOP)
        second = trainings.start(run, *flags, log=logs[1], cache=cache)
        said = trainings.refused(second, run.name, owner.process.pid, codes=[2])
        seconds = time.monotonic() - second.began
        check(seconds < WITHIN, f"only after {seconds:.1f} s")
        owner.process.send_signal(signal.SIGCONT)
        check(owner.process.poll() is None, trainings.last_words(logs[0]))
        moments.wait(owner, moments.later(moments.started(owner), rng.uniform(0, 0.5)))
        trainings.kill(owner)
        return f"{said[:80]!r} after {seconds:.1f} s; then the owner was killed"

    def two_at_once() -> str:
        logs = [folder / f"at_once{number}.log" for number in range(2)]
        both = [trainings.start(run, *flags, log=log, cache=cache) for log in logs]
        until = time.monotonic() + 60
        while all(each.process.poll() is None for each in both):
            check(time.monotonic() < until, "both at work after 60 s")
            time.sleep(0.05)
        loser = next(each for each in both if each.process.poll() is not None)
        winner = next(each for each in both if each is not loser)
        trainings.refused(loser, run.name, codes=[2])
        winner.process.send_signal(signal.SIGTERM)
        code = trainings.ended(winner)
        check(code in (0, 143), f"exit code {code}")
        return "one of them was refused"

    for number in range(ROUNDS):
        yield outcome(f"a second process #{number + 1}", lambda n=number: refused(n))
    yield outcome("two started at once", two_at_once)

    def last() -> str:
        trainings.finish(run, *flags, log=folder / "last.log", cache=cache)
        return trainings.same_end(run, whole, STEPS)

    yield outcome("after its owner's death the run goes on to an equal end", last)
