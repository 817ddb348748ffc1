"""Shows the progress of a long loop: a bar, or lines where there is no terminal."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from diffusion_jax.storage import waiting


class Progress:
    """Shows steps, loss, images a second and the time left."""

    def __init__(
        self,
        begin: int,
        last: int,
        images_per_step: int,
        file: TextIO | None = None,
        row: Mapping[str, int] | None = None,
    ) -> None:
        """Starts counting at step `begin` of `last`.

        The steps skipped in a row before that are in `row`, by their causes. It is
        shown on stderr where no file is given.
        """
        self.file = file or sys.stderr
        self.step, self.last, self.images = begin, last, images_per_step
        self.began = begin
        self.since: tuple[int, float] | None = None
        self.rate, self.row, self.text = 0.0, Counter(row or {}), ""
        self.shown = self.begun = time.monotonic()
        self.held = 0.0
        self.bar = tqdm(
            total=last,
            initial=begin,
            file=self.file,
            disable=not self.file.isatty(),
            dynamic_ncols=True,
            delay=1e-9,  # no bar before the first step, while lines are printed
            bar_format="{percentage:3.0f}% |{bar}| step {n:,}/{total:,}{postfix}",
        )

    def update(self, step: int, loss: float | None, cause: str = "") -> None:
        """Shows that `step` steps are done and what the last loss was.

        The loss is of the last of them; None where it was skipped, for this cause.
        """
        if loss is None:
            self.row[cause] += 1
        else:
            self.row.clear()
        now = time.monotonic()
        # The clock starts after a first step, which may have compiled.
        if self.step == self.began:
            self.begun = now
        before, then = self.since = self.since or (step, now)
        if now - then >= 1.0:
            self.since = (step, now)
            self.rate = (step - before) * self.images / (now - then)
        self.step = step
        self.text = "skipped" if loss is None else f"loss {loss:.4f}"
        if self.rate:
            left = (self.last - step) * self.images / self.rate
            clock = tqdm.format_interval(left)
            self.text += f", {self.rate:,.0f} images/s, {clock} left"
        self.bar.set_postfix_str(self.text, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and now - self.shown >= waiting.SECONDS_BETWEEN_LINES:
            self.shown = now
            self._print(self.text)

    def _print(self, text: str) -> None:
        said = f"step {self.step:,}/{self.last:,}, {text}"
        print(said, file=self.file, flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(text)

    def pause(self) -> None:
        """Stops the clock of the speed until the next step."""
        self.since = None
        self.bar.set_postfix_str(self.text, refresh=False)

    def doing(self, what: str) -> None:
        """Shows what the next step waits for."""
        self.bar.set_postfix_str(what)
        if self.bar.disable:
            self._print(what)

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Adds the time of its block, such as saving, to that spent between steps."""
        since = time.monotonic()
        yield
        self.held += time.monotonic() - since

    def held_up_for(self) -> str:
        """Returns that time in words; in a run of a minute or more also of how much."""
        whole = time.monotonic() - self.begun
        if self.step <= self.began + 1 or whole < 60:
            return f"{self.held:.1f} s"
        return f"{self.held:.1f} of {whole:.1f} s"

    def close(self) -> None:
        """Leaves the bar on the screen as it stands."""
        self.bar.close()


@contextmanager
def clock(
    text: str,
    *,
    total: int = 1,
    done: int = 0,
    shown: bool = True,
    unit: str = "images",
    unit_scale: bool = False,
) -> Iterator[Any]:
    """Shows a clock until the first part of some work is done, then a bar.

    A chain is one program, of which no share is known while it runs: a bar would stand
    still. Where there is no terminal it is a line now and then.

    `done` of the units are there already; `unit_scale` writes thousands as k.

    Yields:
      The bar, whose `update` takes how many units have come.
    """
    bar = waiting.Bar(
        None,
        text,
        total,
        shown=shown,
        initial=done,
        unit=unit,
        unit_scale=unit_scale,
        bar_format=waiting.CLOCK,
    )
    over = threading.Event()

    def tick() -> None:
        while not over.wait(1.0):
            if bar.n > done:
                bar.bar_format = None
            bar.refresh()  # which does nothing on a bar that is not shown

    thread = threading.Thread(target=tick, daemon=True)
    with bar:
        thread.start()
        try:
            yield bar
        finally:
            over.set()
            thread.join()
