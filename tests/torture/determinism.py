"""The same seed, the same bytes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from . import trainings
from .cases import Outcome, outcome

STEPS = 120
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


def total(run: Path) -> str:
    """Returns one sha256 of all that a run ended with."""
    leaves = sorted(trainings.state_of(run).items())
    text = repr(leaves).encode() + (run / "metrics.jsonl").read_bytes()
    return hashlib.sha256(text).hexdigest()
