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
from functools import partial

import pytest

from . import PRIVATE, moments, trainings

STEPS = 400
FLAGS = "--train.steps", STEPS
SIZE = 32
"""MiB of a disk."""


def cases(folder, seed):
    whole = folder / "whole" / "digits"
    yield trainings.undisturbed(whole, STEPS, cache=folder / "cache")
    for what, *given in (
        ("disk full in mid-run", survives, full),
        ("checkpoints read-only in mid-run", survives, read_only),
        ("folder of the run moved away in mid-run", survives, moved_away),
        ("checkpoints removed in mid-run", survives, removed),
        ("disk read-only from the start", read_only_from_the_start),
        ("disk full from the start", full_from_the_start),
        ("disk of compiled programs full", programs),
    ):
        yield what, partial(*given, folder=folder)


def start(folder, run, name, cache="cache"):
    log = folder / f"{name}.log"
    return trainings.start(run, *FLAGS, log=log, cache=folder / cache)


def ends_well(folder, run, name, cache="cache"):
    """Trains to the end of the undisturbed run; returns where it began."""
    log = folder / f"{name}.log"
    trainings.finish(run, *FLAGS, log=log, cache=folder / cache)
    same_end(folder, run)
    return trainings.begun_at(log)


def same_end(folder, run):
    trainings.same_end(run, folder / "whole" / "digits", STEPS)


def survives(trouble, folder):
    disk, lost = trouble in (full, read_only), trouble is removed
    with mounted(folder / trouble.__name__, disk=disk) as where:
        run = where / "digits"
        training = start(folder, run, where.name)
        came = moments.wait(training, lambda: midway(run))
        assert came, trainings.last_words(training.log)
        training.process.send_signal(signal.SIGSTOP)  # not to be done by then
        with trouble(training):
            training.process.send_signal(signal.SIGCONT)
            if trainings.ended(training) == 0 and lost:
                # What it needs was in memory: written again.
                same_end(folder, run)
                return "went on to an equal end"
            said = trainings.refused(training, where)
            if (run / "config.json").exists() and not lost:
                trainings.state_of(run)  # of one that verifies
        again = ends_well(folder, run, f"{where.name}.2")
        assert lost or again, "begun again at step 0"
    return f"{said!r}, then on from step {again} to an equal end"


def midway(run):
    """Some checkpoints of this process are there, and none is being written."""
    return max(trainings.steps_of(run), default=0) >= 3 * trainings.EVERY


def nowhere(folder, where):
    """Checks that a run is refused within 20 seconds."""
    training = start(folder, where / "digits", where.name)
    said = trainings.refused(training, where)
    seconds = time.monotonic() - training.began
    assert seconds < 20, f"only after {seconds:.1f} s: {said}"
    return f"{said!r} after {seconds:.1f} s"


def read_only_from_the_start(folder):
    with mounted(folder / "read_only_start") as where:
        mount("-o", "remount,ro", str(where))
        return nowhere(folder, where)


def full_from_the_start(folder):
    with mounted(folder / "full_start") as where:
        filled = ballast(where)
        said = nowhere(folder, where)
        filled.unlink()
        ends_well(folder, where / "digits", "full_start.2")
    return said


def programs(folder):
    with mounted(folder / "programs") as where:
        ballast(where)
        ends_well(folder, folder / "programs_run" / "digits", "programs", where.name)
    return "trained to an equal end"


@contextlib.contextmanager
def mounted(where, *, disk=True):
    """A folder, with a small disk in memory unless it is to have none."""
    where.mkdir()
    if disk:
        mount("-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", str(where))
    try:
        yield where
    finally:
        if disk:
            subprocess.run(["umount", "-l", str(where)], check=False)


def mount(*arguments):
    """Mounts; skips where the machine forbids it, or a killed case would leave it."""
    if PRIVATE not in os.environ:
        pytest.skip("no mounts of its own on this machine (unshare)")
    command = ["mount", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount on this machine, {done.stderr.strip()}")


def ballast(where):
    """Fills a disk to the last byte; returns the file that does, which may be there."""
    path, size = where / "ballast", 1 << 20
    with path.open("ab", buffering=0) as file:
        while size:
            try:
                file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
    return path


# Troubles of a training that is stopped.


@contextlib.contextmanager
def full(training):
    """Keeps it full: checkpoints that the run removes make room for the next one."""
    where, ended = training.run.parent, threading.Event()
    ballast(where)

    def refill():
        while not ended.wait(0.002):
            ballast(where)

    thread = threading.Thread(target=refill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        (where / "ballast").unlink()


@contextlib.contextmanager
def read_only(training):
    """The disk of the checkpoints, as the kernel makes it after errors."""
    where = str(training.run / "checkpoints")
    mount("--bind", where, where)
    # What is open there for writing is in the way: tried between two saves.
    until = time.monotonic() + 20
    while True:
        try:
            mount("-o", "remount,bind,ro", where)
            break
        except pytest.skip.Exception:
            if time.monotonic() > until:
                raise
            training.process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
            training.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@contextlib.contextmanager
def moved_away(training):
    """As when a disk is unmounted."""
    run, away = training.run, training.run.with_name("elsewhere")
    run.rename(away)
    try:
        yield
    finally:
        shutil.rmtree(run, ignore_errors=True)  # what was written in its place
        away.rename(run)


@contextlib.contextmanager
def removed(training):
    until = time.monotonic() + 5
    folder = training.run / "checkpoints"
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
    yield
