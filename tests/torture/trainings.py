"""Small trainings as a person starts them, and all that they leave behind."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .cases import FailedError, Outcome, check, outcome

ROOT = Path(__file__).resolve().parents[2]
EVERY, GRID_EVERY, KEEP = 40, 60, 2
"""Steps between two checkpoints, between two grids; how many checkpoints stay."""
# Learning rate and dropout depend on the step, which a run that goes on must get right.
SMALL = shlex.split(  # flags as a person types them
    f"""--train.batch-size 8 --train.devices 1 --optimizer.warmup 2 --sample.count 4
--train.log-every 1 --train.checkpoint-every {EVERY} --train.keep {KEEP}
--sample.every {GRID_EVERY}"""
)
NETWORK = shlex.split(
    """--net.channels 8 --net.multipliers 1 --net.blocks 1 --net.attention
--net.groups 4 --net.dropout 0.1 --diffusion.num-steps 20 --sample.steps 4"""
)
KINDS = {
    "digits": NETWORK,
    "digits_autoencoder": shlex.split(
        """--autoencoder.channels 8 --autoencoder.groups 4
--autoencoder.discriminator 0.5 --autoencoder.discriminator-start 30"""
    ),
    "digits_latent": NETWORK,
}
"""The flags of each experiment, by which the folder of a run is called."""
LONGEST = 300
"""Seconds that a command may take before it counts as hanging."""


class Training(NamedTuple):
    """A command that trains, as it is seen from outside."""

    process: subprocess.Popen[bytes]
    run: Path
    log: Path
    began: float
    """By `time.monotonic`."""
    writer: subprocess.Popen[bytes]
    """What writes the log: no limit on the files of the command is one on its words."""


def environment(cache: Path | None) -> dict[str, str]:
    """Returns that of a command: a CPU, and programs compiled into a folder.

    Args:
      cache: the folder; that of the run's output, as for everybody, when None.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    made = {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    if cache is not None:
        made |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return {**kept, **made}


def arguments(run: Path, *flags: object) -> list[str]:
    """Returns the arguments of the command that trains a small network."""
    kind = run.name if run.name in KINDS else "digits"
    where = ["--output", str(run.parent), "--name", run.name]
    return [kind, *SMALL, *KINDS[kind], *where, *map(str, flags)]


def start(
    run: Path,
    *flags: object,
    log: Path,
    cache: Path | None = None,
    given: Sequence[str] | None = None,
    command: Sequence[str] = ("-m", "experiments.train"),
    extra: Mapping[str, str] | None = None,
    **options: Any,
) -> Training:
    """Starts a command; what it prints goes to a file.

    Args:
      run: the folder of the run.
      flags: more than those of the small network.
      log: the file.
      cache: of compiled programs, see `environment`.
      given: its arguments, in the place of those of training.
      command: what Python runs.
      extra: variables of its environment.
      options: of `subprocess.Popen`.
    """
    given = arguments(run, *flags) if given is None else given
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out)
    assert writer.stdin is not None
    with writer.stdin:
        process = subprocess.Popen(
            [sys.executable, *command, *given],
            env={**environment(cache), **(extra or {})},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=writer.stdin,
            stderr=subprocess.STDOUT,
            **options,
        )
    return Training(process, run, log, time.monotonic(), writer)


def ended(training: Training, *, within: float = LONGEST) -> int:
    """Waits for the end of a command; returns its exit code.

    Raises:
      FailedError: it did not end in time; it is killed.
    """
    try:
        code = training.process.wait(within)
        training.writer.wait(within)
        return code
    except subprocess.TimeoutExpired:
        kill(training)
        raise FailedError(
            f"still there after {within:.0f} s; last words: {last_words(training.log)}"
        ) from None


def finish(run: Path, *flags: object, log: Path, **options: Any) -> str:
    """Trains to the end, in a process of its own; returns what was printed.

    Raises:
      FailedError: its exit code is not 0.
    """
    training = start(run, *flags, log=log, **options)
    code = ended(training)
    check(code == 0, f"exit code {code}, {last_words(log)}")
    return text(log)


def undisturbed(run: Path, steps: int, **options: Any) -> Outcome:
    """Returns the outcome of a run that others are compared with."""
    log = run.parent.with_suffix(".log")

    def train() -> None:
        finish(run, "--train.steps", steps, log=log, **options)

    return outcome(f"undisturbed run of {steps} steps", train)


def kill(training: Training) -> None:
    """Ends a command as a machine that is switched off does."""
    training.process.send_signal(signal.SIGKILL)
    training.process.wait()
    training.writer.wait()


def text(log: Path) -> str:
    """Returns what a command has printed so far."""
    return log.read_bytes().decode(errors="replace") if log.exists() else ""


def last_words(log: Path, length: int = 300) -> str:
    """Returns the end of what a command printed."""
    return repr(text(log).strip()[-length:])


def begun_at(log: Path) -> int | None:
    """Returns the step at which a command says that it begins, once it does."""
    found = re.search(r"(?:going on from|starting at) step ([\d,]+)", text(log))
    return int(found[1].replace(",", "")) if found else None


def logged(run: Path) -> list[int]:
    """Returns the steps in metrics.jsonl, but for a last line that was cut off."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def steps_of(run: Path) -> list[int]:
    """Returns the steps of the checkpoints of a run, whole or not."""
    found = (run / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def refused(training: Training, name: object) -> str:
    """Checks that a command ended with an error that a person understands.

    Returns the first line of the message, which must name something.
    """
    code, printed = ended(training), text(training.log)
    check(code != 0, f"exit code 0, {last_words(training.log)}")
    check(code > 0, f"ended by signal {-code}, {last_words(training.log)}")
    # Threads that write arrays print this when the loop that they report to went first.
    foreign = printed.count("RuntimeError('Event loop is closed')")
    tracebacks = printed.count("Traceback") - foreign
    check(tracebacks <= 0, f"a traceback, {last_words(training.log)}")
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    check(errors, f"no line 'error: ...', {last_words(training.log)}")
    check(str(name) in errors[0], f"an error that does not name {name}: {errors}")
    return errors[0]


def state_of(run: Path) -> dict[str, str]:
    """Returns the sha256 of every leaf of the newest checkpoint, by its path.

    Raises:
      FailedError: the newest checkpoint does not verify.
    """
    import jax
    import numpy as np

    from diffusion_jax.checkpoints import checkpoint
    from diffusion_jax.lab.run_folder import runs
    from diffusion_jax.lab.wiring import learning
    from diffusion_jax.training import parallel

    config = runs.read_config(runs.Run(run))
    like = learning.state_shapes(config)
    sharding = parallel.replicated(parallel.make_mesh(1))
    with checkpoint.open_folder(run / "checkpoints", read_only=True) as folder:
        restored = checkpoint.restore(folder, like, sharding)
    check(not restored.skipped, f"{run.name}: skipped {restored.skipped}")
    step, newest = restored.step, steps_of(run)[-1]
    check(step == newest, f"{run.name}: checkpoint {step}, and {newest} is there")
    state = restored.state._replace(key=jax.random.key_data(restored.state.key))
    found = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in found}
    return {
        path: hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()
        for path, x in arrays.items()
    }


def same_state(run: Path, other: Path) -> str:
    """Checks that two runs ended in the same state, to the bit."""
    one, two = state_of(run), state_of(other)
    differing = sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
    check(not differing, f"{len(differing)} leaves differ: {', '.join(differing[:3])}")
    kinds = {path.split("[")[0].split(".")[1] for path in one}
    for kind in ("step", "params", "averages", "opt_state", "key"):
        check(kind in kinds, f"a state without {kind}: {sorted(kinds)}")
    return f"{len(one)} leaves"


def same_files(run: Path, other: Path) -> str:
    """Checks that metrics.jsonl and the last grid of two runs have the same bytes."""
    grids = [sorted((r / "samples").glob("step_*.png"))[-1] for r in (run, other)]
    check(grids[0].name == grids[1].name, f"grids {[grid.name for grid in grids]}")
    pairs = [(run / "metrics.jsonl", other / "metrics.jsonl"), (grids[0], grids[1])]
    for mine, theirs in pairs:
        check(mine.read_bytes() == theirs.read_bytes(), f"{mine.name} differs")
    return f"metrics.jsonl, {grids[0].name}"


def same_end(run: Path, whole: Path, steps: int) -> str:
    """Checks that a run ended as another one, to the bit, and has every step once."""
    found = same_state(run, whole), same_files(run, whole), every_step(run, steps)
    return ", ".join(found)


def every_step(run: Path, last: int) -> str:
    """Checks that metrics.jsonl has every step once, in order."""
    steps = logged(run)
    missing = sorted(set(range(1, last + 1)) - set(steps))
    doubled = sorted({step for step in steps if steps.count(step) > 1})
    said = f"missing {missing[:5]}, doubled {doubled[:5]}, {len(steps)} lines"
    check(steps == list(range(1, last + 1)), said)
    return f"{len(steps)} lines"


def left_over(run: Path) -> list[str]:
    """Returns temporary files and folders that a run left behind."""
    found = (path for path in run.rglob("*") if "/.cache/" not in str(path))
    return sorted(
        str(path.relative_to(run))
        for path in found
        if path.name.endswith(".tmp") or "orbax-checkpoint-tmp" in path.name
    )
