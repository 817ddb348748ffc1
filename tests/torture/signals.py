"""Asked to stop at any moment: a checkpoint at the current step, and the same end."""

import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from . import moments, trainings
from .cases import Outcome, check, outcome
from .trainings import Training

STEPS = 1200
WITHIN = 30.0
"""Seconds in which a run must have ended after a signal."""
AT_ONCE = 3.0
"""Seconds in which it must have ended after a second one."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def cases(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes: one a signal, and those of the run that came of it."""
    rng = random.Random(seed)
    flags = ["--train.steps", STEPS]
    run, whole = folder / "stopped" / "digits", folder / "whole" / "digits"
    plans = [
        *[("the start", moments.started, rng.uniform(0.2, 3)) for _ in range(4)],
        *[("compilation", compiling, rng.uniform(0.1, 4)) for _ in range(2)],
        *[("steps", moments.stepping, rng.uniform(0, 1)) for _ in range(4)],
        *[("a save", saving, rng.uniform(0, 0.05)) for _ in range(2)],
        *[("a grid", moments.drawing, rng.uniform(0, 0.02)) for _ in range(2)],
    ]
    for number, (name, seen, delay) in enumerate(plans):
        kind = SIGNALS[number % 2]
        log = folder / "logs" / f"{number}.log"

        def stopped(seen=seen, delay=delay, kind=kind, log=log) -> str:
            training = trainings.start(run, *flags, log=log)
            came = moments.wait(training, moments.later(seen(training), delay))
            check(came, f"the moment did not come, {trainings.last_words(log)}")
            return one(training, kind)

        yield outcome(f"{kind.name} during {name}", stopped)
    for kind in SIGNALS:
        log = folder / "logs" / f"twice_{kind.name}.log"

        def twice(kind=kind, log=log) -> str:
            training = trainings.start(run, *flags, log=log)
            came = moments.wait(training, saving(training))
            check(came, f"no checkpoint was written, {trainings.last_words(log)}")
            return second(training, kind)

        yield outcome(f"{kind.name} twice", twice)
    yield outcome(
        "the run goes on to its end",
        lambda: trainings.finish(run, *flags, log=folder / "end.log") and None,
    )
    yield trainings.undisturbed(whole, STEPS, cache=folder / "cache")
    yield outcome("stopped run", lambda: trainings.same_end(run, whole, STEPS))


def compiling(training: Training) -> moments.Moment:
    """The process has said where it begins."""
    return moments.said(training, " step ")


def saving(training: Training) -> moments.Moment:
    """The process writes a checkpoint; what another one left does not count."""
    return moments.then(moments.stepping(training), moments.saving(training))


def one(training: Training, kind: signal.Signals) -> str:
    """Checks that a run ends well after a signal."""
    before = max(trainings.logged(training.run), default=0)
    training.process.send_signal(kind)
    began = time.monotonic()
    code = trainings.ended(training, within=2 * WITHIN)
    seconds, printed = time.monotonic() - began, trainings.text(training.log)
    check(seconds < WITHIN, f"{seconds:.1f} s")
    check("Traceback" not in printed, trainings.last_words(training.log))
    codes = [128 + kind]
    if not printed:  # while Python loads the program, the kernel may end it
        codes.append(-kind)
    check(code in codes, f"exit code {code}, {trainings.last_words(training.log)}")
    found = re.search(r"stopped at step ([\d,]+)", printed)
    if found is None:
        check("first step after" not in printed, trainings.last_words(training.log))
        return f"exit code {code} after {seconds:.1f} s, before the first step"
    step = int(found[1].replace(",", ""))
    newest = max(trainings.steps_of(training.run), default=0)
    check(newest == step, f"stopped at {step}, with {newest} as the last checkpoint")
    check(before <= step <= before + 40, f"stopped at {step}, signalled at {before}")
    return f"exit code {code} after {seconds:.1f} s, a checkpoint at step {step}"


def second(training: Training, kind: signal.Signals) -> str:
    """Checks that a second signal ends a run at once."""
    training.process.send_signal(kind)
    time.sleep(0.05)
    began = time.monotonic()
    training.process.send_signal(kind)
    code = trainings.ended(training, within=2 * WITHIN)
    seconds, printed = time.monotonic() - began, trainings.text(training.log)
    check(seconds < AT_ONCE, f"{seconds:.1f} s")
    check(code in (-kind, 128 + kind), f"exit code {code}")
    check("Traceback" not in printed, trainings.last_words(training.log))
    return f"exit code {code} after {seconds:.1f} s"
