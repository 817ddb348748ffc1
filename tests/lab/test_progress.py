"""What a person sees of a long loop."""

import io
import re
import time
import warnings
from types import SimpleNamespace

import pytest

from diffusion_jax.lab.process import entry, progress
from diffusion_jax.storage import waiting


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
        if step == 30:
            shown.pause()
            clock.now += 1000
        clock.now += 0.5
    shown.doing("drawing 64 samples")
    assert file.getvalue().splitlines() == [
        "step 1/7,200, loss 0.5000",
        # Two steps a second, so 7,179 steps take 59 minutes and 49 seconds.
        "step 21/7,200, loss 0.5000, 128 images/s, 59:49 left",
        # A pause does not slow the speed that is shown.
        "step 31/7,200, loss 0.5000, 128 images/s, 59:44 left",
        "step 41/7,200, drawing 64 samples",
    ]


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
    assert re.search(r"100% \|.*step 10/10, loss 0.2500", last)


def test_a_chain_that_says_nothing_has_a_clock_and_no_share(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    monkeypatch.setattr(waiting, "SECONDS_OF_QUIET", 0)
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


@pytest.fixture
def seconds(monkeypatch):
    """The time of bars, to be moved by hand."""
    passed = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("tqdm.std.time", lambda: passed.now)
    waiting.Bar._instances.clear()  # what other tests left has the first lines
    return passed


def walked(monkeypatch, seconds, each, kind=io.StringIO, **options):
    """What is shown of eight steps, each of so many seconds."""
    monkeypatch.setattr("sys.stderr", kind())
    for _ in waiting.Bar(range(8), "reading", unit="images", **options):
        seconds.now += each
    return waiting.sys.stderr.getvalue()


def test_without_a_terminal_a_bar_is_a_line_now_and_then(seconds, monkeypatch):
    assert walked(monkeypatch, seconds, 4.0) == (
        "reading: 3 of 8 images, 00:12 so far, 00:20 left\n"
        "reading: 6 of 8 images, 00:24 so far, 00:08 left\n"
    )
    assert not walked(monkeypatch, seconds, 4.0, shown=False)


def test_on_a_terminal_a_bar_has_the_time_left_and_goes(seconds, monkeypatch):
    shown = walked(monkeypatch, seconds, 1.0, Terminal)
    assert "reading:  50%|" in shown
    assert "[00:04<00:04," in shown
    assert not shown.rpartition("\r")[0].rpartition("\r")[2].strip()
    for kind in (io.StringIO, Terminal):  # what takes two seconds shows nothing
        assert not walked(monkeypatch, seconds, 0.2, kind)


def test_a_clock_is_a_line_now_and_then_too(seconds, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress.clock("compiling") as bar:
        for _ in range(30):
            seconds.now += 1.0
            bar.refresh()
    said = waiting.sys.stderr.getvalue().splitlines()
    assert said[:2] == ["compiling, 00:10 so far", "compiling, 00:20 so far"]


def test_a_warning_is_a_note_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", None)
    entry.note_warnings()
    warnings.showwarning(UserWarning("left out 1 file"), UserWarning, "a.py", 3)
    assert capsys.readouterr().err == "note: left out 1 file\n"
