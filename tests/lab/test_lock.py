"""One process a run, and a folder that can be written, before anything is compiled."""

import contextlib
import errno
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from processes import ROOT

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import hosts
from diffusion_jax.lab.run_folder import lock, runs
from diffusion_jax.lab.training import beginning
from diffusion_jax.lab.wiring import learning
from experiments import train

HOLD = """
import os, sys, time
from pathlib import Path
from diffusion_jax.lab.run_folder import lock
with lock.hold(Path(sys.argv[1])):
    if os.fork():
        print("held", flush=True)
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
    assert process.stdout.readline() == "held\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    child = int(children.read_text())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        os.kill(child, signal.SIGKILL)


def refused(folder, match):
    with pytest.raises(ConfigError, match=match) as caught, lock.hold(folder):
        pass
    return str(caught.value)


@pytest.fixture
def nothing_compiled(monkeypatch):
    """The command must end before it makes a step, and soon."""

    def fail(*_):
        raise AssertionError("it got as far as making a step")

    monkeypatch.setattr(learning, "make_step", fail)
    monkeypatch.setattr(learning, "state_shapes", fail)
    begun = time.process_time()
    yield
    assert time.process_time() - begun < 5


def test_a_second_process_is_told_whose_the_run_is_until_that_dies(
    tmp_path, nothing_compiled
):
    run = tmp_path / "digits"
    with holder(run) as (owner, child):
        said = refused(run, f"cannot train {run}: process {owner.pid} on .* trains it")
        assert os.uname().nodename in said
        assert time.strftime("since %Y-") in said
        assert "--name NAME" in said
        with pytest.raises(lock.LockedError, match=f"process {owner.pid} on"):
            train.main(["digits", "--output", str(tmp_path)])
        assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "digits"]
        owner.kill()
        owner.wait()
        assert (run / lock.NAME).exists()
        os.kill(child, 0)  # it lives, and holds nothing
        with lock.hold(run):
            assert f"process {os.getpid()} on" in (run / lock.NAME).read_text()
        assert not (run / lock.NAME).exists()
        assert run.exists()


def test_within_a_process_too_a_run_is_trained_once_at_a_time(tmp_path):
    with lock.hold(tmp_path):
        refused(tmp_path, f"process {os.getpid()} on")
        refused(tmp_path, "trains it")  # being refused takes nothing away
    with lock.hold(tmp_path):
        pass


def test_a_file_that_its_owner_has_removed_is_no_lock(tmp_path, monkeypatch):
    # As when the owner ends between our opening of the file and our lock on it.
    path, real, calls = tmp_path / lock.NAME, fcntl.flock, []

    def flock(file, how):
        if not calls:
            path.unlink()
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.hold(tmp_path):
        assert len(calls) == 2
        refused(tmp_path, f"process {os.getpid()} on")


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


@pytest.mark.parametrize("where", ["file", "file/below", "digits"])
def test_a_folder_that_cannot_be_is_named(where, tmp_path, nothing_compiled):
    (tmp_path / "file").write_text("")
    (tmp_path / "digits").write_text("")
    output = tmp_path if where == "digits" else tmp_path / where
    with pytest.raises(ConfigError, match=f"{output}.* must be a folder that can be"):
        train.main(["digits", "--output", str(output)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "file"]


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path):
    flags = shlex.split("--train.devices 99 --name a")
    with pytest.raises(ValueError, match="devices must be in 1"):
        train.main(["digits", "--output", str(tmp_path / "b"), *flags])
    left = [path.name for path in tmp_path.rglob("*")]
    assert "a" not in left
    assert lock.NAME not in left


def on_a_disk(folder, options, *command):
    """Runs a command in a mount namespace that has a small disk at a folder.

    The disk is gone with it, and no other process sees it.
    """
    mount = f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(folder))}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False).returncode:
        pytest.skip("only root may mount a disk")
    line = f"{mount} && exec {shlex.join(command)}"
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", line],
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_disk_that_may_only_be_read_is_named(tmp_path):
    command = [sys.executable, "-m", "experiments.train", "digits", "--output"]
    done = on_a_disk(tmp_path, "ro", *command, str(tmp_path))
    assert done.returncode == 2
    folder = tmp_path / "digits"
    assert done.stderr.startswith(f"error: {folder} must be a folder that can be made")
    assert "got Read-only file system for" in done.stderr
    assert done.stdout == ""


def test_a_disk_without_room_for_a_checkpoint_is_named(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(beginning, "first_state", lambda *_: pytest.fail("it went on"))
    folder = tmp_path / "digits"
    with pytest.raises(ConfigError, match=f"{folder} must have room for a checkpoint"):
        train.main(["digits", "--output", str(tmp_path)])


def test_a_run_that_was_moved_leaves_the_lock_of_another_alone(tmp_path):
    run, first = tmp_path / "run", contextlib.ExitStack()
    first.enter_context(lock.hold(run))
    run.rename(tmp_path / "moved")
    with lock.hold(run):  # of a new run in the old place
        first.close()
        assert (run / lock.NAME).exists()
        refused(run, "trains it")
