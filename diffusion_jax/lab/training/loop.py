"""Training: steps, logs, checkpoints, grids, and the end."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.data import datasets
from diffusion_jax.errors import MissingError, counted, first_of
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.measure import reference
from diffusion_jax.lab.process import hosts, stopping
from diffusion_jax.lab.process.progress import Progress
from diffusion_jax.lab.run_folder import board, history, lock, results, runs
from diffusion_jax.lab.schema import checks, latents
from diffusion_jax.lab.schema.config import Config, warmup, with_epochs
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.training import beginning, encoding, initial, measuring
from diffusion_jax.lab.wiring import build, chains, learning
from diffusion_jax.storage import trees
from diffusion_jax.training import compilation, feed, flat, parallel
from diffusion_jax.training.state import TrainState


class Job(NamedTuple):
    """What stays the same while a command trains."""

    config: Config
    run: runs.Run
    mesh: Any
    feed: feed.Feed
    step: parallel.Step
    manager: Any
    draw: Callable[..., np.ndarray]
    """What draws the images of a grid, as `measuring.make_draw` returns it."""
    ruler: reference.Ruler | None
    """What samples are measured with in training, if they are."""
    watched: dict[str, Callable[[Any], jax.Array]]
    """What is logged beside the loss, as functions of the state: "held_out_loss" where
    images are held out, "self_consistency" of networks of few steps."""
    signals: stopping.Requests
    """The signals that asked to stop."""
    start: tuple[float, compilation.Programs]
    """When the command began, by `time.monotonic`, and what was compiled before."""


def train(
    config: Config,
    *,
    strict: bool = False,
    force: bool = False,
    dataset: datasets.Dataset | None = None,
    signals: Callable[[], AbstractContextManager[stopping.Requests]] | None = None,
) -> int:
    """Trains, or resumes where the run stopped; returns the exit code.

    With `strict` the newest checkpoint must verify, otherwise the newest that does is
    taken; with `force` the run may resume with another configuration. The data set
    stands in place of the one that is named there; `signals` is a context that handles
    them, `stopping.requests` when not given.

    Raises:
      CheckpointError: there are checkpoints, and none can be resumed from.
      ConfigError: the folder holds another run, or this one diverged.
    """
    start = time.monotonic(), compilation.count()
    config = encoding.resolved(config)
    checks.validate(config)
    board.check(config)
    if config.train.deterministic:
        compilation.ask()
    parallel.split_cpu(config.train.batch_size)  # both before JAX looks for devices
    run = runs.of(config)
    with (signals or stopping.requests)() as requests, lock.hold(run.folder):
        if hosts.first():
            runs.remove_partials(run)
        parts = None
        if config.train.epochs is not None:
            parts = build.load_parts(config, dataset)
            config = with_epochs(config, len(parts[0].images))
            checks.validate(config)
        beginning.check(config, run, force=force)
        parallel.persistent_cache(Path(config.output).resolve() / ".cache")
        mesh = parallel.make_mesh(config.train.devices, config.train.fsdp)
        parallel.check_batch_size(config.train.batch_size, mesh.size)
        images, held = parts or build.load_parts(config, dataset)
        hosts.check_same("the images", f"{images.images.shape}")
        if note := beginning.few_images(config, len(images.images)):
            hosts.say(note)
        own = encoding.begin(config, run, images.images)
        dataset = encoding.latent_set(config, own, images)
        held = held and encoding.latent_set(config, own, held)
        fed = beginning.feed_of(config, dataset, mesh)
        hosts.check_same("the input", fed.source)
        step, plan = learning.make_step(config, mesh, fed.stored), config.train
        steps = checkpoint.steps(run.checkpoints)
        newest = hosts.tell(max(steps, default=-1))
        params = initial.params(config) if newest < 0 else None
        judge = measuring.judge(config, images) if newest < 0 else None
        busy: AbstractContextManager[None] = nullcontext()
        ruler = measuring.make(config, images) if newest < plan.steps else None
        if newest < plan.steps:
            runs.check_room(run, learning.state_shapes(config), len(steps), plan.keep)
            busy = beginning.compiling(step, fed, config, mesh)
        describe(config, run, mesh, images, fed, held)
        with ExitStack() as left:
            with busy:
                folder = checkpoint.open_folder(
                    run.checkpoints, keep=plan.keep, keep_every=plan.keep_every
                )
                manager = left.enter_context(folder)
                manager.keep.scores |= measuring.scores(config, run, steps)
                begun = beginning.start(
                    config, run, mesh, manager, params, judge, strict=strict
                )
            describe_start(config, int(begun.state.step), len(dataset.images))
            begun = begun._replace(state=learning.as_trained(config, begun.state, mesh))
            looks = measuring.make_draw(config, mesh, held or dataset, own), ruler
            watched = measuring.watched(config, mesh, held)
            job = Job(
                config, run, mesh, fed, step, manager, *looks, watched, requests, start
            )
            state = loop(job, begun)
        return finish(job, state)


def describe(
    config: Config,
    run: runs.Run,
    mesh: Any,
    dataset: datasets.Dataset,
    fed: feed.Feed,
    held: datasets.Dataset | None,
) -> None:
    """Prints the data, the network, the devices and the folder of a run."""
    count = sum(x.size for x in jax.tree.leaves(learning.state_shapes(config).params))
    shape = "x".join(str(n) for n in dataset.images.shape[1:])
    device = mesh.devices.flat[0].device_kind
    own = config.autoencoder.kind if latents.is_autoencoder(config) else ""
    if not own and (left := beginning.signal_left(config)):
        print(left)
    print(
        f"{config.name}: {counted(len(dataset.images), 'image')} of {shape}, "
        f"{counted(count, 'weight')}{own and f' of an autoencoder ({own})'}"
        f"{'' if held is None else f'; {len(held.images):,} more are held out'}"
    )
    if dataset.classes:
        each = [f"{place} {name}" for place, name in enumerate(dataset.classes)]
        print(f"classes: {first_of(each, 20)}")
    strategy = config.train.parallel
    print(f"{mesh.size} x {device}, strategy {strategy}; all in {run.folder}/")
    print(f"input: {feed.describe(fed)}")


def describe_start(config: Config, step: int, images: int) -> None:
    """Prints the step that training starts at, or that the run is complete."""
    last, rises = config.train.steps, warmup(config)
    if step >= last:
        print(f"the run is complete at step {step:,}")
        return
    begins = "going on from" if step else "starting at"
    epochs = last * config.train.batch_size / images
    if rises < config.optimizer.warmup:
        asked = config.optimizer.warmup
        print(f"a short run: its warm-up is {counted(rises, 'step')}, not {asked:,}")
    said = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"
    print(f"{begins} step {step:,} of {last:,}, {said} epochs in all", flush=True)


def loop(job: Job, begun: beginning.Begun) -> TrainState:
    """Returns the state after the last step, or after the one at which to stop.

    The state of `begun` is donated.
    """
    config, run, plan, sample = job.config, job.run, job.config.train, job.config.sample
    state = begun.state
    draw = job.draw
    begin, last = int(state.step), beginning.end_of(config)
    shown = Progress(begin, plan.steps, plan.batch_size, hosts.screen(), begun.row)
    names = list(trees.by_path(jax.eval_shape(flat.unpack_all, state.params)))
    stops = hosts.make_stop(job.signals.numbers)
    waiting: list[tuple[int, Any]] = []
    # A run may have been killed between a checkpoint and its grid.
    drawn = not begin or not has_grid(config, begin) or grid_path(run, begin).exists()
    if not hosts.tell(drawn):
        write_grid(config, run, draw, learning.as_stored(state, job.mesh))
    with ExitStack() as left:
        events = left.enter_context(board.opened(config, run, begin))
        log = history.Log(config, run, shown, begun.pending, names, events)
        batches = left.enter_context(closing(job.feed.batches(begin, last)))
        for step, batch in enumerate(batches, begin):
            state, metrics = job.step(state, batch)
            if step == begin:
                jax.block_until_ready(metrics)
                describe_first(job)
                job.signals.note()
            if (step + 1) % plan.log_every == 0:
                metrics |= {name: of(state) for name, of in job.watched.items()}
            waiting.append((step + 1, metrics))
            stop = stops(step + 1, step + 1 == last)
            saves = stop or (step + 1) % plan.checkpoint_every == 0
            draws = has_grid(config, step + 1)
            # Metrics are read one step late: reading those of this step would leave
            # the device idle while the host prepares the next batch.
            while len(waiting) > (0 if saves or draws else 1):
                history.record(log, *waiting.pop(0))
            snaps = weights.due(config, step + 1)
            if (step + 1) % plan.log_every == 0:
                checkpoint.check(job.manager)
            if saves or draws or snaps:
                with shown.held_up():
                    whole = learning.as_stored(state, job.mesh)
                    if snaps:  # before the checkpoint: a run would go on without them
                        weights.save_snapshots(run, config, whole)
                if saves:
                    save(job, log, whole, score_of(job, log, draw, whole))
                if draws:
                    shown.doing(f"drawing {counted(sample.count, 'image')}")
                    write_grid(config, run, draw, whole)
                    events.picture(step + 1, grid_path(run, step + 1))
                del whole
                shown.pause()
            if stop:
                break
    with shown.held_up():
        checkpoint.wait(job.manager)
    job.signals.done()
    shown.close()
    if last > begin:
        print(f"time spent on checkpoints: {shown.held_up_for()}")
    return state


def save(job: Job, log: history.Log, state: TrainState, score: float | None) -> None:
    """Writes a checkpoint in the background, once the log before it is on the disk."""
    with log.shown.held_up():
        meta = {"pending": [*log.pending], "row": dict(log.shown.row)}
        runs.to_disk(job.run)
        checkpoint.save(job.manager, int(state.step), state, meta, score=score)


def score_of(job: Job, log: history.Log, draw: Any, state: TrainState) -> float | None:
    """Returns the score of a checkpoint, by which the best one is kept.

    That is the distance of samples, where the run is measured at this step; the logged
    loss in a run that is never measured.
    """
    config, run, step = job.config, job.run, int(state.step)
    shown = log.shown
    if job.ruler is None:
        return history.score(config, run, step)
    if not measuring.due(config, step):
        return None
    shown.doing(f"measuring {counted(config.train.measure_count, 'sample')}")
    drawable = chains.Drawable(parallel.whole(state.ema_params))
    value = measuring.measure(job.ruler, config, run, draw, drawable, step)
    if hosts.first():
        shown.say(f"step {step:,}: {job.ruler.name} {value:.4g}")
        log.board.scalar("distance", step, value)
    return value if np.isfinite(value) else None


def describe_first(job: Job) -> None:
    """Prints the time to the first step, and what was compiled for it."""
    began, before = job.start
    seconds, made = time.monotonic() - began, compilation.since(before)
    print(f"first step after {seconds:.1f} s{made and f' ({made})'}", flush=True)


def has_grid(config: Config, step: int) -> bool:
    """Returns whether samples are drawn after this many updates."""
    return step == config.train.steps or step % config.sample.every == 0


def write_grid(config: Config, run: runs.Run, draw: Any, state: TrainState) -> None:
    """Writes a grid by the averaged weights (EMA), of samples always of the same noise.

    Of an autoencoder it is of images, each with its reconstruction at the right.
    """
    key = jax.random.key(config.train.seed)
    drawn = draw(chains.Drawable(parallel.whole(state.ema_params)), key)
    if hosts.first():
        picture = measuring.picture(config, pictures.to_uint8(drawn))
        pictures.save(picture, grid_path(run, int(state.step)))


def grid_path(run: runs.Run, step: int) -> Path:
    """Returns the path of a step's grid."""
    return run.samples / f"step_{step:08d}.png"


def draw_loss(config: Config, run: runs.Run, lines: list[dict[str, Any]]) -> object:
    """Plots the logged loss; returns the path, or why there is no plot."""
    try:
        return pictures.curve(
            [line["step"] for line in lines],
            [line["loss"] for line in lines],
            title=f"{config.name}: training loss",
            ylabel=f"loss ({measuring.loss_name(config)})",
            path=run.folder / "loss.png",
        )
    except MissingError as error:  # a plot is no reason to fail
        return f"none: {error}"


def finish(job: Job, state: TrainState) -> int:
    """Plots the loss, prints where everything is, and returns the exit code."""
    config, run, requested = job.config, job.run, job.signals.numbers
    seconds = time.monotonic() - job.start[0]
    step, again = int(state.step), "the same command goes on from here"
    logged = runs.read_lines(run.metrics)
    lines = [line for line in logged if line.get("loss") is not None]
    plot: object = "none, with no line in metrics.jsonl; see train.log_every"
    if lines and hosts.first():
        plot = draw_loss(config, run, lines)
    if requested and step < config.train.steps:
        print(f"stopped at step {step:,}; {again}")
        return stopping.CODE + requested[0]
    if step < config.train.steps:
        print(f"stopped at step {step:,}, train.stop_at; without that {again}")
        return 0
    skipped = history.skipped(run)
    if skipped:
        were = "was" if skipped.total() == 1 else "were"
        count = counted(skipped.total(), "step")
        print(
            f"{count} {were} skipped; what was not finite: {history.in_words(skipped)}"
        )
    minutes, left = divmod(round(seconds), 60)
    print(
        f"done: step {step:,}, {minutes} min {left} s since the start of this command"
    )
    print(f"  {measuring.what(config):<13}{grid_path(run, step)}")
    print(f"  loss         {plot}")
    print(f"  metrics      {run.metrics}")
    print(f"  checkpoints  {run.checkpoints}/")
    if job.ruler is not None:
        found = results.in_training(run)
        best = min(found, key=lambda at: found[at])
        said = f"{found[step]:.4g} now, {found[best]:.4g} at step {best:,}"
        print(f"  {job.ruler.name:<12} {said}, the lowest, whose checkpoint stays")
    again = "evaluate it: python -m experiments.eval_autoencoder"
    if not latents.is_autoencoder(config):
        again = "more samples: python -m experiments.sample"
    print(f"{again} {run.folder}")
    return 0
