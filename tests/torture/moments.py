"""When to strike: what the folder of a run shows of what its process is doing.

A moment is polled until it has come. What was really hit is told afterwards, by what
the process left behind.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from . import trainings
from .trainings import Training

Moment = Callable[[], bool]
PAUSE = 0.0003
"""Seconds between two looks, once the process does steps; ten times these before."""
ALWAYS = (
    "_CHECKPOINT_METADATA",
    "manifest/process_0.json",
    "state/_METADATA",
    "state/_sharding",
    "state/array_metadatas/process_0",
    "state/manifest.ocdbt",
    "state/ocdbt.process_0/manifest.ocdbt",
)
"""Files of a checkpoint that one which is being removed may have lost."""
PATIENCE = 120.0
"""Seconds after which a moment that does not come is given up."""


def wait(training: Training, moment: Moment, patience: float = PATIENCE) -> bool:
    """Returns whether a moment came before the process ended, or patience did."""
    until, pause = time.monotonic() + patience, 10 * PAUSE
    near = stepping(training)
    while training.process.poll() is None and time.monotonic() < until:
        if moment():
            return True
        if pause != PAUSE and near():
            pause = PAUSE
        time.sleep(pause)
    return False


def later(seen: Moment, seconds: float) -> Moment:
    """The moment some time after another one."""
    since: list[float] = []

    def moment() -> bool:
        if not since and seen():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= seconds

    return moment


def either(one: Moment, other: Moment) -> Moment:
    """The first of two moments."""
    return lambda: one() or other()


def then(first: Moment, second: Moment) -> Moment:
    """The first time that one is seen, once another one was."""
    been: list[bool] = []

    def moment() -> bool:
        if not been and first():
            been.append(True)
        return bool(been) and second()

    return moment


def started(training: Training) -> Moment:
    """The process was started: at once."""
    return lambda: True


def said(training: Training, words: str) -> Moment:
    """The process has printed something."""
    return lambda: words in trainings.text(training.log)


def stepping(training: Training) -> Moment:
    """The first step of this process is done."""
    return said(training, "first step after")


def saving(training: Training) -> Moment:
    """A checkpoint is being written."""
    return lambda: bool(_saves(training.run))


def committed(training: Training) -> Moment:
    """A checkpoint of this process has just become whole; an old one goes next."""
    before: list[set[str]] = []

    def moment() -> bool:
        now = set(_steps(training.run))
        if not before:
            before.append(now)
        return bool(now - before[0]) and len(now) > trainings.KEEP

    return moment


def deleting(training: Training) -> Moment:
    """A checkpoint has lost some of its files, in the hands of this process."""
    before = partial(training.run)
    return lambda: bool(partial(training.run) - before)


def drawing(training: Training) -> Moment:
    """The step of a grid is done, and the grid is not there."""
    return lambda: _drawing(training.run)


def writing_grid(training: Training) -> Moment:
    """The file of a grid is being written."""
    return lambda: bool(_grids(training.run))


def drawn(training: Training) -> Moment:
    """The process has done steps, and a grid is there: all programs are compiled."""
    done, grids = stepping(training), training.run / "samples"
    return lambda: done() and any(name.endswith(".png") for name in _names(grids))


def restoring(training: Training) -> Moment:
    """The process has opened files of a checkpoint."""
    place = f"{training.run.resolve()}/checkpoints/"
    folder = f"/proc/{training.process.pid}/fd"

    def moment() -> bool:
        try:
            return any(
                os.readlink(entry.path).startswith(place)
                for entry in os.scandir(folder)
            )
        except OSError:
            return False

    return moment


def hit(training: Training, before: set[str]) -> list[str]:
    """Returns what a process was doing when it was killed, by what it left.

    Args:
      training: the process, killed.
      before: the steps that were `partial` when it was started.
    """
    printed, run = trainings.text(training.log), training.run
    if trainings.begun_at(training.log) is None:
        return ["the start"]
    if "first step after" not in printed:
        return ["compilation"]
    found = {
        "a save": _saves(run),
        "a deletion": partial(run) - before,
        "a grid": _drawing(run) or _grids(run),
    }
    return [name for name, there in found.items() if there] or ["a step"]


def partial(run: Path) -> set[str]:
    """Returns the steps that have lost some of the files that every one has."""
    folder = run / "checkpoints"
    return {
        step
        for step in _steps(run)
        if not all((folder / step / name).exists() for name in ALWAYS)
    }


def _steps(run: Path) -> list[str]:
    return [name for name in _names(run / "checkpoints") if name.isdecimal()]


def _saves(run: Path) -> list[str]:
    names = _names(run / "checkpoints")
    return [name for name in names if "orbax-checkpoint-tmp" in name]


def _grids(run: Path) -> list[str]:
    return [name for name in _names(run / "samples") if name.endswith(".tmp")]


def _drawing(run: Path) -> bool:
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 300))
            tail = file.read().split(b"\n")
        step = int(tail[-2].partition(b'"step": ')[2].partition(b",")[0])
    except (OSError, IndexError, ValueError):
        return False
    due = step and step % trainings.GRID_EVERY == 0
    return bool(due) and f"step_{step:08d}.png" not in _names(run / "samples")


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
