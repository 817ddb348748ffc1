"""Lists runs, or shows what differs between some: `python -m experiments.runs`.

A list has of each run the nearest experiment and how many of its values were changed,
the step, the loss (mean of the last tenth), the lowest distance, size and age; below it
stands what is damaged or missing.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import entry, flags
from diffusion_jax.lab.report import reading, tables
from diffusion_jax.lab.report.reading import Story
from diffusion_jax.lab.schema.config import changed
from experiments.configs import EXPERIMENTS

HEAD = ("run", "experiment", "step", "loss", "lowest distance", "size", "age")


@dataclasses.dataclass(frozen=True)
class List:
    """Lists the runs in a folder; what one gets without naming a command."""

    folder: Annotated[
        Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help="Of runs.")
    ] = Path("runs")


@dataclasses.dataclass(frozen=True)
class Compare:
    """Shows what differs between runs: their configurations first, then figures."""

    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN", help="Folders or names of two runs or more."),
    ]


COMMANDS: dict[str, type] = {"list": List, "compare": Compare}


def main(argv: Sequence[str]) -> int:
    """Prints what the arguments ask for; returns the exit code."""
    options = parse(argv)
    compares = isinstance(options, Compare)
    print(compared(options.runs) if compares else listed(options.folder))
    return 0


def parse(argv: Sequence[str]) -> Any:
    """Returns the options of the command that the arguments name, or of a list.

    Raises:
      SystemExit: `--help`, or a flag that does not exist or has another type.
    """
    named = bool(argv) and (argv[0] in COMMANDS or flags.asked(argv[:1]))
    words = argv if named else ["list", *argv]
    return flags.of_several(words, entry.typed("runs"), __doc__ or "", COMMANDS)[1]


def listed(folder: Path) -> str:
    """Returns a line a run, the newest last, and what is wrong with them.

    Raises:
      ConfigError: there are none.
    """
    found = reading.every_run(folder) if folder.is_dir() else []
    if not found:
        raise ConfigError(
            f"FOLDER must hold runs; got none in {folder.resolve()}. Name the folder "
            "that training wrote to, or train first: python -m experiments.train digits"
        )
    stories = sorted(map(reading.story, found), key=lambda story: story.changed)
    rows = [row(story) for story in stories]
    wrong = [f"{s.name}: {said}" for s in stories for said in s.wrong]
    lines = [tables.text(tables.Table("", HEAD, rows))]
    return "\n".join([*lines, *(f"note: {tables.printable(w)}" for w in wrong)])


def row(story: Story) -> tuple[str, ...]:
    """Returns the cells of a run."""
    nearest, loss = reading.best(story), tables.tail(story, "loss")
    last = f"/{story.config.train.steps:,}" if story.config else ""
    return (
        story.name,
        experiment(story),
        f"{story.step:,}{last}",
        tables.NONE if loss is None else f"{loss:.4f}",
        f"{nearest.value:.4g} {nearest.name}" if nearest else tables.NONE,
        tables.size(story.size),
        tables.ago(time.time() - story.changed),
    )


def experiment(story: Story) -> str:
    """Returns the experiment of which the fewest values were changed, and how many."""
    config = story.config
    if config is None:
        return tables.NONE
    counts = {
        name: len(changed(one.config, config)) for name, one in EXPERIMENTS.items()
    }
    name = min(counts, key=lambda name: (counts[name], name != config.name))
    return name + (f" +{counts[name]}" if counts[name] else "")


def compared(names: Sequence[str]) -> str:
    """Returns the tables of what differs between runs.

    Raises:
      ConfigError: there are fewer than two, or one of them is no run.
    """
    found = reading.each_named(names)
    if len(found) < 2:
        raise ConfigError(
            f"RUN must be two runs or more; got {len(found)}. Name another, or look at "
            "one by: python -m experiments.report RUN"
        )
    stories = list(map(reading.story, found))
    every = [tables.differing(stories), tables.figures(stories)]
    every += tables.evaluations(stories)
    wrong = [f"note: {s.name}: {said}" for s in stories for said in s.wrong]
    parts = [
        f"{table.title}\n{tables.text(table)}" if table.rows else f"{table.title}: none"
        for table in every
    ]
    return "\n\n".join([*parts, *map(tables.printable, wrong)])


if __name__ == "__main__":
    entry.guarded(main)
