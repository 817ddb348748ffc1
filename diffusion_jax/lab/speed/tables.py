"""What `experiments.bench` measures, within how long, and the tables it prints.

A table of the README is training as configured, training with the arithmetic of the
authors' code, chains, the same by PyTorch if wanted, and then what options of the
compiler change: as much of it, in this order, as the minutes allow.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema import config, sampling
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.training import compilation

SIZES = (128, 512)
"""Batch sizes, where none are given."""
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


def against(
    candidate: str, found: dict[str, Any], usual: dict[str, Any]
) -> dict[str, Any]:
    """Returns what an option of the compiler changes.

    Args:
      candidate: as of `told`.
      found: the figures of training with it, or an "error".
      usual: those of training without it.
    """
    if "error" in found:
        return {"option": candidate, **found}
    changes = {
        "times_as_fast": usual["ms"] / found["ms"],
        "loss_change": found["loss"] / usual["loss"] - 1,
    }
    return {"option": candidate, **found, **changes}


def in_words(figures: dict[str, Any]) -> str:
    """Returns the first that is known of a row, for a person who waits."""
    if "error" in figures:
        return str(figures["error"])
    return f"{figures['per_second']:,.1f} per s, {figures['ms']:,.2f} ms"


def markdown(report: dict[str, Any]) -> str:
    """Returns the tables of a report."""
    parts = [
        f"{report['experiment']} on {report['devices']} x {report['device']}, jax "
        f"{report['versions']['jax']}, {report['date']}; matrix products "
        + ", ".join(
            f"{n} {t:.3g} TFLOP/s" for n, t in report["ceilings_tflops"].items()
        )
    ]
    for cells, name in (_row, "rows"), (_scaled, "scaling"), (_option, "options"):
        if report[name]:
            parts += ["", *_table([cells(row) for row in report[name]])]
    if report["left_out"]:
        parts += ["", f"Not tried, for want of time: {'; '.join(report['left_out'])}."]
    return "\n".join(parts) + "\n"


def _row(row: dict[str, Any]) -> dict[str, str]:
    """A training step, or an evaluation of the network in a chain."""
    each = row.get("evaluations_per_sample", 1.0)
    low, high = (ms / each for ms in row["ms_range"])
    peer = row.get("peer", {})
    what = "training" if row["what"] == "train" else "an evaluation in sampling"
    return {
        "what": f"{what}, {row['form']}, {row['dtype']}",
        "batch": f"{row['batch']:,}",
        "ms": f"{row['ms'] / each:,.2f}",
        "range": f"{low:,.2f} to {high:,.2f}",
        "per second": f"{row['per_second']:,.1f}",
        "TFLOP/s": f"{row['tflops']:.3g}",
        "share": f"{row['share']:.1%}",
        "compile, s": f"{row['compile_s']:.1f}",
        # A step with fresh batches, in units of one with the same batch.
        "data x": f"{row['data_x']:.3f}" if "data_x" in row else "-",
        # In use so far at most, of a device or, on CPU, of the process.
        "GiB": f"{row['memory_gib']:.2f}",
        "PyTorch, ms": f"{peer['ms'] / each:,.2f}" if "ms" in peer else "-",
        "times": f"{peer['ratio']:.2f}" if "ratio" in peer else peer.get("error", "-"),
    }


def _scaled(row: dict[str, Any]) -> dict[str, str]:
    return {
        "scaling": row["scaling"],
        "devices": str(row["devices"]),
        "batch": f"{row['batch']:,}",
        "per second": f"{row['per_second']:,.1f}",
        "times one": f"{row['times_one']:.2f}",
        "efficiency": f"{row['efficiency']:.0%}",
    }


def _option(row: dict[str, Any]) -> dict[str, str]:
    change = row.get("loss_change")
    return {
        "option of the compiler": f"`{row['option']}`",
        "ms": f"{row['ms']:,.2f}" if "ms" in row else row["error"],
        "times as fast": f"{row['times_as_fast']:.3f}" if "ms" in row else "-",
        "loss": "-" if change is None else f"{change:+.1e}" if change else "the same",
    }


def _table(rows: list[dict[str, str]]) -> list[str]:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
