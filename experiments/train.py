"""Trains a network: `python -m experiments.train [EXPERIMENT] [--field value ...]`.

The same command again goes on where the run stopped.
"""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.evaluation import images
from diffusion_jax.training import checkpoint, data, parallel
from diffusion_jax.training.state import TrainState
from experiments import arguments, build, chains, initial, learning, runs, weights
from experiments.config import Config, ConfigError, differences, to_dict
from experiments.progress import Progress

# Steps in a row without a finite loss, after which a run is given up.
MOST_SKIPPED = 20


class DivergedError(ConfigError):
    """A run whose loss is not finite any more."""


def main(argv: Sequence[str]) -> int:
    """Trains as the arguments say; returns the exit code."""
    return train(arguments.parse(argv, prog="python -m experiments.train"))


def train(config: Config) -> int:
    """Trains, or goes on where the run stopped; returns the exit code.

    Raises:
      ConfigError: the folder holds another run, or this one diverged.
    """
    started = time.monotonic()
    if jax.process_count() > 1:
        raise ConfigError(
            "training must be on one host, with any number of devices; got "
            f"{jax.process_count()} hosts. Only eval_fid works on several so far."
        )
    run = runs.of(config)
    check_same_run(config, run)
    parallel.persistent_cache(Path(config.output).resolve() / ".cache")
    mesh = parallel.make_mesh(config.train.devices)
    parallel.check_batch_size(config.train.batch_size, mesh.size)
    dataset = build.load_data(config)
    with checkpoint.open_folder(run.checkpoints, keep=config.train.keep) as manager:
        state, pending = start(config, run, mesh, manager)
        describe(config, run, mesh, dataset, state)
        with stop_requests() as requested:
            state = loop(
                config,
                run,
                mesh,
                dataset,
                manager,
                state,
                pending,
                requested,
                started,
            )
            checkpoint.wait(manager)
    return finish(config, run, state, requested, time.monotonic() - started)


def check_same_run(config: Config, run: runs.Run) -> None:
    """Raises ConfigError where the folder holds a run of another configuration."""
    if not run.config.exists() or not runs.has_checkpoint(run):
        return
    changed = differences(runs.read_config(run), config)
    if changed:
        raise ConfigError(
            f"the configuration must be that of the run in {run.folder}; got other "
            f"values for: {'; '.join(changed)}. Give the old values, or start another "
            "run with --name NAME."
        )


def start(config: Config, run: runs.Run, mesh: Any, manager: Any) -> Any:
    """Returns the state to go on from, and the metrics not yet logged, by step.

    The latest checkpoint where there is one, a fresh state otherwise.
    """
    replicated = parallel.replicated(mesh)
    if manager.latest_step() is None:
        first = learning.init_state(config, initial.params(config))
        runs.write_json(run.config, to_dict(config))
        for path in (run.metrics, run.speed):
            path.write_text("")
        weights.cut_snapshots(run, 0)
        return jax.device_put(first, replicated), []
    like = jax.eval_shape(lambda: learning.init_state(config))
    state, meta = checkpoint.restore(manager, like, replicated)
    for path in (run.metrics, run.speed):
        runs.cut_lines(path, int(state.step))
    weights.cut_snapshots(run, int(state.step))
    runs.write_json(run.config, to_dict(config))
    return state, meta["pending"]


def describe(
    config: Config, run: runs.Run, mesh: Any, dataset: data.Dataset, state: TrainState
) -> None:
    """Prints what is going to happen."""
    count = sum(x.size for x in jax.tree.leaves(state.params))
    shape = "x".join(str(n) for n in dataset.images.shape[1:])
    device = mesh.devices.flat[0].device_kind
    step, last = int(state.step), config.train.steps
    print(
        f"{config.name}: {len(dataset.images):,} images of {shape}, {count:,} weights"
    )
    strategy = config.train.parallel
    print(f"{mesh.size} x {device}, strategy {strategy}; all in {run.folder}/")
    if step >= last:
        print(f"the run is complete at step {step:,}")
    else:
        print(f"{'going on from' if step else 'starting at'} step {step:,} of {last:,}")


def loop(
    config: Config,
    run: runs.Run,
    mesh: Any,
    dataset: data.Dataset,
    manager: Any,
    state: TrainState,
    pending: list[dict[str, float]],
    requested: list[int],
    started: float,
) -> TrainState:
    """Returns the state after the last step, or after the one at which to stop."""
    plan, sample = config.train, config.sample
    step_fn = learning.make_step(config, mesh)
    draw = chains.make_draw(config, sample.count, mesh)
    begin, last = int(state.step), min(plan.steps, plan.stop_at or plan.steps)
    shown = Progress(begin, plan.steps, plan.batch_size)
    waiting: list[tuple[int, Any]] = []
    for step in range(begin, last):
        state, metrics = step_fn(state, batch_of(config, dataset, step))
        if step == begin:
            jax.block_until_ready(metrics)
            print(f"first step after {time.monotonic() - started:.1f} s", flush=True)
        waiting.append((step + 1, metrics))
        stop = step + 1 == last or bool(requested)
        saves = stop or (step + 1) % plan.checkpoint_every == 0
        draws = step + 1 == plan.steps or (step + 1) % sample.every == 0
        # Metrics are read one step late: reading those of this step would leave the
        # device idle while the host prepares the next batch.
        while len(waiting) > (0 if saves or draws else 1):
            record(config, run, shown, *waiting.pop(0), pending)
        snaps = weights.due(config, step + 1)
        if snaps:  # before the checkpoint, from which a run would go on without
            weights.save_snapshots(run, config, state)
        if saves:
            checkpoint.save(manager, step + 1, state, {"pending": [*pending]})
        if draws:
            write_grid(config, run, draw, state)
        if saves or draws or snaps:
            shown.pause()
        if stop:
            break
    shown.close()
    return state


def batch_of(config: Config, dataset: data.Dataset, step: int) -> dict[str, np.ndarray]:
    """Returns this host's share of the batch of a step: a function of both alone."""
    size = config.train.batch_size
    indices = data.batch_indices(config.train.seed, step, len(dataset.images), size)
    mine = data.host_slice(size, jax.process_index(), jax.process_count())
    batch = data.batch_at(dataset, indices[mine])
    if not config.net.classes:
        batch.pop("label", None)
    return {**batch, "position": np.arange(size, dtype=np.int32)[mine]}


def record(
    config: Config,
    run: runs.Run,
    shown: Progress,
    step: int,
    metrics: dict[str, jax.Array],
    pending: list[dict[str, float]],
) -> None:
    """Takes in the metrics of a step; every log_every-th one writes their mean.

    A step that was skipped, because loss or gradient was not finite, is counted; the
    means are of the others.

    Raises:
      DivergedError: so many in a row that no later one can be hoped for.
    """
    values = {name: float(value) for name, value in metrics.items()}
    shown.update(step, None if values["skipped"] else values["loss"])
    pending.append({"skipped": 1.0} if values["skipped"] else values)
    if shown.skipped >= MOST_SKIPPED:
        raise DivergedError(
            "loss and gradient must be finite at some steps; got none in the last "
            f"{MOST_SKIPPED}, up to step {step}: the run has diverged. Start another "
            "with --name NAME and a lower --optimizer.learning-rate; the last "
            f"checkpoint is in {run.checkpoints}."
        )
    if step % config.train.log_every == 0:
        made = [p for p in pending if not p["skipped"]]
        mean = {
            name: float(np.mean([p[name] for p in made])) if made else None
            for name in ("loss", "grad_norm")
        }
        line = {"step": step, **mean, "skipped": len(pending) - len(made)}
        pending.clear()
        runs.append_line(run.metrics, line)
        speed = {"images_per_second": round(shown.rate, 1), "time": time.time()}
        runs.append_line(run.speed, {"step": step, **speed})


def write_grid(config: Config, run: runs.Run, draw: Any, state: TrainState) -> None:
    """Writes a grid of samples of the averaged weights, always from the same noise."""
    key = jax.random.key(config.train.seed)
    grid = images.grid(images.to_uint8(draw(state.ema_params, key)))
    images.save(grid, grid_path(run, int(state.step)))


def grid_path(run: runs.Run, step: int) -> Path:
    """Returns where the grid of a step goes."""
    return run.samples / f"step_{step:08d}.png"


def finish(
    config: Config,
    run: runs.Run,
    state: TrainState,
    requested: list[int],
    seconds: float,
) -> int:
    """Draws the loss, says where everything is, and returns the exit code."""
    step, again = int(state.step), "the same command goes on from here"
    lines = [line for line in runs.read_lines(run.metrics) if line["loss"] is not None]
    plot: object = "none, with no line in metrics.jsonl; see --train.log-every"
    if lines:
        plot = images.curve(
            [line["step"] for line in lines],
            [line["loss"] for line in lines],
            title=f"{config.name}: training loss",
            ylabel=f"loss ({config.diffusion.loss})",
            path=run.folder / "loss.png",
        )
    if requested:
        print(f"stopped at step {step:,}; {again}")
        return 128 + requested[0]
    if step < config.train.steps:
        print(f"stopped at step {step:,} as asked; without --train.stop-at {again}")
        return 0
    skipped = sum(line["skipped"] for line in runs.read_lines(run.metrics))
    if skipped:
        print(f"{skipped:,} steps were skipped: their loss was not finite")
    minutes, left = divmod(round(seconds), 60)
    print(
        f"done: step {step:,}, {minutes} min {left} s since the start of this command"
    )
    print(f"  samples      {grid_path(run, step)}")
    print(f"  loss         {plot}")
    print(f"  metrics      {run.metrics}")
    print(f"  checkpoints  {run.checkpoints}/")
    print(f"more samples: python -m experiments.sample {run.folder}")
    return 0


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Gives a list that a first SIGINT or SIGTERM is noted in; a second one kills."""
    requested: list[int] = []

    def note(number: int, frame: Any) -> None:
        requested.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this step, with a checkpoint", file=sys.stderr)

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, note) for kind in kinds]
    try:
        yield requested
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


if __name__ == "__main__":
    arguments.guarded(main)
