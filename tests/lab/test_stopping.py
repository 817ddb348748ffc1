"""Signals: the first is noted, the second ends the process, whatever it waits for."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import ROOT, wait_for

from diffusion_jax.lab.process import stopping

# As a compiler: seconds within one call, during which the interpreter runs no handler.
SCRIPT = """
import hashlib, os, pathlib, sys, time
from diffusion_jax.lab.process import stopping

def busy():
    pathlib.Path(sys.argv[1], "now").touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000_000)

with stopping.requests() as signals:
    {body}
    print("the end", signals.numbers)
"""


def started(body, folder):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body), str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process):
    begun = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert "Traceback" not in err
    assert time.monotonic() - begun < 10
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("when", "numbers"),
    [
        ("pass", [signal.SIGTERM]),  # during preparations
        ("signals.note(); signals.done()", [signal.SIGINT]),  # after the last one
        ("signals.note()", [signal.SIGTERM, signal.SIGINT]),  # the second
    ],
)
def test_a_signal_that_is_not_noted_ends_the_process_within_a_call(
    when, numbers, tmp_path
):
    process = started(f"{when}; busy()", tmp_path)
    wait_for((tmp_path / "now").exists, process)
    *noted, last = numbers
    for number in noted:
        process.send_signal(number)
        time.sleep(0.2)
        assert process.poll() is None
    process.send_signal(last)
    code, _, err = end_of(process)
    assert code == 128 + last
    assert "leaving at once; the same command goes on from what" in err
    assert ("again: at once, without" in err) == bool(noted)


# The child that lives on has a copy of the pipe, on which a thread listens.
NOTED = """signals.note()
    child = os.fork()
    if not child:
        os.kill(os.getpid(), 15)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 15
    assert not signals.numbers
    os.fork() or (os.close(1), os.close(2), time.sleep(6), os._exit(0))
    os.kill(os.getpid(), 15)
    while not signals.numbers: pass
    signals.done()"""


def test_a_first_signal_is_noted_and_a_forked_child_has_its_own(tmp_path):
    process = started(NOTED, tmp_path)
    assert process.wait(timeout=5) == 0
    assert end_of(process)[1] == "the end [15]\n"


def test_handlers_are_given_back():
    before = [signal.getsignal(kind) for kind in stopping.KINDS]
    files = len(os.listdir("/proc/self/fd"))
    with stopping.requests():
        assert [signal.getsignal(kind) for kind in stopping.KINDS] != before
    assert [signal.getsignal(kind) for kind in stopping.KINDS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_signal_after_that_of_another_host_is_no_second(monkeypatch):
    left = []
    monkeypatch.setattr(stopping.os, "_exit", left.append)
    found = stopping.Requests()
    found.note()
    found.numbers[:] = [signal.SIGTERM]  # as all hosts have agreed
    found.take(signal.SIGTERM)
    assert (left, found.numbers) == ([], [signal.SIGTERM])
    found.take(signal.SIGTERM)
    assert left == [128 + signal.SIGTERM]


def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.requests() as found:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        assert found.numbers == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
