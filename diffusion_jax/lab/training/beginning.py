"""Starts or resumes a run: its checks, its first state, the compiled step."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax import schedule
from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import flags, hosts, progress
from diffusion_jax.lab.run_folder import changes, runs
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config, changed, differences, to_dict
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.training import initial
from diffusion_jax.lab.wiring import build, chains, few_steps, learning
from diffusion_jax.storage import trees
from diffusion_jax.training import feed, flat, parallel
from diffusion_jax.training.state import TrainState

MOST_LEFT = 0.01
"""alpha_bar at T that needs no note. The paper's is 4e-5."""


class Begun(NamedTuple):
    """A state to train on from, and what is still to be logged."""

    state: TrainState
    pending: list[dict[str, Any]]
    """The metrics that are not yet logged, a dictionary a step."""
    row: dict[str, int]
    """How many of the last steps were skipped in a row, by cause."""


def check(config: Config, run: runs.Run, *, force: bool) -> None:
    """Raises ConfigError where a run cannot go on, or would end at its first grid."""
    check_hosts(config, run)
    check_same_run(config, run, force=force)
    if not latents.is_autoencoder(config):
        chains.make_grid(config)


def check_hosts(config: Config, run: runs.Run) -> None:
    """Raises ConfigError where several hosts cannot train this run together."""
    if jax.process_count() > 1 and config.train.parallel == "pmap":
        raise ConfigError(
            "train.parallel must be mesh or shard_map on several hosts; got pmap. "
            "Change it with --train.parallel."
        )
    hosts.check_same("the configuration", repr(config))
    hosts.check_shared(run.folder)


def check_same_run(config: Config, run: runs.Run, *, force: bool = False) -> None:
    """Raises ConfigError where the folder holds a run of another configuration.

    With force it prints what differs instead.
    """
    if not runs.has_checkpoint(run):
        return
    old = "the old values"
    if not run.config.exists():
        said = [f"{run.config} is not there"]
    else:
        try:
            known = runs.read_config(run)
            said = differences(known, config)
            fields = changed(known, config)
            fields.pop("train.steps", None)
            typed = flags.typed({key: was for key, (was, _) in fields.items()})
            old += f" ({typed})" * bool(typed)
        except ConfigError:
            if not force:
                raise
            said = [f"{run.config} is damaged"]
    if said and force:
        hosts.say(f"other values than before: {'; '.join(said)}")
    elif said:
        raise ConfigError(
            f"the configuration must be that of the run in {run.folder}; got other "
            f"values for: {'; '.join(said)}. Give {old}, start another run with "
            "--name NAME, or go on with these by --force."
        )


def signal_left(config: Config) -> str:
    """Returns a note where x_T still shows the image; else nothing.

    Chains start from pure noise, so what is left of the image at T is lost to them.
    """
    diffusion = config.diffusion
    logsnr = np.asarray(schedule.tables(chains.known_chain(config))[1], np.float64)
    left = 1 / (1 + np.exp(-logsnr[-1]))
    if left < MOST_LEFT:
        return ""
    said = (
        f"note: schedule {diffusion.schedule} leaves {left:.2f} of x_T to the image "
        f"(alpha_bar) at T = {diffusion.num_steps}, and chains begin in noise alone."
    )
    fits = diffusion.beta_end * 1000 / diffusion.num_steps
    if diffusion.schedule == "linear" and fits < 1:
        return f"{said} --diffusion.beta-end {fits:.3g} fits (0.02 is of T = 1000)."
    return f"{said} The schedule cosine ends in noise for every T."


def few_images(config: Config, images: int) -> str:
    """Returns a note where there are fewer images than a batch has; else nothing."""
    size = config.train.batch_size
    if images >= size:
        return ""
    what = f"{images:,} images are" if images > 1 else "one image is"
    return (
        f"note: {what} fewer than a batch of {size:,} (train.batch_size): each step "
        f"sees every image about {size / images:.3g} times, and the network will learn "
        "them by heart. Give more images, or a smaller batch."
    )


def start(
    config: Config,
    run: runs.Run,
    mesh: Any,
    folder: checkpoint.Folder,
    params: Any = None,
    judge: Any = None,
    *,
    strict: bool = False,
) -> Begun:
    """Returns the newest checkpoint that verifies, or a fresh state without any.

    Newer checkpoints, which are damaged, are set aside. `params` are of
    `initial.params`, where it has been called already, `judge` of `measuring.judge`.
    With `strict` the newest checkpoint must verify.
    """
    if not folder.steps():
        params = initial.params(config) if params is None else params
        state = first_state(config, mesh, params)
        if judge is not None:
            placed = parallel.state_sharding(judge, mesh)
            memory = state.memory._replace(judge=parallel.place(judge, placed))
            state = state._replace(memory=memory)
        if hosts.first():
            run.changes.unlink(missing_ok=True)
            runs.write_json(run.config, to_dict(config))
            if few_steps.has_teacher(config):
                digest = trees.digest(params)
                told = {"teacher": config.init_from, "sha256": digest}
                runs.write_json(run.folder / "teacher.json", told)
            for path in (run.metrics, run.speed):
                with runs.naming(path):
                    path.write_text("")
            weights.cut_snapshots(run, 0)
        return Begun(state, [], {})
    like = learning.state_shapes(config)
    placed = parallel.state_sharding(like, mesh)
    found = checkpoint.restore(folder, like, placed, strict=strict)
    weights.describe_skipped(run, found)
    for path in checkpoint.set_aside(folder, found.skipped):
        hosts.say(f"set aside as {path}, which may be deleted")
    if hosts.first():
        for path in (run.metrics, run.speed):
            runs.cut_lines(path, found.step)
        weights.cut_snapshots(run, found.step)
        record(config, run, found.step)
    return Begun(found.state, found.meta["pending"], found.meta.get("row", {}))


def end_of(config: Config) -> int:
    """Returns the step after which training ends, or stops."""
    plan = config.train
    return min(plan.steps, plan.stop_at or plan.steps)


def record(config: Config, run: runs.Run, step: int) -> None:
    """Records the configuration that a run resumes with, and prints what it changes.

    Where no step is left to make, the run keeps its configuration.
    """
    try:
        known = runs.read_config(run)
    except ConfigError:  # damaged, and allowed by force
        return changes.record(run, config, step)
    if step >= end_of(config):
        name, output = config.name, config.output  # it may have been moved
        if dataclasses.replace(known, name=name, output=output) != config:
            hosts.say("no step is left to make: the run's configuration stays as it is")
        return None
    ends = known.train.steps, config.train.steps
    if known.optimizer.decay == config.optimizer.decay == "cosine" and len({*ends}) > 1:
        was, now = (float(learning.rate(c)(step)) for c in (known, config))
        hosts.say(
            "note: the learning rate falls to 0 at the last step, which was "
            f"{ends[0]:,} and is {ends[1]:,}: at step {step:,} it goes from {was:.3g} "
            f"to {now:.3g}"
        )
    return changes.record(run, config, step)


def state_like(config: Config, mesh: Any) -> TrainState:
    """Returns the shapes of `first_state` with their shardings."""
    like = learning.state_shapes(config, packed=True)
    state: TrainState = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        like,
        parallel.state_sharding(like, mesh),
    )
    return state


@contextmanager
def compiling(
    step: parallel.Step, fed: feed.Feed, config: Config, mesh: Any
) -> Iterator[None]:
    """Compiles the training step in a thread while the body runs."""
    kept = Path(config.output) / ".cache"
    print(
        "compiling the training step: seconds to minutes; the program is kept in "
        f"{kept}/ for the next start",
        flush=True,
    )
    state = state_like(config, mesh)
    with closing(fed.batches(0, 1)) as batches:
        batch = next(batches)
    # XLA compiles without the interpreter's lock.
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(step.compile, state, batch)
        yield
        with progress.clock("compiling", shown=hosts.first()):
            compiled.result()


def first_state(config: Config, mesh: Any, params: Any = None) -> TrainState:
    """Returns the state before the first step, packed, on the devices of a mesh.

    The parameters are from the seed where none are given.
    """
    like = learning.state_shapes(config, packed=True)
    placed = parallel.state_sharding(like, mesh)
    key = jax.random.key(config.train.seed)
    if params is None:
        params = build.init_params(config, jax.random.split(key)[0])
    # Packed on the host, then spread: one device may not hold all of it.
    vector = parallel.place(flat.pack(params, config.train.fsdp), placed.params)
    make = jax.jit(partial(learning.init_state, config), out_shardings=placed)
    state: TrainState = make(vector, key)
    return state


def feed_of(config: Config, dataset: datasets.Dataset, mesh: Any) -> feed.Feed:
    """Returns the source of a run's batches.

    Raises:
      ConfigError: train.input cannot be had.
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
