"""The same seed, the same bytes; other devices, the same numbers."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from . import trainings
from .cases import Outcome, check, outcome

STEPS = 120
ORDER = (8, 4, 1, 8)
"""Devices of a run in four parts."""
PART = 5
"""Steps of each part."""
CLOSE = 1e-5
"""Of the largest number of a leaf."""
FAKE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def cases(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes."""
    flags = ["--train.seed", seed, "--train.steps", STEPS]
    one, other = (folder / name / "digits" for name in ("one", "other"))

    def twice(*more: str, extra: dict[str, str] | None = None, kind: str = "") -> str:
        pair = [run.with_name(f"digits{kind}") for run in (one, other)]
        for run in pair:
            log = run.with_suffix(".log")
            trainings.finish(run, *flags, *more, log=log, extra=extra)
        trainings.same_end(*pair, STEPS)
        return f"sha256 {total(pair[0])[:16]}"

    yield outcome("two fresh processes, 1 device", twice)
    eight = ("--train.devices", "8")
    yield outcome(
        "two fresh processes, 8 devices", lambda: twice(*eight, extra=FAKE, kind="8")
    )
    yield outcome(
        "two fresh processes, 8 devices that share the parameters",
        lambda: twice(*eight, "--train.fsdp", "4", extra=FAKE, kind="8fsdp"),
    )

    def parts() -> str:
        run, whole = folder / "parts" / "digits", folder / "whole" / "digits"
        short = ["--train.steps", PART * len(ORDER)]
        for number, devices in enumerate(ORDER):
            end = (number + 1) * PART
            stop = ["--train.stop-at", end] * (end < PART * len(ORDER))
            log = folder / "parts" / f"{number}.log"
            more = ["--train.devices", devices, *stop]
            trainings.finish(run, *short, *more, log=log, extra=FAKE)
            begun = trainings.begun_at(log)
            check(begun == number * PART, f"part {number} began at step {begun}")
        log = folder / "whole" / "log"
        more = ["--train.devices", ORDER[0]]
        trainings.finish(whole, *short, *more, log=log, extra=FAKE)
        trainings.every_step(run, PART * len(ORDER))
        return f"within {furthest(run, whole):.1e} after {PART * len(ORDER)} steps"

    order = " -> ".join(map(str, ORDER))
    yield outcome(f"{order} devices, against {ORDER[0]} all the way", parts)


def total(run: Path) -> str:
    """Returns one sha256 of all that a run ended with."""
    leaves = sorted(trainings.state_of(run).items())
    text = repr(leaves).encode() + (run / "metrics.jsonl").read_bytes()
    return hashlib.sha256(text).hexdigest()


def furthest(run: Path, other: Path) -> float:
    """Checks that two runs ended in nearly the same state; returns how near.

    The bias of the keys in attention is left out: its gradient is 0, and Adam follows
    its rounding error.
    """
    import numpy as np

    one, two = (trainings.arrays_of(path) for path in (run, other))
    check(one.keys() == two.keys(), "other leaves")
    largest = 0.0
    for path in one:
        if path.endswith("['key']['bias']"):
            continue
        a, b = (np.asarray(x[path], np.float64) for x in (one, two))
        with contextlib.suppress(ValueError):  # of nothing there is no largest
            scale = max(1.0, float(np.abs(b).max()))
            apart = float(np.abs(a - b).max()) / scale
            check(apart <= CLOSE, f"{path}: {apart:.1e} apart")
            largest = max(largest, apart)
    return largest
