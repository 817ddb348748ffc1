"""Plans what `experiments.bench` measures, and writes its table."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema import config, sampling
from diffusion_jax.lab.schema.config import Config

SIZES = (128, 512)
"""Batch sizes of the table in docs/performance.md, where none are given."""
AUTHORS, CONFIGURED = "the authors' arithmetic", "as configured"


class Work(NamedTuple):
    """A row to be measured."""

    form: str
    config: Config
    what: str
    """Training or chains: "train" or "sample"."""
    batch: int
    devices: int | None = None
    """How many to use; all when None."""
    base: str = ""
    """Name of the row that it is compared with."""

    @property
    def name(self) -> str:
        """Returns what the row is called."""
        return f"{self.what} {self.batch}, {self.form}"


def plain(chosen: Config, what: Iterable[str], sizes: Iterable[int]) -> list[Work]:
    """Returns a row for each size of each kind."""
    return [Work(CONFIGURED, chosen, kind, size) for kind in what for size in sizes]


def of_readme(chosen: Config, sizes: tuple[int, ...]) -> list[Work]:
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


def scaling(chosen: Config, sizes: Iterable[int], found: int) -> list[Work]:
    """Returns rows of training on 1, 2, 4, ... and all of so many devices.

    Strong scaling keeps the batch: the same step, sooner. Weak scaling keeps the share
    of each device: a larger batch in, at best, the same time.
    """
    rows = []
    for size in sizes:
        alone = Work("on 1 device", chosen, "train", size, 1)
        rows.append(alone)
        for n in counts(found)[1:]:
            for kind, batch in ("strong", size), ("weak", size * n):
                form = f"{kind} scaling of {size} on {n} devices"
                rows.append(Work(form, chosen, "train", batch, n, base=alone.name))
    return rows


def counts(found: int) -> list[int]:
    """Returns how many devices to measure scaling on: powers of two, and all.

    >>> counts(8), counts(6), counts(1)
    ([1, 2, 4, 8], [1, 2, 4, 6], [1])
    """
    return sorted({found, *(2**n for n in range(found.bit_length()) if 2**n <= found)})


def check_scaling(batch_size: int, found: int) -> None:
    """Raises ConfigError unless every count of devices can share the batch."""
    if jax.process_count() > 1:
        raise ConfigError(
            "scaling must be measured on one host, which can leave some of its devices "
            f"idle; got {jax.process_count()} hosts. Run bench on one host, then on "
            "all, with --batch-sizes in proportion."
        )
    wrong = [n for n in counts(found) if batch_size % n]
    if wrong:
        raise ConfigError(
            f"batch_sizes must be multiples of {wrong[-1]} for scaling, which measures "
            f"on {', '.join(map(str, counts(found)))} devices; got {batch_size}. "
            "Change it with --batch-sizes."
        )


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of work, or {"error": its first line} where it fails."""
    try:
        return work()
    except RuntimeError as error:  # of XLA or of PyTorch, as when memory is short
        said = str(error).strip() or type(error).__name__
        return {"error": said.split("\n")[0]}


def row(
    work: Work, found: dict[str, Any], before: list[dict[str, Any]], top: float
) -> dict[str, Any]:
    """Returns a row of a report.

    `found` has its figures, or an "error"; one of the rows before may be its base;
    `top` is the TFLOP/s of a large matrix product, by one device.
    """
    about = {"name": work.name, "form": work.form, "dtype": work.config.net.dtype}
    made = {**about, "what": work.what, "batch": work.batch, **found}
    if "error" in found:
        return made
    made["share"] = found["tflops"] / found["devices"] / top
    for base in before:
        if base["name"] != work.base or "error" in base:
            continue
        times = found["per_second"] / base["per_second"]
        made["times_as_fast"] = times
        made["efficiency"] = times * base["devices"] / found["devices"]
    return made


def in_words(figures: dict[str, Any]) -> str:
    """Returns the figures of a row in a few words, for the screen."""
    if "error" in figures:
        return str(figures["error"])
    return f"{figures['per_second']:,.1f} per s, {figures['ms']:,.2f} ms"


MARK = "; matrix products, TFLOP/s: "
"""In the first line of a table, by which it is known."""


def markdown(report: dict[str, Any]) -> str:
    """Returns the table of a report, without columns that nothing was measured for."""
    tops = [f"{name} {top:.3g}" for name, top in report["ceilings_tflops"].items()]
    parts = [
        f"{report['experiment']} on {report['devices']} x {report['device']}, jax "
        f"{report['versions']['jax']}, {report['date']}{MARK}{', '.join(tops)}",
        "",
    ]
    rows = [cells(row) for row in report["rows"]]
    columns = [n for n in (rows or [{}])[0] if any(row[n] != "-" for row in rows)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[row[name] for name in columns] for row in rows]
    parts += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(parts) + "\n"


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Returns a row of the table: "-" for what is not known, errors in place of ms.

    Milliseconds are of a training step, or of an evaluation of the network in a chain.
    """
    each = row.get("evaluations_per_sample", 1.0)
    peer = row.get("peer", {})

    def of(name: str, form: str, of_row: dict[str, Any] = row, by: float = 1.0) -> str:
        return format(of_row[name] / by, form) if name in of_row else "-"

    what = "training" if row["what"] == "train" else "an evaluation in sampling"
    low_to_high = [f"{ms / each:,.2f}" for ms in row.get("ms_range", ())]
    return {
        "what": f"{what}, {row['form']}, {row['dtype']}",
        "batch": f"{row['batch']:,}",
        "ms": row.get("error") or of("ms", ",.2f", by=each),
        "range": " to ".join(low_to_high) or "-",
        "per second": of("per_second", ",.1f"),
        "times as fast": of("times_as_fast", ".3f"),
        "efficiency": of("efficiency", ".0%"),
        "loss": of("loss", ".8g"),
        "TFLOP/s": of("tflops", ".3g"),
        "share": of("share", ".1%"),
        "compile, s": of("compile_s", ".1f"),
        # A step with fresh batches, in units of one with the same batch.
        "data x": of("data_x", ".3f"),
        # In use so far at most, of a device or, on CPU, of the process.
        "GiB": of("memory_gib", ".2f"),
        "PyTorch, ms": peer.get("error") or of("ms", ",.2f", peer, each),
        "times PyTorch": of("ratio", ".2f", peer),
    }
