"""Disks that are full, read-only or gone: a clear error, nothing lost, then the rest.

Small disks in memory are mounted for it, where this machine permits that.
"""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import moments, trainings
from .cases import PRIVATE, Outcome, SkippedError, check, outcome
from .trainings import Training

STEPS = 400
SIZE = 32
"""MiB of a disk."""
Break = Callable[[Training], Callable[[], None]]


def cases(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes, one a kind of trouble."""
    del seed
    cache, flags = folder / "cache", ["--train.steps", STEPS]
    whole = folder / "whole" / "digits"
    yield trainings.undisturbed(whole, STEPS, cache=cache)

    def survives(name: str, trouble: Break, *, disk: bool, lost: bool = False) -> str:
        where = folder / name
        where.mkdir()
        with mounted(where) if disk else contextlib.nullcontext():
            run, log = where / "digits", folder / f"{name}.log"
            training = trainings.start(run, *flags, log=log, cache=cache)
            came = moments.wait(training, midway(training))
            check(came, trainings.last_words(log))
            training.process.send_signal(signal.SIGSTOP)  # not to be done by then
            mend = trouble(training)
            training.process.send_signal(signal.SIGCONT)
            try:
                code = trainings.ended(training)
                if code == 0 and lost:  # what it needs was in memory: written again
                    trainings.same_end(run, whole, STEPS)
                    return "went on to an equal end"
                said = trainings.refused(training, where)
                if (run / "config.json").exists() and not lost:
                    trainings.state_of(run)  # of one that verifies
            finally:
                mend()
            log = folder / f"{name}.2.log"
            trainings.finish(run, *flags, log=log, cache=cache)
            again = trainings.begun_at(log)
            check(lost or again, "begun again at step 0")
            trainings.same_end(run, whole, STEPS)
        return f"{said!r}, then on from step {again} to an equal end"

    yield outcome(
        "disk full in mid-run",
        lambda: survives("full", fill, disk=True),
    )
    yield outcome(
        "checkpoints read-only in mid-run",
        lambda: survives("readonly", make_read_only, disk=True),
    )
    yield outcome(
        "folder of the run moved away in mid-run",
        lambda: survives("away", move_away, disk=False),
    )
    yield outcome(
        "checkpoints removed in mid-run",
        lambda: survives("removed", remove, disk=False, lost=True),
    )

    def nowhere(name: str, where: Path, *, within: float = 20.0) -> str:
        log = folder / f"{name}.log"
        training = trainings.start(where / "digits", *flags, log=log, cache=cache)
        said = trainings.refused(training, where)
        seconds = time.monotonic() - training.began
        check(seconds < within, f"only after {seconds:.1f} s: {said}")
        return f"{said!r} after {seconds:.1f} s"

    def read_only_from_the_start() -> str:
        where = folder / "readonly_start"
        where.mkdir()
        with mounted(where):
            mount("-o", "remount,ro", str(where))
            return nowhere("readonly_start", where)

    def full_from_the_start() -> str:
        where = folder / "full_start"
        where.mkdir()
        with mounted(where):
            filled = ballast(where)
            said = nowhere("full_start", where)
            filled.unlink()
            run, log = where / "digits", folder / "full_start.2.log"
            trainings.finish(run, *flags, log=log, cache=cache)
            trainings.same_end(run, whole, STEPS)
        return said

    def programs() -> str:
        """Checks that a full disk of compiled programs stops no run."""
        where, run = folder / "programs", folder / "programs_run" / "digits"
        where.mkdir()
        with mounted(where):
            filled = ballast(where)
            log = folder / "programs.log"
            trainings.finish(run, *flags, log=log, cache=where)
            filled.unlink()
        trainings.same_end(run, whole, STEPS)
        return "trained to an equal end"

    yield outcome("disk read-only from the start", read_only_from_the_start)
    yield outcome("disk full from the start", full_from_the_start)
    yield outcome("disk of compiled programs full", programs)


def midway(training: Training) -> moments.Moment:
    """Some checkpoints of this process are there, and none is being written."""

    def moment() -> bool:
        steps = trainings.steps_of(training.run)
        return bool(steps) and steps[-1] >= 3 * trainings.EVERY

    return moment


@contextlib.contextmanager
def mounted(where: Path) -> Iterator[None]:
    """Mounts a small disk in memory at a folder, and unmounts it.

    Raises:
      SkippedError: this machine does not permit it.
    """
    mount("-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", str(where))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=False)


def mount(*arguments: str) -> None:
    """Mounts; raises SkippedError where this machine does not permit it.

    Nor where the mount would stay, when the case is killed.
    """
    if PRIVATE not in os.environ:
        raise SkippedError("no mounts of its own on this machine (unshare)")
    done = subprocess.run(
        ["mount", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SkippedError(f"no mount on this machine, {done.stderr.strip()}")


def ballast(where: Path) -> Path:
    """Fills a disk to the last byte; returns the file that does, which may be there."""
    path = where / "ballast"
    with path.open("ab", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
    return path


def fill(training: Training) -> Callable[[], None]:
    """Fills the disk of a run, and keeps it full; returns what makes room again.

    Checkpoints that the run removes make room too, else: enough for the next one.
    """
    where, ended = training.run.parent, threading.Event()
    ballast(where)

    def refill() -> None:
        while not ended.wait(0.002):
            ballast(where)

    thread = threading.Thread(target=refill)
    thread.start()

    def mend() -> None:
        ended.set()
        thread.join()
        (where / "ballast").unlink()

    return mend


def make_read_only(training: Training) -> Callable[[], None]:
    """Makes the disk of the checkpoints read-only, as the kernel does after errors."""
    where = str(training.run / "checkpoints")
    mount("--bind", where, where)
    # What is open there for writing is in the way: tried between two saves.
    until = time.monotonic() + 20
    while True:
        try:
            mount("-o", "remount,bind,ro", where)
            break
        except SkippedError:
            if time.monotonic() > until:
                raise
            training.process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
            training.process.send_signal(signal.SIGSTOP)
    return lambda: subprocess.run(["umount", "-l", where], check=True) and None


def move_away(training: Training) -> Callable[[], None]:
    """Moves the folder of a run away, as when a disk is unmounted."""
    run, away = training.run, training.run.with_name("elsewhere")
    run.rename(away)

    def mend() -> None:
        shutil.rmtree(run, ignore_errors=True)  # what was written in its place
        away.rename(run)

    return mend


def remove(training: Training) -> Callable[[], None]:
    """Removes the checkpoints of a run."""
    until = time.monotonic() + 5
    folder = training.run / "checkpoints"
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
    return lambda: None
