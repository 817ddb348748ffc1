"""Long runs: what a process holds does not grow."""

import os
import re
import statistics
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np

from . import kills, trainings

STEPS = 20_000
PICTURES, BETWEEN = 500, 5
"""Checkpoints and pictures of one run, and the steps from one to the next."""
A_SAVE, A_STEP = 20_000.0, 200.0
"""Bytes by which a process may grow with each: a save with its picture, a step."""
FLAT = 0.05
"""Share by which the files and threads of the end may be above those of the begin."""
# What a process holds at a step: resident bytes, open file descriptors, threads.
Held = namedtuple("Held", "done memory files threads")


def held(done, process):
    folder = Path("/proc") / str(process)
    status = (folder / "status").read_text()
    kib, threads = (
        int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1])
        for name in ("VmRSS", "Threads")
    )
    return Held(done, kib * 1024, len(os.listdir(folder / "fd")), threads)


def slope(samples):
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


def flat(samples, last, warm_up, most):
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
    few = f"{len(samples)} samples, none at the begin or the end"
    assert min(len(begin), len(end)), few
    by, error = slope([s for s in samples if s.done >= warm_up])
    said = [f"{by:+,.0f} +- {error:,.0f} bytes each time, of {most:,.0f}"]
    grown = ["memory"] * (max(by, error) > most)
    for name in ("files", "threads"):
        # A save in flight has files open: the usual number counts, not the largest.
        before, after = (
            statistics.median(getattr(s, name) for s in part) for part in (begin, end)
        )
        said.append(f"{before:.0f} -> {after:.0f} {name}")
        grown += [name] * (after / before - 1 > FLAT)
    assert not grown, f"{' and '.join(grown)} grew: {', '.join(said)}"
    return ", ".join(said)


def cases(folder, seed):
    """Long runs of digits, with its own network."""
    most = A_SAVE / BETWEEN
    many = partial(trained, folder, seed, PICTURES * BETWEEN, BETWEEN, most)
    yield f"{STEPS:,} steps", partial(trained, folder, seed, STEPS, STEPS, A_STEP)
    yield f"{PICTURES} checkpoints and pictures", many


def trained(folder, seed, last, every, most):
    """Trains, and says by how much the process grew with each step."""
    run, samples = folder / f"digits{last}", []
    # One device: the other core is for the other cases. Four times the usual steps,
    # alone, and then little else than checkpoints and pictures.
    given = ["digits", "--output", folder, "--name", run.name, "--train.seed", seed]
    given += ["--train.devices", 1, "--sample.steps", 10, "--sample.count", 4]
    given += ["--train.checkpoint-every", every, "--sample.every", every]
    given = [*map(str, [*given, "--train.steps", last])]
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
    trainings.succeeded(training)
    seconds = time.monotonic() - training.began
    table = ["\t".join(map(str, line)) for line in (Held._fields, *samples)]
    (folder / f"{run.name}.tsv").write_text("\n".join(table) + "\n")
    lines = trainings.logged(run)
    assert lines == list(range(50, last + 1, 50)), f"{len(lines)} lines"
    # Without the end, where a checkpoint is written and pictures are drawn.
    said = flat([s for s in samples if s.done < last], last, last // 5, most)
    kills.nothing_left(run)
    leaves = len(trainings.state_of(run))
    return f"{said}; {last / seconds:.0f} steps/s; {leaves} leaves, nothing left over"
