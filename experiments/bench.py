"""Measures speed: `python -m experiments.bench [EXPERIMENT]`.

Measures training and sampling of any configuration on the devices there are, and their
share of a ceiling that is measured in the same run: a large matrix product in the
network's type. The operations (FLOP) are those of matrix products and convolutions,
counted in the mathematics (see `diffusion_jax.lab.speed.arithmetic`), not in what a
compiler makes of it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import entry, progress, replaceable
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import checks, config
from diffusion_jax.lab.schema.facts import Count
from diffusion_jax.lab.speed import measuring, peer, tables
from diffusion_jax.lab.training import arguments
from diffusion_jax.training import parallel
from experiments.configs import EXPERIMENTS


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    MAIN: ClassVar = (
        "what batch_sizes steps repeats scaling peer table out "
        "overwrite data.image_size net.channels net.multipliers net.dtype "
        "train.parallel train.devices train.fsdp sample.sampler sample.steps"
    )
    what: tuple[Literal["train", "sample"], ...] = ("train", "sample")
    """Training steps, and chains of the sampling rule."""
    batch_sizes: tuple[int, ...] | None = None
    """Images a training step, and images a chain; one row each. 64 when not given, and
    128 and 512 of a table."""
    steps: Count = 10
    """Training steps that are timed together; chains are one at a time."""
    repeats: Count = 5
    """Measurements of each: the median counts, and the whole range is shown."""
    scaling: bool = False
    """Whether to train on 1, 2, 4, ... of the devices as well, with the same batch and
    with the same share of it."""
    peer: bool = False
    """Whether to measure the same work by diffusers and PyTorch in this run (pip
    install .[peers]), and print how much faster this is."""
    table: bool = False
    """Whether to make the table of docs/performance.md, on one device: training, also
    with the arithmetic of the authors' code, and chains."""
    out: Path | None = None
    """JSON file to write, after every row; of a table also one of Markdown."""
    overwrite: bool = False
    """Whether a file may be replaced that this command did not write."""
    config: arguments.Unnamed = arguments.DEFAULT

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images of each row, as given or by what is measured."""
        if self.batch_sizes is None:
            return tables.SIZES if self.table else (64,)
        return self.batch_sizes


def main(argv: Sequence[str]) -> int:
    """Prints the table, and writes it; returns the exit code."""
    options = parse(argv)
    parallel.split_cpu(math.gcd(*options.sizes))
    plan = options.config.train
    mesh = parallel.make_mesh(plan.devices, plan.fsdp)
    for size in options.sizes:
        parallel.check_batch_size(size, mesh.size)
        if options.scaling:
            tables.check_scaling(size, mesh.size)
    report: dict[str, Any] = {
        "command": replaceable.typed("bench", argv),
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "experiment": options.config.name,
        "ceilings_tflops": {},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": runs.versions(),
        "rows": [],
    }

    def save() -> None:
        """Writes what there is, so that a command that is killed loses nothing."""
        if options.out is not None:
            runs.write_json(options.out, report)
        if options.out is not None and options.table:
            options.out.with_suffix(".md").write_text(tables.markdown(report))

    save()  # which may fail, and had better do so now
    for work in pieces(options, mesh, report):
        work()
        save()
    print(tables.markdown(report), end="")
    if options.out is not None:
        print(f"written: {options.out}")
    return 0


def parse(argv: Sequence[str]) -> Options:
    """Returns the checked options: an experiment's name, then flags."""
    options: Options = arguments.parse_with(
        Options,
        argv,
        EXPERIMENTS,
        prog=entry.typed("bench"),
        description=__doc__,
    )
    if min(options.sizes, default=0) < 1:
        raise ConfigError(
            "batch_sizes must be one or more whole numbers above 0; "
            f"got {options.sizes}. Change it with --batch-sizes 64 128."
        )
    if not options.what:
        raise ConfigError(
            "what must be train, sample or both; got neither. Leave it out for both."
        )
    if options.peer:
        peer.check(options.config)
    if options.table:
        check_table(options)
    if options.out is not None:
        mark, over = replaceable.report_of("bench"), options.overwrite
        replaceable.check_file(options.out, mark, overwrite=over)
        if options.table:
            table = options.out.with_suffix(".md")
            replaceable.check_file(table, tables.MARK.encode(), overwrite=over)
    return options


def check_table(options: Options) -> None:
    """Raises ConfigError for what no table can be made of."""
    if options.scaling or options.what != Options.what:
        raise ConfigError(
            "what and scaling must be left out of a table, which has its own rows; got "
            f"what {' '.join(options.what)} and scaling {options.scaling}. Measure "
            "them without --table."
        )
    if options.out is not None and options.out.suffix == ".md":
        raise ConfigError(
            "out must be a file of JSON, beside which a table writes one of Markdown; "
            f"got {options.out}. Let it end in .json."
        )
    for work in tables.of_readme(options.config, options.sizes):
        checks.validate(config.replace(work.config, "train", batch_size=work.batch))


def pieces(
    options: Options, mesh: Any, report: dict[str, Any]
) -> list[Callable[[], None]]:
    """Returns what is to be measured in turn; each adds to the report."""
    chosen, sizes, rows = options.config, options.sizes, report["rows"]
    effort = measuring.Effort(options.steps, options.repeats)
    tops = report["ceilings_tflops"]
    if options.table:
        works = tables.of_readme(chosen, sizes)
        more = []
    else:
        works = tables.plain(chosen, options.what, sizes)
        more = tables.scaling(chosen, sizes, mesh.size) if options.scaling else []

    def own(work: tables.Work) -> None:
        dtype = work.config.net.dtype
        if dtype not in tops:
            with progress.clock(f"measuring products of matrices, {dtype}"):
                tops[dtype] = measuring.ceiling(dtype, mesh, effort) / 1e12
        # There is no other program for what is only compared, nor time in a table.
        fresh = not options.table and work in works
        with progress.clock(f"measuring {work.name}"):
            found = tables.attempt(
                lambda: measuring.row(work, mesh, effort, fresh=fresh)
            )
        rows.append(tables.row(work, found, rows, tops[dtype] / mesh.size))
        print(f"  {work.name}: {tables.in_words(found)}", flush=True)

    def by_peer(work: tables.Work, number: int) -> None:
        row = rows[number]
        if "error" not in row:
            with progress.clock(f"measuring {work.name}, by PyTorch"):
                found = tables.attempt(lambda: peer.compare(work.config, row, effort))
            row["peer"] = found
            print(f"  {work.name}, by PyTorch: {tables.in_words(found)}", flush=True)

    by_others = enumerate(works) if options.peer else ()
    return [
        *(partial(own, work) for work in works),
        *(partial(by_peer, work, number) for number, work in by_others),
        *(partial(own, work) for work in more),
    ]


if __name__ == "__main__":
    entry.guarded(main)
