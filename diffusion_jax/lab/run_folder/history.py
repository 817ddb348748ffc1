"""Logs a run: a line of metrics each train.log_every steps, and the skipped steps.

<run>/metrics.jsonl has, by step, the mean "loss" and "grad_norm" of the steps since the
line before that were not skipped; "loss_by_time", the loss of the examples in each
quarter of the times, from little noise to much, or of an autoencoder the terms of the
loss, "reconstruction" and "kl"; the "learning_rate" of the last of these steps; the
"held_out_loss" after the last step, where images are held out, and the
"self_consistency" of a network of few steps; how many were "skipped", and where some
were, how many by each of their "causes": what was not finite. It is the same, to the
byte, for two equal runs; what differs, the speed, is in <run>/speed.jsonl.
"""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.errors import DivergedError
from diffusion_jax.lab.process import hosts
from diffusion_jax.lab.process.progress import Progress
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.run_folder.board import Board
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.training.state import CAUSES

WATCHED = ("held_out_loss", "self_consistency")
"""What the last step of a line is measured by."""


class Log(NamedTuple):
    """What a run is logged with."""

    config: Config
    run: runs.Run
    shown: Progress
    """What is on the screen, and the steps skipped in a row."""
    pending: list[dict[str, Any]]
    """The metrics since the last line, a dictionary a step."""
    names: list[str]
    """Of the parameters, by which a gradient is named."""
    board: Board
    """Where the lines go for TensorBoard."""


def record(log: Log, step: int, metrics: dict[str, jax.Array]) -> None:
    """Adds the metrics of a step to the log; every log_every-th one writes a line.

    They are those of `state.make_step`, and join the log's `pending`.

    Raises:
      DivergedError: too many were skipped in a row to hope for a later one.
    """
    config, run, shown, pending, names, board = log
    values = {k: v.tolist() for k, v in jax.device_get(metrics).items()}
    cause, tensor = CAUSES[int(values.pop("cause"))], int(values.pop("tensor"))
    shown.update(step, None if cause else values["loss"], cause)
    pending.append({"skipped": 1.0, "cause": cause} if cause else values)
    if shown.row.total() >= config.train.max_skipped:
        found = cause == "gradient" and tensor >= 0
        first = f", at step {step} first the gradient of {names[tensor]}" * found
        raise DivergedError(
            "batch, loss, gradient and update must be finite at some steps; got none "
            f"in the last {shown.row.total()}, up to step {step}: not finite were "
            f"{in_words(shown.row)}{first}. The run has diverged: start another with "
            "--name NAME and a lower --optimizer.learning-rate; the last checkpoint is "
            f"in {run.checkpoints}."
        )
    if step % config.train.log_every:
        return
    line = summary(step, pending)
    pending.clear()
    if not hosts.first():
        return
    runs.append_line(run.metrics, line)
    if "self_consistency" in line and not step % config.train.checkpoint_every:
        shown.say(f"step {step:,}: self-consistency {line['self_consistency']:.3f}")
    speed = {"images_per_second": round(shown.rate, 1), "time": time.time()}
    held = {"checkpoint_seconds": round(shown.held, 3)}
    runs.append_line(run.speed, {"step": step, **speed, **held})
    board.line(line, speed)


def summary(step: int, pending: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the line of metrics.

    >>> summary(3, [{"loss": 2.0, "grad_norm": 1.0, "skipped": 0.0}] * 2)
    {'step': 3, 'loss': 2.0, 'grad_norm': 1.0, 'skipped': 0}
    >>> one = {"learning_rate": 0.5, "quarters": [[6.0, 1.0, 2.0, 0.0], [2, 1, 1, 0]]}
    >>> line = summary(3, [{"loss": 2.0, "grad_norm": 1.0, "skipped": 0.0, **one}])
    >>> line["learning_rate"], line["loss_by_time"]
    (0.5, [3.0, 1.0, 2.0, None])
    >>> summary(3, [{"skipped": 1.0, "cause": "loss"}])["causes"]
    {'loss': 1}
    """
    made, line = [p for p in pending if not p["skipped"]], dict[str, Any](step=step)
    for name in ("loss", "grad_norm"):
        line[name] = float(np.mean([p[name] for p in made])) if made else None
    line["skipped"] = len(pending) - len(made)
    known = [p for p in made if "quarters" in p]  # not of those an older version made
    if known:
        sums, counts = np.sum([p["quarters"] for p in known], axis=0)
        pairs = zip(sums.tolist(), counts.tolist(), strict=True)
        line["loss_by_time"] = [s / n if n else None for s, n in pairs]
    for name in ("reconstruction", "kl", "perceptual", "adversarial"):
        if made and name in made[-1]:
            line[name] = float(np.mean([p[name] for p in made]))
    if made and "learning_rate" in made[-1]:
        line["learning_rate"] = made[-1]["learning_rate"]
    line |= {name: pending[-1][name] for name in WATCHED if name in pending[-1]}
    causes = Counter(p["cause"] for p in pending if p["skipped"])
    return line | ({"causes": dict(sorted(causes.items()))} if causes else {})


def skipped(run: runs.Run) -> Counter[str]:
    """Returns how many steps of a run were skipped, by their causes."""
    found: Counter[str] = Counter()
    for line in runs.read_lines(run.metrics):
        found.update(line.get("causes", {}))
    return found


def score(config: Config, run: runs.Run, step: int) -> float | None:
    """Returns the mean of the logged losses between the checkpoint before and a step.

    By it the best checkpoint is known. It comes from what was logged, so a run that was
    stopped has the same. All hosts must call it alike.
    """
    since = step - max(config.train.checkpoint_every, config.train.log_every)
    lines = runs.read_lines(run.metrics) if hosts.first() else []
    losses = [line.get("loss") for line in lines if since < line["step"] <= step]
    known = [loss for loss in losses if loss is not None]
    # All hosts get the mean of the first, to the bit.
    mean = hosts.tell_number(np.mean(known) if known else np.nan)
    return None if np.isnan(mean) else mean


def in_words(causes: Mapping[str, int]) -> str:
    """Returns how many steps were skipped by which cause, the most frequent first.

    >>> in_words({"loss": 2, "gradient": 3})
    'gradient 3, loss 2'
    """
    counts = sorted(causes.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{cause} {count:,}" for cause, count in counts)
