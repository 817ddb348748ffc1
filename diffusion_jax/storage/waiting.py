"""Shows how far long work is: a bar on a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_QUIET = 2.0
"""What takes less shows nothing."""
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left"
CLOCK = "{desc}, {elapsed} so far"


class Bar(tqdm):
    """A bar of tqdm that prints lines where standard error is no terminal."""

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str = "",
        total: int | None = None,
        *,
        shown: bool = True,
        **options: Any,
    ) -> None:
        """Starts the clock.

        Args:
          iterable: what is walked through, if anything is.
          desc: what is being done.
          total: how many units there are; by the iterable, or unknown, when None.
          shown: whether this process shows anything.
          options: of tqdm.
        """
        self.lines, self.said = not sys.stderr.isatty(), 0.0
        self.delay: float
        options = {"leave": False, "dynamic_ncols": True, "miniters": 1, **options}
        options |= {
            "file": sys.stderr,
            "delay": SECONDS_OF_QUIET,
            "disable": not shown,
        }
        super().__init__(iterable, desc, total, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar, or prints a line if the last one is long ago.

        Returns:
          Whether something is on the screen that has to be taken back.
        """
        now = self._time()
        if not hasattr(self, "start_t"):  # as it is made
            self.start_t = now
        if self.delay and now < self.start_t + self.delay:
            return False
        self.delay = 0  # whoever closes it knows that something is there
        if not self.lines:
            return bool(super().display(msg, pos))
        if now >= (self.said or self.start_t) + SECONDS_BETWEEN_LINES:
            self.said = now
            print(self.line(), file=self.fp, flush=True)
        return False

    def line(self) -> str:
        """Returns in words how far it is."""
        known = {**self.format_dict, "bar_format": self.bar_format or LINE}
        if not self.total:
            known["bar_format"] = CLOCK
        return str(self.format_meter(**known)).strip()
