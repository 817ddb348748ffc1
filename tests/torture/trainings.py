"""Small trainings as a person starts them, and all that they leave behind."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import jax
import numpy as np

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.wiring import learning
from diffusion_jax.training import parallel

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
COMMAND = ("-m", "experiments.train")
LONGEST = 300
"""Seconds that a command may take before it counts as hanging."""
# A command that trains, as it is seen from outside; when it began by time.monotonic.
Training = namedtuple("Training", "process run log began")


def environment(cache):
    """A CPU, and programs compiled into a folder, if one is given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    kept |= {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    if cache is not None:
        kept["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        kept["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    return kept


def arguments(run, *flags):
    where = ["--output", str(run.parent), "--name", run.name]
    return [run.name, *SMALL, *KINDS[run.name], *where, *map(str, flags)]


def start(run, *flags, log, cache=None, given=None, command=COMMAND, extra=None):
    """Starts a command that trains a small network, or with other arguments.

    What it prints goes to a file.
    """
    given = arguments(run, *flags) if given is None else given
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command, *given],
            env={**environment(cache), **(extra or {})},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    return Training(process, run, log, time.monotonic())


def ended(training, *, within=LONGEST):
    """Waits for the end of a command, which is killed after a while; its exit code."""
    try:
        return training.process.wait(within)
    except subprocess.TimeoutExpired:
        kill(training)
        said = f"still there after {within:.0f} s; {last_words(training.log)}"
        raise AssertionError(said) from None


def succeeded(training):
    code = ended(training)
    assert code == 0, f"exit code {code}, {last_words(training.log)}"


def finish(run, *flags, **options):
    """Trains to the end, in a process of its own."""
    succeeded(start(run, *flags, **options))


def undisturbed(run, steps, **options):
    """The case of a run that others are compared with."""
    options |= {"log": run.parent.with_suffix(".log")}
    train = partial(finish, run, "--train.steps", steps, **options)
    return f"undisturbed run of {steps} steps", train


def kill(training):
    """Ends a command as a machine that is switched off does."""
    training.process.kill()
    training.process.wait()


def text(log):
    """What a command has printed so far."""
    return log.read_bytes().decode(errors="replace") if log.exists() else ""


def last_words(log):
    return repr(text(log).strip()[-300:])


def begun_at(log):
    """The step at which a command says that it begins, once it does."""
    found = re.search(r"(?:going on from|starting at) step ([\d,]+)", text(log))
    return int(found[1].replace(",", "")) if found else None


def lines(run):
    """The whole lines of metrics.jsonl: without a last one that was cut off."""
    path = run / "metrics.jsonl"
    found = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in found]


def logged(run):
    return [line["step"] for line in lines(run)]


def steps_of(run):
    """The steps of the checkpoints of a run, whole or not."""
    found = (run / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def refused(training, name):
    """Checks that a command ended with an error that a person understands.

    Returns the first line of the message, which must name something.
    """
    code, printed, words = ended(training), text(training.log), last_words(training.log)
    assert code > 0, f"exit code {code}, {words}"
    # Threads that write arrays print this when the loop that they report to went first.
    foreign = printed.count("RuntimeError('Event loop is closed')")
    assert printed.count("Traceback") <= foreign, f"a traceback, {words}"
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert errors, f"no line 'error: ...', {words}"
    assert str(name) in errors[0], f"an error that does not name {name}: {errors}"
    return errors[0]


def state_of(run):
    """The sha256 of every leaf of the newest checkpoint, by its path; it verifies."""
    like = learning.state_shapes(runs.read_config(runs.Run(run)))
    sharding = parallel.replicated(parallel.make_mesh(1))
    with checkpoint.open_folder(run / "checkpoints", read_only=True) as folder:
        restored = checkpoint.restore(folder, like, sharding)
    assert not restored.skipped, f"{run.name}: skipped {restored.skipped}"
    step, newest = restored.step, steps_of(run)[-1]
    assert step == newest, f"{run.name}: checkpoint {step}, and {newest} is there"
    state = restored.state._replace(key=jax.random.key_data(restored.state.key))
    found = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in found}
    return {
        path: hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()
        for path, x in arrays.items()
    }


def same_state(run, other):
    """Checks that two runs ended in the same state, to the bit."""
    one, two = state_of(run), state_of(other)
    differing = sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))
    assert not differing, f"{len(differing)} leaves differ: {differing[:3]}"
    kinds = {path.split("[")[0].split(".")[1] for path in one}
    assert kinds >= {"step", "params", "averages", "opt_state", "key"}, kinds
    return f"{len(one)} leaves"


def same_files(run, other):
    """Checks that metrics.jsonl and the last grid of two runs have the same bytes."""
    files = [
        [each / "metrics.jsonl", max((each / "samples").glob("step_*.png"))]
        for each in (run, other)
    ]
    for mine, theirs in zip(*files, strict=True):
        assert mine.name == theirs.name
        assert mine.read_bytes() == theirs.read_bytes(), f"{mine.name} differs"
    return f"metrics.jsonl, {mine.name}"


def same_end(run, whole, steps):
    """Checks that a run ended as another one, to the bit, and has every step once."""
    found = same_state(run, whole), same_files(run, whole), every_step(run, steps)
    return ", ".join(found)


def every_step(run, last):
    """Checks that metrics.jsonl has every step once, in order."""
    steps = logged(run)
    wrong = sorted(set(range(1, last + 1)) ^ set(steps))[:5]
    said = f"{len(steps)} lines, missing or too many {wrong}"
    assert steps == list(range(1, last + 1)), said
    return f"{len(steps)} lines"
