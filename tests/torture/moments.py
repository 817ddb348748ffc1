"""When to strike: what the folder of a run shows of what its process is doing.

A moment is a function that says whether it has come, and is polled. What was really
hit is told afterwards, by what the process left behind.
"""

import os
import time

from . import trainings

PAUSE = 0.0003
"""Seconds between two looks, once the process does steps; ten times these before."""
# Files of a checkpoint that one which is being removed may have lost.
ALWAYS = (
    "_CHECKPOINT_METADATA",
    "manifest/process_0.json",
    "state/_METADATA",
    "state/_sharding",
    "state/array_metadatas/process_0",
    "state/manifest.ocdbt",
    "state/ocdbt.process_0/manifest.ocdbt",
)


def wait(training, moment, patience=120.0):
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


def later(seen, seconds):
    """The moment some time after another one."""
    since = []

    def moment():
        if not since and seen():
            since.append(time.monotonic())
        return since and time.monotonic() - since[0] >= seconds

    return moment


def either(one, other):
    return lambda: one() or other()


def then(first, second):
    """The first time that one is seen, once another one was."""
    been = later(first, 0)
    return lambda: been() and second()


def started(training):
    return lambda: True


def beginning(training):
    """The process has said where it begins; now it compiles."""
    return lambda: " step " in trainings.text(training.log)


def stepping(training):
    """The first step of this process is done."""
    return lambda: "first step after" in trainings.text(training.log)


def saving(training):
    """The process writes a checkpoint; what another one left does not count."""
    return then(stepping(training), lambda: _saves(training.run))


def committed(training):
    """A checkpoint of this process has just become whole; an old one goes next."""
    before = []

    def moment():
        now = set(_steps(training.run))
        before.append(now)
        return now - before[0] and len(now) > trainings.KEEP

    return moment


def deleting(training):
    """A checkpoint has lost some of its files, in the hands of this process."""
    before = partial(training.run)
    return then(stepping(training), lambda: partial(training.run) - before)


def drawing(training):
    """The step of a grid is done, and the grid is not there."""
    return then(stepping(training), lambda: _drawing(training.run))


def writing_grid(training):
    return then(stepping(training), lambda: _grids(training.run))


def drawn(training):
    """The process has done steps, and a grid is there: all programs are compiled."""
    grids = training.run / "samples"
    return then(
        stepping(training), lambda: any(n[-4:] == ".png" for n in _names(grids))
    )


def restoring(training):
    """The process has opened files of a checkpoint."""
    place = f"{training.run.resolve()}/checkpoints/"
    folder = f"/proc/{training.process.pid}/fd"

    def moment():
        try:
            opened = [os.readlink(entry.path) for entry in os.scandir(folder)]
        except OSError:
            return False
        return any(path.startswith(place) for path in opened)

    return moment


def hit(training, before):
    """What a process was doing when it was killed, by what it left.

    Args:
      training: the process, killed.
      before: the steps that were `partial` when it was started.
    """
    run = training.run
    if trainings.begun_at(training.log) is None:
        return ["the start"]
    if not stepping(training)():
        return ["compilation"]
    found = {
        "a save": _saves(run),
        "a deletion": partial(run) - before,
        "a grid": _drawing(run) or _grids(run),
    }
    return [name for name, there in found.items() if there] or ["a step"]


def partial(run):
    """The steps that have lost some of the files that every one has."""
    folder = run / "checkpoints"
    return {
        step
        for step in _steps(run)
        if not all((folder / step / name).exists() for name in ALWAYS)
    }


def _steps(run):
    return [name for name in _names(run / "checkpoints") if name.isdecimal()]


def _saves(run):
    return [n for n in _names(run / "checkpoints") if "orbax-checkpoint-tmp" in n]


def _grids(run):
    return [name for name in _names(run / "samples") if name.endswith(".tmp")]


def _drawing(run):
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 300))
            tail = file.read().split(b"\n")
        step = int(tail[-2].partition(b'"step": ')[2].partition(b",")[0])
    except (OSError, IndexError, ValueError):
        return False
    due = step and step % trainings.GRID_EVERY == 0
    return due and f"step_{step:08d}.png" not in _names(run / "samples")


def _names(folder):
    try:
        return os.listdir(folder)
    except OSError:
        return []
