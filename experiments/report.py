"""Writes what runs came to as one page: `python -m experiments.report [RUN ...]`.

The page is a file of less than 2 MB that needs no other and no network: what was
trained, samples over steps, curves, evaluations with their protocol, the nearest
neighbours, rate and distortion, the configuration. Several runs stand side by side,
what differs in their configurations first.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import entry, replaceable
from diffusion_jax.lab.report import page, reading
from diffusion_jax.storage import files


@dataclasses.dataclass(frozen=True)
class Options:
    """Whose report, and where it goes."""

    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="RUN ...",
            help="Folders or names of runs (the newest in runs/ when not given).",
        ),
    ] = ()
    out: Path | None = None
    """The file to write; report.html in the folder of the first run when not given."""
    overwrite: bool = False
    """Whether a file may be replaced that is no report."""


def main(argv: Sequence[str]) -> int:
    """Writes the page; returns the exit code."""
    options = entry.parse(Options, argv, "report", __doc__)
    found = reading.each_named(options.runs or [None])
    if len(found) > page.MOST_RUNS:
        raise ConfigError(
            f"RUN must be at most {page.MOST_RUNS} runs; got {len(found)}. Leave some "
            "out, or compare them by: python -m experiments.runs compare RUN RUN"
        )
    out = options.out or found[0].folder / "report.html"
    replaceable.check_file(out, page.MARK.encode(), overwrite=options.overwrite)
    made = replaceable.typed("report", argv)
    text = page.page([reading.story(run) for run in found], made, time.time())
    with files.replacing(out) as file:
        file.write(text.encode("utf-8", "replace"))
    print(f"{out}, {len(text) / 1e6:.2f} MB: open it in a browser")
    return 0


if __name__ == "__main__":
    entry.guarded(main)
