"""Takes SIGINT and SIGTERM: a checkpoint after the first, after a second the end.

The interpreter runs handlers between its own instructions, and not while it waits for
a compiler or a disk. So a thread takes the signals, from a pipe to which the
interpreter writes them at once (`signal.set_wakeup_fd`).
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

KINDS = (signal.SIGINT, signal.SIGTERM)
CODE = 128
"""Added to a signal's number it is the exit code, as shells have it."""
STOPPING = "stopping after this step, with a checkpoint; again: at once, without"

_pipe: tuple[int, ...] = ()
"""Both ends of the pipe, while signals are taken."""


class Requests:
    """The signals that came."""

    def __init__(self) -> None:
        """Starts without any; one ends the process until `note` says otherwise."""
        self.numbers: list[int] = []
        """Those that asked for the end of the loop."""
        self._noting = self._came = False

    def note(self) -> None:
        """Makes the first signal from now on a request, which ends nothing."""
        self._noting = True

    def done(self) -> None:
        """Makes any signal end the process again, once all is written."""
        self._noting = False

    def take(self, number: int) -> None:
        """Takes a signal, on the thread: notes it, or ends the process."""
        first, self._came = not self._came, True
        if self._noting and first:
            # One of another host may be there already: all stop at one step.
            self.numbers[:] = self.numbers or [number]
            _say(STOPPING)
            return
        _say("leaving at once; the same command goes on from what is there")
        os._exit(CODE + number)

    def interrupt(self, number: int, frame: Any) -> None:
        """Takes a signal as a handler of Python: notes it, or raises."""
        if not self._noting or self.numbers:
            raise KeyboardInterrupt
        self.numbers.append(number)
        _say(STOPPING)


@contextmanager
def requests() -> Iterator[Requests]:
    """Takes SIGINT and SIGTERM in place of whoever took them, and gives them back.

    To be called on the main thread. What is written meanwhile has to bear the end of
    the process at any instruction, as it has to bear SIGKILL.
    """
    global _pipe
    found = Requests()
    heard, told = os.pipe()
    os.set_blocking(told, False)
    thread = threading.Thread(target=_listen, args=(heard, found), daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    # A signal that is ignored, as Ctrl-C in the background of a script, stays so.
    kinds = [kind for kind in KINDS if signal.getsignal(kind) is not signal.SIG_IGN]
    before = [signal.signal(kind, _ignore) for kind in kinds]
    _pipe = (heard, told)
    try:
        yield found
    finally:
        _pipe = ()
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(told)  # the end of the thread
        thread.join()


@contextmanager
def interrupts() -> Iterator[Requests]:
    """Takes SIGINT as `requests` does, in a process that is to live on: a notebook's.

    Where `requests` would end the process, KeyboardInterrupt is raised. On another
    thread than the main one, which gets no signals, nothing is taken.
    """
    found = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = signal.signal(signal.SIGINT, found.interrupt)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def _listen(heard: int, found: Requests) -> None:
    with os.fdopen(heard, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] in KINDS:
                found.take(number[0])


def _ignore(number: int, frame: Any) -> None:
    """Does nothing: without a handler the pipe would not be written to."""


def _say(text: str) -> None:
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


def _forget() -> None:
    """Gives a forked child the default handlers, and closes its copy of the pipe."""
    if _pipe:
        signal.set_wakeup_fd(-1)
        for kind in KINDS:
            signal.signal(kind, signal.SIG_DFL)
    for end in _pipe:
        os.close(end)


os.register_at_fork(after_in_child=_forget)
