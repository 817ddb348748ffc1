"""Lists the checkpoints of a run, after comparing all of each with its manifest.

`python -m experiments.checkpoints [RUN]`; leaves with 1 where one is damaged.
"""

import dataclasses
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from diffusion_jax.checkpoints import checkpoint, retention
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import entry
from diffusion_jax.lab.report import reading, tables
from diffusion_jax.lab.run_folder import results, runs
from diffusion_jax.lab.schema import choices
from diffusion_jax.storage.waiting import Bar

ASIDE = re.compile(r"\d+\.damaged\d*")
"""Names of checkpoints that were set aside. They may be deleted."""
DAMAGED = 1
"""Exit code where a checkpoint does not verify."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Whose checkpoints to list."""

    run: choices.Named = None


class Row(NamedTuple):
    """A checkpoint as it is listed."""

    name: str
    step: int
    size: int
    """Bytes of all its files."""
    written: float
    """Seconds since 1970."""
    loss: float | None
    """The mean that was logged before it, by which the best one is known; or, in a run
    that is measured while it is trained, the distance of its samples."""
    wrong: str | None
    """Why it does not verify; None where it does."""


def main(argv: Sequence[str]) -> int:
    """Lists the checkpoints; returns the exit code."""
    options = entry.parse(Options, argv, "checkpoints", __doc__)
    run = reading.named(options.run)
    found = rows(run.checkpoints)
    if not found:
        raise ConfigError(
            f"a checkpoint must be in {run.checkpoints}; got none. Train first, or "
            "give another run."
        )
    plan = runs.read_config(run).train
    if plan.measure_every is not None:
        measured = results.in_training(run)
        found = [row._replace(loss=measured.get(row.step)) for row in found]
    print(f"{run.checkpoints}/")
    print(table(found, plan.keep_every))
    return DAMAGED if any(row.wrong for row in found) else 0


def rows(folder: Path) -> list[Row]:
    """Returns a row for each checkpoint of a folder, those set aside last."""
    every = [folder / str(step) for step in checkpoint.steps(folder)]
    aside = [path for path in folder.glob("*.damaged*") if ASIDE.fullmatch(path.name)]
    found = []
    paths = [*every, *sorted(aside)]
    for path in Bar(paths, "verifying", unit="checkpoints"):
        with suppress(FileNotFoundError):
            row = _row(path)
            # Training may have deleted it meanwhile, for newer ones.
            found += [row] if path.is_dir() else []
    return found


def _row(path: Path) -> Row:
    files = [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    step, loss, wrong = int(path.name.partition(".")[0]), None, None
    try:
        loss = checkpoint.verify(path).score
    except checkpoint.CheckpointError as error:
        wrong = str(error).partition("; got ")[2].partition(". Use an")[0]
    return Row(path.name, step, size, path.stat().st_mtime, loss, wrong)


def table(found: Sequence[Row], keep_every: int | None = None) -> str:
    """Returns the rows as lines, with what each is good for.

    >>> print(table([Row("9", 9, 2048, 0.0, 0.5, None)]))
    step      size  written              score  state
    9      2.0 KiB  1970-01-01 00:00    0.5000  verified, latest, best
    """
    whole = [row for row in found if row.wrong is None and row.name.isdecimal()]
    latest = max((row.step for row in whole), default=None)
    best = retention.best({row.step: row.loss for row in whole})
    wide = max(len("step"), *(len(row.name) for row in found))
    lines = [f"{'step':{wide}}  {'size':>8}  {'written':16}  {'score':>8}  state"]
    for row in found:
        marks = [f"damaged: {row.wrong}" if row.wrong else "verified"]
        if row in whole:
            marks += ["latest"] * (row.step == latest) + ["best"] * (row.step == best)
            marks += ["kept"] * (keep_every is not None and row.step % keep_every == 0)
        date = time.strftime("%Y-%m-%d %H:%M", time.gmtime(row.written))
        loss = "-" if row.loss is None else f"{row.loss:.4f}"
        size = tables.size(row.size)
        lines.append(
            f"{row.name:{wide}}  {size:>8}  {date}  {loss:>8}  {', '.join(marks)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    entry.guarded(main)
