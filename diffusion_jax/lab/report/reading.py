"""Reads all that is known of a run, also of one that is damaged or half written."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.errors import ConfigError, first_of
from diffusion_jax.lab.run_folder import results, runs
from diffusion_jax.lab.schema import json_fields
from diffusion_jax.lab.schema.config import Config

Read = TypeVar("Read")
Points = list[tuple[float, float]]

DISTANCES = ("FID", "fd_")
"""How the names of distances begin, the lowest of which is the best."""


class Distance(NamedTuple):
    """How far samples are from the images, as it was measured once."""

    name: str
    """Such as "FID@2500 vs train"."""
    value: float
    step: int | None


class Story(NamedTuple):
    """What is known of a run."""

    run: runs.Run
    config: Config | None
    """None where it cannot be read."""
    metrics: list[dict[str, Any]]
    speed: list[dict[str, Any]]
    """The lines of both files, with their steps."""
    results: dict[str, dict[str, Any]]
    """The newest of each kind by name: fid, nll_train, samplers, legibility, ..."""
    measured: list[Distance]
    """Every distance of averaged weights, the oldest first."""
    step: int
    """Updates made: of the newest checkpoint, or logged since."""
    size: int
    """Bytes of all files."""
    changed: float
    """When it last grew, in seconds since 1970."""
    wrong: tuple[str, ...]
    """What is damaged or missing, in words."""

    @property
    def name(self) -> str:
        """Returns the name of the run."""
        return self.run.folder.resolve().name

    def points(self, of: str, lines: list[dict[str, Any]] | None = None) -> Points:
        """Returns (step, value) of a metric, without what is no finite number."""
        found = self.metrics if lines is None else lines
        return [(x["step"], x[of]) for x in found if finite(x.get(of), x["step"])]


def finite(*values: Any) -> bool:
    """Returns whether all are numbers that are finite as floats."""
    return all(map(json_fields.is_finite, values))


def story(run: runs.Run) -> Story:
    """Returns what is known of a run; what is wrong with it is told, never raised."""
    wrong: list[str] = []

    def tried(read: Callable[[Path], Read], path: Path) -> Read | None:
        try:
            return read(path)
        except (OSError, ValueError, RecursionError) as error:
            wrong.append(_in_short(error))
            return None

    config = tried(_config, run.config)
    metrics = tried(_lines, run.metrics)
    speed = tried(_lines, run.speed)
    every = tried(_results, run.folder / "eval" / results.ALL) or []
    newest = dict(every)
    found = sorted((run.folder / "eval").glob("*.json"))
    for path in [*found, run.folder / "legibility.json"]:
        if path.exists():
            newest[path.stem] = tried(_object, path) or {}
    steps = checkpoint.steps(run.checkpoints) if run.checkpoints.is_dir() else []
    aside = len([*run.checkpoints.glob("*.damaged*")])
    if aside:
        wrong.append(f"{aside} of its checkpoints set aside as damaged")
    logged = metrics[-1]["step"] if metrics else 0
    every_step = config.train.log_every if config else 1
    if metrics is not None and steps and logged + every_step <= max(steps):
        wrong.append(f"metrics.jsonl ends at step {logged:,}, before the checkpoint")
    if not steps and metrics:
        wrong.append("it has no checkpoint")
    size, changed = _on_disk(run.folder)
    return Story(
        run,
        config,
        metrics or [],
        speed or [],
        {name: found for name, found in newest.items() if found},
        [d for _, found in every for d in distances(found)],
        max([*steps, logged]),
        size,
        changed,
        tuple(wrong),
    )


def distances(result: dict[str, Any]) -> list[Distance]:
    """Returns the distances in a result, if it is of averaged weights of the run.

    >>> one = {"weights": "averaged", "training_step": 9}
    >>> distances({**one, "numbers": {"FID vs train": {"mean": 3.17}}})
    [Distance(name='FID vs train', value=3.17, step=9)]
    """
    numbers, step = result.get("numbers"), result.get("training_step")
    if result.get("weights") != "averaged" or not isinstance(numbers, dict):
        return []
    means: dict[str, Any] = {
        key: value.get("mean")
        for key, value in numbers.items()
        if isinstance(value, dict) and key.startswith(DISTANCES)
    }
    at = step if json_fields.is_whole(step) else None
    return [Distance(key, mean, at) for key, mean in means.items() if finite(mean)]


def best(found: Story) -> Distance | None:
    """Returns the lowest of the distance to training images that was measured last."""
    names = [d.name for d in found.measured if d.name.endswith("vs train")]
    same = [d for d in found.measured if names and d.name == names[-1]]
    return min(same, key=lambda d: d.value, default=None)


def named(path: str | None) -> runs.Run:
    """Returns the run at a path or of a name, damaged or not; the newest when None.

    Raises:
      ConfigError: there is no run, but perhaps a network in a file.
    """
    for place in (Path(path), Path("runs") / path) if path is not None else ():
        if place.is_dir() and every_run(place)[:1] == [runs.Run(place)]:
            return runs.Run(place)
    found = runs.find(path)
    if found.network is not None:
        raise ConfigError(
            "RUN must be a folder that training wrote, with losses and checkpoints; "
            f"got the network {found.network.path}. Give a run."
        )
    return found


def each_named(paths: Sequence[str | None]) -> list[runs.Run]:
    """Returns the runs of `named`, each once."""
    found = map(named, paths)
    return [*{run.folder.resolve(): run for run in found}.values()]


def every_run(folder: Path) -> list[runs.Run]:
    """Returns the runs in a folder, or the folder itself where it is one."""
    marks = "config.json", "metrics.jsonl", "checkpoints"

    def is_run(path: Path) -> bool:
        return any((path / mark).exists() for mark in marks)

    if is_run(folder):
        return [runs.Run(folder)]
    found = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] != "."]
    return [runs.Run(path) for path in found if is_run(path)]


def _config(path: Path) -> Config:
    if not path.exists():
        raise ConfigError(f"{path.name} is not there")
    return runs.read_config(runs.Run(path.parent))


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json_fields.load(path)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no object")
    return values


def _lines(path: Path) -> list[dict[str, Any]]:
    if path.exists() and not path.is_file():  # a pipe may have no end
        raise ValueError(f"{path.name} is no regular file")
    return runs.read_lines(path)


def _results(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    return results.every(runs.Run(path.parents[1]))


def _on_disk(folder: Path) -> tuple[int, float]:
    """Returns the bytes of all files, and when the newest was written."""
    size, newest = 0, 0.0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # training deletes old checkpoints
                found = os.lstat(os.path.join(where, name))
                size += found.st_size
                newest = max(newest, found.st_mtime)
    return size, newest or time.time()


def _in_short(error: Exception) -> str:
    """Returns what is wrong, without what to do about it."""
    said = str(error)
    if isinstance(error, ConfigError) and " must " in said:
        what, _, got = said.partition("; got ")
        name = what.partition(" must ")[0].rpartition("/")[2]
        said = f"{name}: {got.partition('. ')[0]}"
    elif isinstance(error, OSError):
        name = Path(error.filename or "").name
        said = f"{name}: {error.strerror or error}"
    return first_of(said.splitlines(), 1)
