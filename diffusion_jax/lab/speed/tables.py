"""The table of the README in one command, for `experiments.bench --table`.

Training as configured, training with the arithmetic of the authors' code, chains, the
same by PyTorch if wanted, and then what options of the compiler change: as much of it,
in this order, as the minutes allow.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema import checks, config, sampling
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.training import compilation

SIZES = (128, 512)
"""Batch sizes, where none are given."""
STEPS = 50
"""After so many, losses of two programs show whether they compute the same."""
NONE = "none"
# Of XLA for GPUs; none of them has been tried on these networks. The first is training
# as it is once more: what the two differ by means nothing. The last may take minutes to
# compile.
CANDIDATES = (
    NONE,
    "xla_gpu_experimental_enable_conv_fusion=true",
    "xla_gpu_experimental_enable_fusion_autotuner=true",
    "xla_gpu_experimental_enable_fusion_block_level_rewriter=true",
    "xla_gpu_unsupported_enable_triton_multi_output_fusion=true",
    "xla_gpu_use_runtime_fusion=true",
    "xla_gpu_cudnn_gemm_fusion_level=2",
    "xla_gpu_triton_gemm_any=true",
    "xla_gpu_enable_triton_hopper=true",
    "xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
    "xla_gpu_experimental_enable_triton_heroless_priority_fusion=true",
)
AUTHORS, CONFIGURED = "the authors' arithmetic", "as configured"
UNKNOWN = "No such compile option"
"""What XLA says of one that it does not know."""


class Work(NamedTuple):
    """A row to be measured."""

    form: str
    config: Config
    what: str
    batch: int

    @property
    def name(self) -> str:
        """Returns what the row is called."""
        return f"{self.what} {self.batch}, {self.form}"


def works(chosen: Config, sizes: tuple[int, ...]) -> list[Work]:
    """Returns the rows: training at all sizes, the authors' at the first, and chains.

    Chains are of the last size. Where their rule would take all T steps, as that of the
    paper does, they are the shorter ones of DDIM.
    """
    authors = config.official(chosen)
    form = AUTHORS if chosen == authors else CONFIGURED
    rows = [Work(form, chosen, "train", size) for size in sizes]
    if chosen != authors:
        rows.append(Work(AUTHORS, authors, "train", sizes[0]))
    drawn = chosen.sample
    if drawn.sampler == "ddpm" and drawn.steps is None:
        drawn = sampling.override(drawn, sampling.Sampling(sampler="ddim"))
    short = dataclasses.replace(chosen, sample=drawn)
    return [*rows, Work(form, short, "sample", sizes[-1])]


def check(options: Any) -> None:
    """Raises ConfigError for what no table can be made of."""
    if options.scaling or options.what != type(options).what:
        raise ConfigError(
            "what and scaling must be left out of a table, which has its own rows; got "
            f"what {' '.join(options.what)} and scaling {options.scaling}. Measure "
            "them without --table."
        )
    if options.config.train.parallel == "pmap":
        raise ConfigError(
            "train.parallel must be mesh or shard_map for a table: pmap takes no "
            "options of the compiler; got pmap. Change it with --train.parallel mesh."
        )
    if options.out is not None and options.out.suffix == ".md":
        raise ConfigError(
            "out must be a file of JSON, beside which a table writes one of Markdown; "
            f"got {options.out}. Let it end in .json."
        )
    for candidate in options.candidates:
        told(candidate)
    for work in works(options.config, options.sizes):
        sized = config.replace(work.config, "train", batch_size=work.batch)
        checks.validate(sized)


def told(candidate: str) -> compilation.Options:
    """Returns an option of the compiler as JAX takes it, from NAME=VALUE or "none".

    >>> told("xla_gpu_triton_gemm_any=true"), told("xla_gpu_cudnn_gemm_fusion_level=2")
    ({'xla_gpu_triton_gemm_any': True}, {'xla_gpu_cudnn_gemm_fusion_level': '2'})
    """
    if candidate == NONE:
        return {}
    name, equals, value = candidate.partition("=")
    if not (name.startswith("xla_") and equals and value):
        raise ConfigError(
            f"candidates must be {NONE} or xla_name=value; got {candidate!r}. Write "
            "it as in XLA_FLAGS, without the dashes."
        )
    return {name: {"true": True, "false": False}.get(value, value)}


def measure(
    options: Any,
    report: dict[str, Any],
    *,
    add_row: Callable[[Any, Work], dict[str, Any]],
    measure_peer: Callable[[Any, dict[str, Any]], dict[str, Any]],
    train: Callable[[compilation.Options], dict[str, Any]],
    save: Callable[[], None],
) -> None:
    """Fills a report and prints it: rows, the peer, options of the compiler, in turn.

    Args:
      options: of `experiments.bench`.
      report: to be filled.
      add_row: measures a row, and adds it to the report.
      measure_peer: measures the work of a row by PyTorch.
      train: from options of the compiler, beside those of the platform, to the figures
        of training as configured, at the first size.
      save: writes the report.
    """
    rows = works(options.config, options.sizes)

    def of(work: Work) -> Any:
        given = dataclasses.replace(options, config=work.config)
        # Chains are long: one at a time.
        alone = work.what == "sample"
        return dataclasses.replace(given, steps=1, warmup=1) if alone else given

    def own(work: Work) -> None:
        add_row(of(work), work)["form"] = work.form

    def peer(work: Work, number: int) -> None:
        row = report["rows"][number]
        row["peer"] = attempt(lambda: measure_peer(of(work), row))

    def change(candidate: str) -> None:
        report["options"].append(tried(candidate, train, report["rows"][0]))

    pieces = [(work.name, partial(own, work)) for work in rows]
    if options.peer:
        pieces += [
            (f"{work.name}, by PyTorch", partial(peer, work, number))
            for number, work in enumerate(rows)
        ]
    pieces += [(name, partial(change, name)) for name in options.candidates]
    within(options.minutes, pieces, report, save)
    print(markdown(report), end="")


def within(
    minutes: float,
    pieces: Iterable[tuple[str, Callable[[], None]]],
    report: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Does pieces of work while there is time, and saves the report after each.

    A piece is begun if there is time for it to take as long as the one before; the
    names of the others are added to the report.
    """
    ends, last = time.perf_counter() + 60 * minutes, 0.0
    for name, work in pieces:
        began = time.perf_counter()
        if began + last > ends:
            report["left_out"].append(name)
        else:
            work()
            last = time.perf_counter() - began
        save()


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what comes of it, or {"error": its first line} where it fails."""
    try:
        return work()
    except RuntimeError as error:  # of XLA or of PyTorch, as when memory is short
        said = str(error).strip() or type(error).__name__
        unknown = UNKNOWN in said
        return {"error": "not known to this jaxlib" if unknown else said.split("\n")[0]}


def tried(
    candidate: str, train: Callable[[compilation.Options], dict[str, Any]], usual: Any
) -> dict[str, Any]:
    """Returns what an option of the compiler changes, and prints it.

    Args:
      candidate: as of `told`.
      train: from the option to the figures of training with it.
      usual: those of training without it.
    """
    row = attempt(lambda: train(told(candidate)))
    if "error" not in row:
        row["times_as_fast"] = usual["ms"] / row["ms"]
        row["loss_change"] = row["loss"] / usual["loss"] - 1
    row = {"option": candidate, **row}
    print(f"  {' | '.join(_option(row))}")
    return row


def markdown(report: dict[str, Any]) -> str:
    """Returns the tables of a report."""
    head = [
        f"{report['experiment']} on {report['devices']} x {report['device']}, jax "
        f"{report['versions']['jax']}, {report['date']}",
        "",
    ]
    columns = ["what", "batch", "ms", "per second", "TFLOP/s", "share", "PyTorch, ms"]
    parts = [*head, *_table([*columns, "times"], map(_row, report["rows"]))]
    if report["options"]:
        columns = ["option of the compiler", "ms", "times as fast", "loss"]
        parts += ["", *_table(columns, map(_option, report["options"]))]
    if report["left_out"]:
        parts += ["", f"Not tried, for want of time: {'; '.join(report['left_out'])}."]
    return "\n".join(parts) + "\n"


def _row(row: dict[str, Any]) -> list[str]:
    """A training step, or an evaluation of the network in a chain."""
    each = row.get("evaluations_per_sample", 1.0)
    peer = row.get("peer", {})
    return [
        f"{'training' if row['what'] == 'train' else 'an evaluation in sampling'}, "
        f"{row['form']}, {row['dtype']}",
        f"{row['batch']:,}",
        f"{row['ms'] / each:,.2f}",
        f"{row['per_second']:,.0f}",
        f"{row['tflops']:.3g}",
        f"{row['share']:.0%}",
        f"{peer['ms'] / each:,.2f}" if "ms" in peer else peer.get("error", "-"),
        f"{peer['ratio']:.2f}" if "ratio" in peer else "-",
    ]


def _option(row: dict[str, Any]) -> list[str]:
    name = f"`{row['option']}`"
    if "error" in row:
        return [name, row["error"], "-", "-"]
    change = row["loss_change"]
    return [
        name,
        f"{row['ms']:,.2f}",
        f"{row['times_as_fast']:.3f}",
        f"{change:+.1e}" if change else "the same",
    ]


def _table(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
