"""Trains a network: `python -m experiments.train [EXPERIMENT] [--field value ...]`.

The same command again goes on where the run stopped.
"""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.evaluation import images
from diffusion_jax.training import checkpoint, compilation, data, feed, parallel
from diffusion_jax.training.state import TrainState
from experiments import (
    arguments,
    build,
    chains,
    hosts,
    initial,
    learning,
    runs,
    weights,
)
from experiments.config import Config, ConfigError, differences, to_dict
from experiments.progress import Progress

# Steps in a row without a finite loss, after which a run is given up.
MOST_SKIPPED = 20


class DivergedError(ConfigError):
    """A run whose loss is not finite any more."""


class Job(NamedTuple):
    """What stays the same from the first step of a command to its last."""

    config: Config
    run: runs.Run
    mesh: Any
    feed: feed.Feed
    manager: Any
    requested: list[int]
    """The signals that asked for the end."""
    started: float
    """When the command was started, by `time.monotonic`."""
    before: compilation.Programs
    """What had been compiled by then."""


def main(argv: Sequence[str]) -> int:
    """Trains as the arguments say; returns the exit code."""
    return train(arguments.parse(argv, prog="python -m experiments.train"))


def train(config: Config) -> int:
    """Trains, or goes on where the run stopped; returns the exit code.

    Raises:
      ConfigError: the folder holds another run, or this one diverged.
    """
    started, before = time.monotonic(), compilation.count()
    parallel.split_cpu(config.train.batch_size)  # before JAX looks for devices
    run = runs.of(config)
    check_hosts(config, run)
    check_same_run(config, run)
    parallel.persistent_cache(Path(config.output).resolve() / ".cache")
    mesh = parallel.make_mesh(config.train.devices, config.train.fsdp)
    parallel.check_batch_size(config.train.batch_size, mesh.size)
    learning.check(config, mesh)
    dataset = build.load_data(config)
    hosts.check_same("the images", f"{dataset.images.shape}")
    fed = feed_of(config, dataset, mesh)
    hosts.check_same("the input", fed.source)
    with checkpoint.open_folder(run.checkpoints, keep=config.train.keep) as manager:
        state, pending = start(config, run, mesh, manager)
        describe(config, run, mesh, dataset, fed, state)
        state = learning.as_trained(config, state)
        with stop_requests() as requested:
            job = Job(config, run, mesh, fed, manager, requested, started, before)
            state = loop(job, state, pending)
    return finish(job, state)


def check_hosts(config: Config, run: runs.Run) -> None:
    """Raises ConfigError where several hosts would not do the same."""
    if jax.process_count() > 1 and config.train.parallel == "pmap":
        raise ConfigError(
            "train.parallel must be mesh or shard_map on several hosts; got pmap. "
            "Change it with --train.parallel."
        )
    hosts.check_same("the configuration", repr(config))
    hosts.check_shared(run.folder)


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
    like = jax.eval_shape(lambda: learning.init_state(config))
    placed = parallel.state_sharding(like, mesh)
    if manager.latest_step() is None:
        state = first_state(config, placed)
        if hosts.first():
            runs.write_json(run.config, to_dict(config))
            for path in (run.metrics, run.speed):
                path.write_text("")
            weights.cut_snapshots(run, 0)
        return state, []
    state, meta = checkpoint.restore(manager, like, placed)
    if hosts.first():
        for path in (run.metrics, run.speed):
            runs.cut_lines(path, int(state.step))
        weights.cut_snapshots(run, int(state.step))
        runs.write_json(run.config, to_dict(config))
    return state, meta["pending"]


def first_state(config: Config, placed: Any) -> TrainState:
    """Returns the state before the first step, on the devices as its leaves say."""
    params = initial.params(config)
    if config.train.fsdp == 1:
        return parallel.place(learning.init_state(config, params), placed)
    # Made where it belongs: the whole may be more than one device holds.
    make = jax.jit(lambda p: learning.init_state(config, p), out_shardings=placed)
    return make(params)


def feed_of(config: Config, dataset: data.Dataset, mesh: Any) -> feed.Feed:
    """Returns where the batches of a run come from.

    Raises:
      ConfigError: from where they were asked for they cannot come.
    """
    plan = config.train
    try:
        return feed.make(
            dataset,
            mesh,
            seed=plan.seed,
            batch_size=plan.batch_size,
            labels=bool(config.net.classes),
            source=plan.input,
            strategy=plan.parallel,
        )
    except (ValueError, ImportError) as error:
        hint = "\nThe input is --train.input here."
        raise ConfigError(f"{error}{hint}") from error


def describe(
    config: Config,
    run: runs.Run,
    mesh: Any,
    dataset: data.Dataset,
    fed: feed.Feed,
    state: TrainState,
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
    print(f"input: {feed.describe(fed)}")
    if step >= last:
        print(f"the run is complete at step {step:,}")
    else:
        print(f"{'going on from' if step else 'starting at'} step {step:,} of {last:,}")


def loop(job: Job, state: TrainState, pending: list[dict[str, float]]) -> TrainState:
    """Returns the state after the last step, or after the one at which to stop.

    Args:
      job: what the run is made of.
      state: the state to go on from; it is used up.
      pending: the metrics that are not yet logged, a dictionary a step.
    """
    config, run, plan, sample = job.config, job.run, job.config.train, job.config.sample
    step_fn = learning.make_step(config, job.mesh, job.feed.stored)
    draw = chains.make_draw(config, sample.count, job.mesh)
    begin, last = int(state.step), min(plan.steps, plan.stop_at or plan.steps)
    shown = Progress(begin, plan.steps, plan.batch_size, hosts.screen())
    stops = hosts.make_stop(job.requested)
    waiting: list[tuple[int, Any]] = []
    with closing(job.feed.batches(begin, last)) as batches:
        for step, batch in enumerate(batches, begin):
            state, metrics = step_fn(state, batch)
            if step == begin:
                jax.block_until_ready(metrics)
                describe_first(job)
            waiting.append((step + 1, metrics))
            stop = stops(step + 1, step + 1 == last)
            saves = stop or (step + 1) % plan.checkpoint_every == 0
            draws = step + 1 == plan.steps or (step + 1) % sample.every == 0
            # Metrics are read one step late: reading those of this step would leave
            # the device idle while the host prepares the next batch.
            while len(waiting) > (0 if saves or draws else 1):
                record(config, run, shown, *waiting.pop(0), pending)
            snaps = weights.due(config, step + 1)
            if saves or draws or snaps:
                with shown.held_up():
                    whole = learning.as_stored(state)
                    if snaps:  # before the checkpoint: a run would go on without them
                        weights.save_snapshots(run, config, whole)
                    if saves:
                        meta = {"pending": [*pending]}
                        checkpoint.save(job.manager, step + 1, whole, meta)
                if draws:
                    write_grid(config, run, draw, whole)
                del whole
                shown.pause()
            if stop:
                break
    with shown.held_up():
        checkpoint.wait(job.manager)
    shown.close()
    if last > begin:
        print(f"checkpoints held the run up for {shown.held_up_for()}")
    return state


def describe_first(job: Job) -> None:
    """Prints how long the first step took to come, and what was compiled for it."""
    made = compilation.since(job.before)
    seconds = time.monotonic() - job.started
    print(f"first step after {seconds:.1f} s{made and f' ({made})'}", flush=True)


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
        if not hosts.first():
            return
        runs.append_line(run.metrics, line)
        speed = {"images_per_second": round(shown.rate, 1), "time": time.time()}
        held = {"checkpoint_seconds": round(shown.held, 3)}
        runs.append_line(run.speed, {"step": step, **speed, **held})


def write_grid(config: Config, run: runs.Run, draw: Any, state: TrainState) -> None:
    """Writes a grid of samples of the averaged weights, always from the same noise."""
    key = jax.random.key(config.train.seed)
    drawn = draw(parallel.whole(state.ema_params), key)
    if hosts.first():
        grid = images.grid(images.to_uint8(drawn))
        images.save(grid, grid_path(run, int(state.step)))


def grid_path(run: runs.Run, step: int) -> Path:
    """Returns where the grid of a step goes."""
    return run.samples / f"step_{step:08d}.png"


def finish(job: Job, state: TrainState) -> int:
    """Draws the loss, says where everything is, and returns the exit code."""
    config, run, requested = job.config, job.run, job.requested
    seconds = time.monotonic() - job.started
    step, again = int(state.step), "the same command goes on from here"
    lines = [line for line in runs.read_lines(run.metrics) if line["loss"] is not None]
    plot: object = "none, with no line in metrics.jsonl; see --train.log-every"
    if lines and hosts.first():
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
    arguments.guarded(main, several=True)
