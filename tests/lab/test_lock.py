"""One process a run, and a folder that can be written, before anything is compiled."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from processes import ROOT

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import hosts
from diffusion_jax.lab.run_folder import lock, runs
from diffusion_jax.lab.training import beginning
from experiments import train

HOLD = """
import os, sys, time
from pathlib import Path
from diffusion_jax.lab.run_folder import lock
with lock.hold(Path(sys.argv[1])):
    leaving = os.fork()
    if not leaving:
        sys.exit()
    os.waitpid(leaving, 0)
    if child := os.fork():
        print(child, flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(folder):
    """A process that holds the lock, and its child; it has it when this begins."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        os.kill(child, signal.SIGKILL)


def refused(folder, match):
    with pytest.raises(ConfigError, match=match), lock.hold(folder):
        pass


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """The command must end before it has a state."""
    monkeypatch.setattr(beginning, "first_state", lambda *_: pytest.fail("it went on"))


def test_a_second_process_is_told_whose_the_run_is_until_that_dies(tmp_path):
    run = tmp_path / "digits"
    with holder(run) as (owner, child):
        since = f"on {os.uname().nodename}, {time.strftime('since %Y')}"
        said = f"cannot train {run}: process {owner.pid} {since}.* trains it.*--name"
        with pytest.raises(lock.LockedError, match=said):
            train.main(["digits", "--output", str(tmp_path)])
        assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "digits"]
        owner.kill()
        owner.wait()
        assert (run / lock.NAME).exists()
        os.kill(child, 0)  # it lives, and holds nothing
        with lock.hold(run):
            refused(run, f"process {os.getpid()} on")
            refused(run, "trains it")  # being refused takes nothing away
        assert not (run / lock.NAME).exists()
        assert run.exists()


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.hold(tmp_path):
        said = capsys.readouterr().err
    assert f"note: the file system of {tmp_path} has no locks (No locks avail" in said


def test_the_other_hosts_end_as_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(hosts, "first", lambda: False)
    monkeypatch.setattr(hosts, "tell", lambda mine: 1)
    refused(tmp_path / "run", "Host 0 says which")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["file", "file/below", "."])
def test_a_folder_that_cannot_be_is_named(where, tmp_path):
    for name in ("file", "digits"):
        (tmp_path / name).write_text("")
    output = tmp_path / where
    with pytest.raises(ConfigError, match=f"cannot train into {output}.*: .+ "):
        train.main(["digits", "--output", str(output)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "file"]


@pytest.mark.parametrize(
    ("flags", "free", "said"),
    [
        (["--train.devices", "99"], 2**40, "devices must be in 1"),
        ([], 100_000, "cannot train into .*digits: its disk has no room"),
    ],
)
def test_a_folder_that_was_made_for_nothing_is_gone(
    flags, free, said, tmp_path, monkeypatch
):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=said):
        train.main(["digits", "--output", str(tmp_path), *flags])
    assert not (tmp_path / "digits").exists()


def test_a_run_that_was_moved_leaves_the_lock_of_another_alone(tmp_path):
    run, first = tmp_path / "run", contextlib.ExitStack()
    first.enter_context(lock.hold(run))
    run.rename(tmp_path / "moved")
    with lock.hold(run):  # of a new run in the old place
        first.close()
        assert (run / lock.NAME).exists()
        refused(run, "trains it")
