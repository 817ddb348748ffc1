"""Which checkpoints are kept: the newest, the best, and every k-th for good."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_jax.checkpoints import manifest


@dataclasses.dataclass
class Keep:
    """A preservation policy of orbax."""

    newest: int
    """How many of the newest are kept."""
    every: int | None
    """Multiples of it are kept for good."""
    scores: dict[int, float | None]
    """By step, of which the lowest is the best; others are read from `directory`."""
    directory: Path

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Returns for each checkpoint, from the oldest on, whether it is kept."""
        steps = [info.step for info in checkpoints]
        chosen = {*steps[-self.newest :], best({s: self._score(s) for s in steps})}
        every = self.every
        return [s in chosen or (every is not None and s % every == 0) for s in steps]

    def _score(self, step: int) -> float | None:
        if step not in self.scores:
            try:
                found = manifest.read(self.directory / str(step) / "manifest")
                self.scores[step] = found.score
            except manifest.UnverifiedError:
                self.scores[step] = None
        return self.scores[step]


def best(scores: dict[int, float | None]) -> int | None:
    """Returns the step of the lowest score, the latest of equals; None without any.

    >>> best({1: 0.5, 2: None, 3: 0.5, 4: 0.7})
    3
    """
    known = [(score, -step) for step, score in scores.items() if score is not None]
    return -min(known)[1] if known else None
