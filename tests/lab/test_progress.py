"""What a person sees of a long loop."""

import io
import time
import warnings
from types import SimpleNamespace

import pytest

from diffusion_jax.lab.process import entry, progress


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_there_is_a_line_every_ten_seconds(clock):
    file = io.StringIO()
    shown = progress.Progress(0, 7200, 64, file)
    clock.now += 60  # compiling
    for step in range(1, 42):
        shown.update(step, 0.5)
        clock.now += 0.5
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "step 1/7,200, loss 0.5000"
    # Two steps a second, so 7,179 steps take 59 minutes and 49 seconds.
    assert lines[1] == "step 21/7,200, loss 0.5000, 128 images/s, 59:49 left"


def test_a_pause_does_not_slow_the_speed_that_is_shown(clock):
    shown = progress.Progress(0, 100, 10, io.StringIO())
    for step in range(1, 10):
        shown.update(step, 0.5)
        if step == 5:
            shown.pause()
            clock.now += 1000
        clock.now += 1.0
    assert shown.rate == 10


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(clock):
    file = Terminal()
    shown = progress.Progress(3, 10, 64, file)
    assert not file.getvalue()  # until the first step there are words
    for step in range(4, 11):
        shown.update(step, 0.25)
    shown.doing("drawing 4 samples")
    assert file.getvalue().endswith("step 10/10, drawing 4 samples")
    shown.pause()
    shown.close()
    last = file.getvalue().split("\r")[-1]
    assert "100% |" in last
    assert "step 10/10" in last
    assert "loss 0.2500" in last


def test_a_chain_that_says_nothing_has_a_clock_and_no_share(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    with progress.clock("drawing: 2 batches", total=4) as bar:
        assert progress.sys.stderr.getvalue().endswith("2 batches, 00:00 so far")
        assert "0%" not in progress.sys.stderr.getvalue()
        bar.update(2)
        time.sleep(1.2)
        assert " 50%|" in progress.sys.stderr.getvalue()
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    with progress.clock("drawing: 1 batch") as bar:
        bar.update(1)
    assert not progress.sys.stderr.getvalue()


def test_a_warning_is_a_note_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", None)
    entry.note_warnings()
    warnings.showwarning(UserWarning("left out 1 file"), UserWarning, "a.py", 3)
    assert capsys.readouterr().err == "note: left out 1 file\n"
