"""Long runs: what a process holds does not grow."""

import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import trainings
from .cases import Outcome, check, outcome

STEPS = 20_000
PICTURES, BETWEEN = 500, 5
"""Checkpoints and pictures of one run, and the steps from one to the next."""
A_SAVE, A_STEP = 20_000.0, 200.0
"""Bytes by which a process may grow with each: a save with its picture, a step."""
FLAT = 0.05
"""Share by which the files and threads of the end may be above those of the begin."""


class Held(NamedTuple):
    """What a process holds at a time."""

    done: int
    memory: int
    """Resident, bytes."""
    files: int
    """Open file descriptors."""
    threads: int


def held(done: int, process: int | str = "self") -> Held:
    """Returns what a process holds now."""
    folder = Path("/proc") / str(process)
    status = (folder / "status").read_text()
    kib, threads = (
        int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1])
        for name in ("VmRSS", "Threads")
    )
    return Held(done, kib * 1024, len(os.listdir(folder / "fd")), threads)


def slope(samples: Sequence[Held]) -> tuple[float, float]:
    """Returns the bytes that memory grows by each time, and the standard error.

    What a process holds goes up and down for a while, so that neighbours are alike:
    the line is through the medians of twelve parts.

    >>> grown = [Held(n, 7 * n + n % 2, 0, 0) for n in range(240)]
    >>> [round(value, 2) for value in slope(grown)]
    [7.0, 0.0]
    """
    parts = np.array_split(np.array([(s.done, s.memory) for s in samples], float), 12)
    x, y = np.array([np.median(part, axis=0) for part in parts]).T
    line, covariance = np.polyfit(x - x.mean(), y, 1, cov=True)
    return float(line[0]), float(np.sqrt(covariance[0, 0]))


def flat(samples: Sequence[Held], last: int, warm_up: int, most: float) -> str:
    """Checks that nothing has grown since a warm-up; says from what to what.

    Args:
      samples: what was held, over all the time.
      last: steps in all.
      warm_up: how many of them do not count.
      most: bytes that memory may grow by each time; the error must be below it too, or
        nothing has been measured.
    """
    part = (last - warm_up) // 8
    begin = [s for s in samples if warm_up <= s.done < warm_up + part]
    end = [s for s in samples if s.done > last - part]
    check(begin and end, f"{len(samples)} samples, none at the begin or the end")
    said, grown = [], []
    by, error = slope([s for s in samples if s.done >= warm_up])
    said.append(f"{by:+,.0f} +- {error:,.0f} bytes each time, of {most:,.0f}")
    if max(by, error) > most:
        grown.append("memory")
    for name in ("files", "threads"):
        # A save in flight has files open: the usual number counts, not the largest.
        before, after = (
            statistics.median(getattr(s, name) for s in part) for part in (begin, end)
        )
        said.append(f"{before:.0f} -> {after:.0f} {name}")
        if after / before - 1 > FLAT:
            grown.append(name)
    check(not grown, f"{' and '.join(grown)} grew: {', '.join(said)}")
    return ", ".join(said)


def cases(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes of long runs of digits, with its own network."""
    # One device: the other core is for the other cases. Four times the usual steps,
    # alone, and then little else than checkpoints and pictures.
    flags = ["--train.seed", str(seed), "--train.devices", "1"]
    flags += ["--sample.steps", "10", "--sample.count", "4"]

    def grown(last: int, every: int, most: float) -> str:
        at = ["--train.checkpoint-every", str(every), "--sample.every", str(every)]
        return _grown(folder, [*flags, *at], last, most)

    yield outcome(f"{STEPS:,} steps", lambda: grown(STEPS, STEPS, A_STEP))
    yield outcome(
        f"{PICTURES} checkpoints and pictures",
        lambda: grown(PICTURES * BETWEEN, BETWEEN, A_SAVE / BETWEEN),
    )


def _grown(folder: Path, flags: list[str], last: int, most: float) -> str:
    """Trains, and says by how much the process grew with each step."""
    run, samples = folder / f"digits{last}", list[Held]()
    given = ["digits", "--output", str(folder), "--name", run.name, *flags]
    given += ["--train.steps", str(last)]
    training = trainings.start(run, log=folder / f"{run.name}.log", given=given)
    while training.process.poll() is None:
        done = trainings.logged(run)
        if done:
            # Between the last look and the end the process may have gone.
            try:
                samples.append(held(done[-1], training.process.pid))
            except (OSError, TypeError):
                break
        time.sleep(1)
    code = trainings.ended(training)
    seconds = time.monotonic() - training.began
    check(code == 0, f"exit code {code}, {trainings.last_words(training.log)}")
    _write(folder / f"{run.name}.tsv", samples)
    lines = trainings.logged(run)
    check(lines == list(range(50, last + 1, 50)), f"{len(lines)} lines")
    # Without the end, where a checkpoint is written and pictures are drawn.
    said = flat([s for s in samples if s.done < last], last, last // 5, most)
    return f"{said}; {last / seconds:.0f} steps/s; {_verified(run)}"


def _verified(run: Path) -> str:
    state = trainings.state_of(run)
    left = trainings.left_over(run)
    check(not left, f"left over: {left[:3]}")
    return f"{len(state)} leaves, nothing left over"


def _write(path: Path, samples: Sequence[Held]) -> None:
    lines = ["\t".join(Held._fields), *("\t".join(map(str, s)) for s in samples)]
    path.write_text("\n".join(lines) + "\n")
