"""Asked to stop at any moment: a checkpoint at the current step, and the same end."""

import random
import re
import signal
import time
from functools import partial

from . import moments, trainings

STEPS = 1200
FLAGS = "--train.steps", STEPS
WITHIN, AT_ONCE = 30.0, 3.0
"""Seconds in which a run must have ended after a signal, and after a second one."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What it is doing, how often, and the longest and shortest time after that begins.
PLANS = (
    ("the start", 4, moments.started, (0.2, 3)),
    ("compilation", 2, moments.beginning, (0.1, 4)),
    ("steps", 4, moments.stepping, (0, 1)),
    ("a save", 2, moments.saving, (0, 0.05)),
    ("a grid", 2, moments.drawing, (0, 0.02)),
)


def cases(folder, seed):
    """One a signal, and those of the run that came of it."""
    rng = random.Random(seed)
    run, whole = folder / "stopped" / "digits", folder / "whole" / "digits"
    for name, times, seen, between in PLANS:
        for number in range(times):
            kind, log = SIGNALS[number % 2], folder / "logs" / f"{name} {number}.log"
            given = run, log, kind, seen, rng.uniform(*between)
            yield f"{kind.name} during {name}", partial(stopped, *given)
    for kind in SIGNALS:
        log = folder / "logs" / f"twice_{kind.name}.log"
        yield f"{kind.name} twice", partial(twice, run, log, kind)
    end = partial(trainings.finish, run, *FLAGS, log=folder / "end.log")
    yield "the run goes on to its end", end
    yield trainings.undisturbed(whole, STEPS, cache=folder / "cache")
    yield "stopped run", partial(trainings.same_end, run, whole, STEPS)


def sent(run, log, kind, seen, delay=0.0):
    """A training that was sent a signal at a moment, and the last step by then."""
    training = trainings.start(run, *FLAGS, log=log)
    came = moments.wait(training, moments.later(seen(training), delay))
    assert came, f"the moment did not come, {trainings.last_words(log)}"
    before = max(trainings.logged(run), default=0)
    training.process.send_signal(kind)
    return training, before


def left(training, within):
    """Exit code, what was printed, and both in words, of one that had to end soon."""
    began = time.monotonic()
    code = trainings.ended(training, within=2 * WITHIN)
    seconds, printed = time.monotonic() - began, trainings.text(training.log)
    assert seconds < within, f"{seconds:.1f} s"
    assert "Traceback" not in printed, trainings.last_words(training.log)
    return code, printed, f"exit code {code} after {seconds:.1f} s"


def stopped(run, log, kind, seen, delay):
    training, before = sent(run, log, kind, seen, delay)
    code, printed, said = left(training, WITHIN)
    # While Python loads the program, the kernel may end it.
    codes = [128 + kind] if printed else [128 + kind, -kind]
    assert code in codes, f"exit code {code}, {trainings.last_words(log)}"
    found = re.search(r"stopped at step ([\d,]+)", printed)
    if found is None:
        assert "first step after" not in printed, trainings.last_words(log)
        return f"{said}, before the first step"
    step, newest = int(found[1].replace(",", "")), max(trainings.steps_of(run))
    assert newest == step, f"stopped at {step}, with {newest} as the last checkpoint"
    assert before <= step <= before + 40, f"stopped at {step}, signalled at {before}"
    return f"{said}, a checkpoint at step {step}"


def twice(run, log, kind):
    training, _ = sent(run, log, kind, moments.saving)
    time.sleep(0.05)
    training.process.send_signal(kind)
    code, _, said = left(training, AT_ONCE)
    assert code in (-kind, 128 + kind), said
    return said
