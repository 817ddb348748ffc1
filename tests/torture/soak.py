"""Long runs: what a process holds does not grow."""

import functools
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import damage, trainings
from .cases import Outcome, check, outcome

CYCLES, WARM_UP = 1000, 400
"""Saves and restores; the first ones, after which memory must not grow."""
ROWS = 16_384
"""Of a matrix of 16 columns: 1 MiB, in parameters, moments and average."""
STEPS = 20_000
PICTURES, BETWEEN = 500, 5
"""Checkpoints and pictures of one run, and the steps from one to the next."""
A_SAVE, A_STEP = 20_000.0, 200.0
"""Bytes by which a process may grow with each: a save with its picture, a step."""
FLAT = 0.05
"""Share by which the files and threads of the end may be above those of the begin."""


class Held(NamedTuple):
    """What a process holds at a time."""

    done: int
    """Cycles or steps."""
    memory: int
    """Resident, bytes."""
    files: int
    """Open file descriptors."""
    threads: int


def held(done: int, process: int | str = "self") -> Held:
    """Returns what a process holds now."""
    folder = Path("/proc") / str(process)
    status = (folder / "status").read_text()
    kib, threads = (
        int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1])
        for name in ("VmRSS", "Threads")
    )
    return Held(done, kib * 1024, len(os.listdir(folder / "fd")), threads)


def slope(samples: Sequence[Held]) -> tuple[float, float]:
    """Returns the bytes that memory grows by each time, and the standard error.

    What a process holds goes up and down for a while, so that neighbours are alike:
    the line is through the medians of twelve parts.

    >>> grown = [Held(n, 7 * n + n % 2, 0, 0) for n in range(240)]
    >>> [round(value, 2) for value in slope(grown)]
    [7.0, 0.0]
    """
    parts = np.array_split(np.array([(s.done, s.memory) for s in samples], float), 12)
    x, y = np.array([np.median(part, axis=0) for part in parts]).T
    line, covariance = np.polyfit(x - x.mean(), y, 1, cov=True)
    return float(line[0]), float(np.sqrt(covariance[0, 0]))


def flat(samples: Sequence[Held], last: int, warm_up: int, most: float) -> str:
    """Checks that nothing has grown since a warm-up; says from what to what.

    Args:
      samples: what was held, over all the time.
      last: cycles or steps in all.
      warm_up: how many of them do not count.
      most: bytes that memory may grow by each time; the error must be below it too, or
        nothing has been measured.
    """
    part = (last - warm_up) // 8
    begin = [s for s in samples if warm_up <= s.done < warm_up + part]
    end = [s for s in samples if s.done > last - part]
    check(begin and end, f"{len(samples)} samples, none at the begin or the end")
    said, grown = [], []
    by, error = slope([s for s in samples if s.done >= warm_up])
    said.append(f"{by:+,.0f} +- {error:,.0f} bytes each time, of {most:,.0f}")
    if max(by, error) > most:
        grown.append("memory")
    for name in ("files", "threads"):
        # A save in flight has files open: the usual number counts, not the largest.
        before, after = (
            statistics.median(getattr(s, name) for s in part) for part in (begin, end)
        )
        said.append(f"{before:.0f} -> {after:.0f} {name}")
        if after / before - 1 > FLAT:
            grown.append(name)
    check(not grown, f"{' and '.join(grown)} grew: {', '.join(said)}")
    return ", ".join(said)


def cycles(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes of many saves and restores in one process."""
    import jax

    from diffusion_jax.checkpoints import checkpoint
    from diffusion_jax.training import parallel

    state = damage.init(seed, ROWS)
    like = jax.eval_shape(lambda: state)
    one = parallel.replicated(parallel.make_mesh(1))
    bump = jax.jit(lambda tree: jax.tree.map(_bumped, tree))
    samples: list[Held] = []

    def one_manager() -> str:
        now = state
        shown = functools.partial(print, "cycle", flush=True)
        with checkpoint.open_folder(folder / "one", keep=3) as opened:
            for step in range(1, CYCLES + 1):
                now = bump(now)
                checkpoint.save(opened, step, now, {"pending": [], "seed": seed})
                checkpoint.wait(opened)
                found = checkpoint.restore(opened, like, one)
                check(found.step == step, f"step {found.step} in the place of {step}")
                if step % 10 == 0:
                    samples.append(held(step))
                    shown(samples[-1])
        _write(folder / "one.tsv", samples)
        return flat(samples, CYCLES, WARM_UP, A_SAVE)

    def many_managers() -> str:
        """The folder opened and closed each time, as by runs that go on."""
        now, found = state, []
        for step in range(1, CYCLES // 4 + 1):
            now = bump(now)
            with checkpoint.open_folder(folder / "many", keep=3) as opened:
                checkpoint.save(opened, step, now, {"pending": []})
            with checkpoint.open_folder(folder / "many", read_only=True) as opened:
                checkpoint.restore(opened, like, one)
            if step % 5 == 0:
                found.append(held(step))
        _write(folder / "many.tsv", found)
        return flat(found, CYCLES // 4, WARM_UP // 4, A_SAVE)

    def clean() -> None:
        for name in ("one", "many"):
            names = sorted(path.name for path in (folder / name).iterdir())
            steps = [each for each in names if each.isdecimal()]
            check(len(steps) <= 4, f"{len(steps)} steps kept: {steps}")
            check(names == steps, f"left over: {sorted(set(names) - set(steps))}")

    yield outcome(f"{CYCLES:,} saves and restores", one_manager)
    yield outcome(f"{CYCLES // 4:,} openings of a folder", many_managers)
    yield outcome("nothing but checkpoints left", clean)
    shutil.rmtree(folder / "one", ignore_errors=True)


def _bumped(leaf: object) -> object:
    import jax

    return leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf + 1


def steps(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes of long runs of digits, with its own network."""
    # One device: the other core is for the other cases. Four times the usual steps,
    # alone, and then little else than checkpoints and pictures.
    flags = ["--train.seed", str(seed), "--train.devices", "1"]
    flags += ["--sample.steps", "10", "--sample.count", "4"]

    def grown(last: int, every: int, most: float) -> str:
        at = ["--train.checkpoint-every", str(every), "--sample.every", str(every)]
        return _grown(folder, [*flags, *at], last, most)

    yield outcome(f"{STEPS:,} steps", lambda: grown(STEPS, STEPS, A_STEP))
    yield outcome(
        f"{PICTURES} checkpoints and pictures",
        lambda: grown(PICTURES * BETWEEN, BETWEEN, A_SAVE / BETWEEN),
    )


def _grown(folder: Path, flags: list[str], last: int, most: float) -> str:
    """Trains, and says by how much the process grew with each step."""
    run, samples = folder / f"digits{last}", list[Held]()
    given = ["digits", "--output", str(folder), "--name", run.name, *flags]
    given += ["--train.steps", str(last)]
    training = trainings.start(run, log=folder / f"{run.name}.log", given=given)
    while training.process.poll() is None:
        done = trainings.logged(run)
        if done:
            # Between the last look and the end the process may have gone.
            try:
                samples.append(held(done[-1], training.process.pid))
            except (OSError, TypeError):
                break
        time.sleep(1)
    code = trainings.ended(training)
    seconds = time.monotonic() - training.began
    check(code == 0, f"exit code {code}, {trainings.last_words(training.log)}")
    _write(folder / f"{run.name}.tsv", samples)
    lines = trainings.logged(run)
    check(lines == list(range(50, last + 1, 50)), f"{len(lines)} lines")
    # Without the end, where a checkpoint is written and pictures are drawn.
    said = flat([s for s in samples if s.done < last], last, last // 5, most)
    return f"{said}; {last / seconds:.0f} steps/s; {_verified(run)}"


def _verified(run: Path) -> str:
    state = trainings.state_of(run)
    left = trainings.left_over(run)
    check(not left, f"left over: {left[:3]}")
    return f"{len(state)} leaves, nothing left over"


def _write(path: Path, samples: Sequence[Held]) -> None:
    lines = ["\t".join(Held._fields), *("\t".join(map(str, s)) for s in samples)]
    path.write_text("\n".join(lines) + "\n")
