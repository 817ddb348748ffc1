"""Loads trained weights: the last ones, or a moving average (EMA) of them.

A run's checkpoint holds the last weights and the averages that were tracked. A
power-function average of any other length is reconstructed from snapshots of the
tracked ones, which <run>/averages/ has of every optimizer.ema_snapshots steps:
<step>_<index>.safetensors, where index counts optimizer.ema_lengths.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.network_files import networks
from diffusion_jax.lab.process import hosts, progress
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import learning
from diffusion_jax.training import averages, parallel
from diffusion_jax.training.state import TrainState

LARGEST_ERROR = 0.1
"""Of a reconstructed average, as a share of its distance from the last weights."""


def load(config: Config, run: runs.Run, which: Weights) -> tuple[Any, int | None, str]:
    """Returns the weights of a run, their training step, and their name.

    The name is such as "averaged", "last" or "averaged (length 0.08)"; the step of a
    network in a file may be None, for unknown.

    The run is a folder of checkpoints and snapshots, or a network in a file.

    Raises:
      CheckpointError: there is no such checkpoint.
      ConfigError: no such average was tracked or can be reconstructed; or a network in
        a file has no such weights.
      ValueError: a snapshot or the file is damaged.
    """
    check_alone(run, which)
    if run.network is not None:
        network = networks.read(run.network, average=not which.raw)
        return _on_all(network.params), network.about.step, network.about.weights
    index = _tracked(config, which)
    like, mesh = learning.state_shapes(config), parallel.make_mesh()
    if config.train.fsdp > 1:  # one device may not hold all of it
        mesh = parallel.make_mesh(fsdp=mesh.size)
    placed = parallel.state_sharding(like, mesh)
    with (
        checkpoint.open_folder(run.checkpoints, read_only=True) as folder,
        progress.clock("reading the checkpoint", shown=hosts.first()),
    ):
        found = checkpoint.restore(
            folder, like, placed, which.step, strict=which.strict
        )
    describe_skipped(run, found)
    state, step = found.state, found.step
    if which.raw:
        chosen, words = state.params, "last"
    elif which.average is None:
        chosen, words = state.averages[0], "averaged"
    elif index is not None:
        name = "decay" if index < len(config.optimizer.ema_decay) else "length"
        chosen, words = state.averages[index], f"averaged ({name} {which.average:g})"
    else:
        chosen = _reconstruct(config, run, state, which.average)
        words = f"averaged (length {which.average:g})"
    return _on_all(chosen), step, words


def _on_all(params: Any) -> Any:
    everywhere = parallel.replicated(parallel.make_mesh())
    return parallel.place(params, jax.tree.map(lambda _: everywhere, params))


def check_alone(run: runs.Run, which: Weights) -> None:
    """Raises ConfigError where a network in a file has no such choice of weights."""
    official = run.network is not None and run.network.kind == "official"
    fits = Weights(raw=which.raw and official, strict=which.strict)
    if run.network is not None and which != fits:
        raise ConfigError(
            "raw, average and step must be left out with a network in a file, which "
            f"has one set of weights; got {flags(which)}. Choose when you convert a "
            "run: python -m experiments.convert RUN OUT --raw."
        )


def flags(which: Weights) -> str:
    """Returns the choice of weights as flags.

    >>> flags(Weights(raw=True, step=0))
    '--raw --step 0'
    """
    said = ["--raw"] * which.raw + ["--strict"] * which.strict
    for name in ("average", "step"):
        value = getattr(which, name)
        said += [] if value is None else [f"--{name} {value}"]
    return " ".join(said)


def describe(words: str, step: int | None) -> str:
    """Returns the name and the step that `load` returned, in words.

    >>> describe("averaged", 5000), describe("released", None)
    ('averaged weights of step 5,000', 'released weights')
    """
    return f"{words} weights" + ("" if step is None else f" of step {step:,}")


def describe_skipped(run: runs.Run, found: checkpoint.Restored) -> None:
    """Prints on stderr which checkpoints were skipped as damaged, and why."""
    for step, why in found.skipped:
        hosts.say(
            f"note: checkpoint {run.checkpoints / str(step)} is damaged ({why}); step "
            f"{found.step:,} is used in its place"
        )


def due(config: Config, step: int) -> bool:
    """Returns whether to save snapshots after this many updates.

    The last step needs none: its checkpoint holds the tracked averages.
    """
    every = config.optimizer.ema_snapshots
    return every > 0 and bool(config.optimizer.ema_lengths) and step % every == 0


def save_snapshots(run: runs.Run, config: Config, state: TrainState) -> list[Path]:
    """Writes the tracked power-function averages; returns the files.

    Files of the same step are replaced: a resumed run writes the same values again.
    """
    lengths = config.optimizer.ema_lengths
    tracked = parallel.whole(state.averages[len(config.optimizer.ema_decay) :])
    step = int(state.step)
    if jax.process_index():
        return []  # the first host writes for all
    folder = run.folder / "averages"
    return [
        averages.save(folder / f"{step:08d}_{i}.safetensors", tree, step, length)
        for i, (length, tree) in enumerate(zip(lengths, tracked, strict=True))
    ]


def cut_snapshots(run: runs.Run, last_step: int) -> None:
    """Deletes the snapshots after a step, which a resumed run writes again."""
    for path in _files(run):
        if int(path.name.partition("_")[0]) > last_step:
            path.unlink()


def _tracked(config: Config, which: Weights) -> int | None:
    """Returns the index of the average in the state; None for one to reconstruct.

    Raises:
      ConfigError: it was not tracked and cannot be reconstructed.
    """
    decays, lengths = config.optimizer.ema_decay, config.optimizer.ema_lengths
    value = which.average
    if value is None:
        return 0
    if which.raw:
        raise ConfigError(
            f"raw must stand alone; got --average {value:g} as well. Choose the last "
            "weights or an average."
        )
    if value in (*decays, *lengths):
        return (*decays, *lengths).index(value)
    if lengths and 0 < value <= averages.LONGEST:
        return None
    tracked = ", ".join(f"{decay:g}" for decay in decays) or "no decay"
    made = f"a length of at most {averages.LONGEST}" if lengths else "no length"
    more = "" if lengths else ", or train with --optimizer.ema-lengths 0.05 0.1"
    raise ConfigError(
        f"average must be one that this run tracked or that can be made of its "
        f"snapshots: {tracked}, {made}; got {value:g}. Choose one of these{more}."
    )


def _reconstruct(
    config: Config, run: runs.Run, state: TrainState, length: float
) -> Any:
    """Returns the average of a length, from the snapshots up to the state's step."""
    step = int(state.step)
    found = {path: averages.header(path) for path in _files(run)}
    before = {path: about for path, about in found.items() if about.step < step}
    lengths = config.optimizer.ema_lengths
    known = [*before.values(), *(averages.Snapshot(step, one) for one in lengths)]
    factors = averages.solve(known, step, length)
    error = averages.expected_error(known, factors, step, length)
    if error > LARGEST_ERROR:
        raise ConfigError(
            f"the snapshots in {run.folder / 'averages'} must give the average of "
            f"length {length:g} within {LARGEST_ERROR:.0%} of its distance from the "
            f"last weights; got {error:.0%} with {len(before)} before step {step:,}. "
            f"Use {' or '.join(f'{one:g}' for one in lengths)}, which the run "
            "tracked, or train with --optimizer.ema-snapshots a 16th of the steps."
        )

    def trees() -> Iterator[Any]:
        for path in before:
            yield averages.load(path, state.params)
        for tree in state.averages[len(config.optimizer.ema_decay) :]:
            yield parallel.whole(tree)

    return averages.reconstruct(trees(), list(factors))


def _files(run: runs.Run) -> list[Path]:
    """Returns the snapshots of a run, in the order of their steps."""
    files = (run.folder / "averages").glob("*.safetensors")
    ours = [path for path in files if re.fullmatch(r"\d+_\d+", path.stem)]
    return sorted(ours, key=lambda path: [int(n) for n in path.stem.split("_")])
