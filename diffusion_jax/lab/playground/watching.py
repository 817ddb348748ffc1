"""Reads what a run has written so far, for a page that follows it."""

import math
import re
from pathlib import Path
from typing import Any

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.run_folder import results, runs

MOST_BYTES, POINTS = 16 * 2**20, 2000
"""Most bytes of a picture or a table that is read, and most lines of a curve."""


def metrics(run: runs.Run, digest: str, since: int) -> dict[str, Any]:
    """Returns what a run has logged after a step, and the steps of its pictures.

    Args:
      run: which may be training now.
      digest: of the weights whose evaluations are wanted.
      since: of the last line that is known; -1 for none.

    Raises:
      ConfigError: a file is damaged.
    """
    lines = [x for x in runs.read_lines(run.metrics) if x["step"] > since]
    speed = [x for x in runs.read_lines(run.speed) if x["step"] > since]
    return {
        "metrics": _thinned(lines),
        "speed": _thinned(speed),
        "samples": sorted(_samples(run)),
        "results": _results(run, digest),
    }


def sample(run: runs.Run, step: int) -> bytes:
    """Returns the picture that a run drew after a step.

    Raises:
      ConfigError: there is none.
    """
    found = _samples(run)
    if step not in found:
        raise ConfigError(
            f"the step must be one with a picture; got {step}. /api/metrics has them."
        )
    return found[step].read_bytes()


def _samples(run: runs.Run) -> dict[int, Path]:
    """Returns the pictures of a run by their steps."""
    found = {}
    for path in run.samples.glob("step_*.png"):
        at = re.fullmatch(r"step_(\d+)", path.stem)
        if at and path.is_file() and path.stat().st_size <= MOST_BYTES:
            found[int(at[1])] = path
    return found


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns at most so many lines, the last one among them."""
    every = max(1, math.ceil(len(lines) / POINTS))
    return lines[::-every][::-1]


def _results(run: runs.Run, digest: str) -> list[dict[str, Any]]:
    """Returns what was measured of these weights: the newest of each kind."""
    newest = dict(results.read(run, digest))
    return [{"name": name, "values": _plain(each)} for name, each in newest.items()]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Returns what fits a table: the numbers, then how they were measured."""
    numbers = values.get("numbers", {})
    each = numbers.items() if isinstance(numbers, dict) else ()
    found = {name: x.get("mean") if isinstance(x, dict) else x for name, x in each}
    found |= {name: x for name, x in values.items() if name != "weights_sha256"}
    return {k: x for k, x in found.items() if isinstance(x, str | int | float)}
