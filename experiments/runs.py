"""The folder of a run: what is in it, and how each file is written and read."""

import dataclasses
import json
import os
import platform
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from experiments import config, networks, validation


class Run(NamedTuple):
    """The paths of a run, or of what is drawn with a network in a file."""

    folder: Path
    network: networks.Found | None = None
    """The file or folder of the network, where it is not one that was trained here."""

    @property
    def config(self) -> Path:
        """Returns where the configuration is."""
        return self.folder / "config.json"

    @property
    def metrics(self) -> Path:
        """Returns where the metrics are: one line each train.log_every steps."""
        return self.folder / "metrics.jsonl"

    @property
    def speed(self) -> Path:
        """Returns where the speed is: what differs between two equal runs."""
        return self.folder / "speed.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Returns the folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """Returns the folder of grids."""
        return self.folder / "samples"

    @property
    def cache(self) -> Path:
        """Returns where compiled programs are: for all runs beside each other."""
        shared = self.folder.parent if self.network is None else self.folder
        return shared.resolve() / ".cache"


def of(cfg: config.Config) -> Run:
    """Returns the run of a configuration."""
    return Run(Path(cfg.output) / cfg.name)


def find(path: str | None, output: str = "runs") -> Run:
    """Returns the run at a path or of a name; the newest one when none is given.

    In place of a run there may be a network, in a file or a folder. What is drawn with
    it goes to NAME.drawn beside it, so that it stays as it is.

    Raises:
      ConfigError: there is no such run.
      ValueError: a file that holds no network.
    """
    if path is None:
        found = [Run(p.parent) for p in Path(output).glob("*/config.json")]
        found = [run for run in found if has_checkpoint(run)]
        if not found:
            raise config.ConfigError(
                f"a trained run must be in {output}/; got none. Run `make train` first."
            )
        return max(found, key=lambda run: run.checkpoints.stat().st_mtime)
    for place in (Path(path), Path(output) / path):
        network = networks.find(place)
        if network is not None:
            at = network.path if network.path.name else network.path.resolve()
            return Run(at.with_name(f"{at.name}.drawn"), network)
        if (place / "config.json").is_file():
            return Run(place)
    known = ", ".join(sorted(p.parent.name for p in Path(output).glob("*/config.json")))
    hub = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        hub = (
            " One of the hub is fetched by: python -m experiments.convert "
            f"{path} OUT.safetensors --download."
        )
    raise config.ConfigError(
        "RUN must be a folder that training wrote, or a network in a file; got "
        f"{path!r}, which is none. Runs in {output}/: "
        f"{known or 'none, run `make train` first'}.{hub}"
    )


def has_checkpoint(run: Run) -> bool:
    """Returns whether a run has got as far as a checkpoint."""
    return any(path.name.isdigit() for path in run.checkpoints.glob("*"))


def read_config(run: Run) -> config.Config:
    """Returns the configuration that a run was trained with.

    Its name and its output are where the run is now, so that a run that was moved, or
    is named from another folder, keeps its caches beside it.

    Raises:
      ConfigError: the file is damaged or from another version.
    """
    where = run.folder.resolve()
    if run.network is not None:
        found = networks.read_config(run.network)
        return dataclasses.replace(found, output=str(where))
    try:
        values = json.loads(run.config.read_text())
        loaded: config.Config = config.from_dict(values, partial=True)
        loaded = dataclasses.replace(
            loaded, output=str(where.parent), name=where.name or loaded.name
        )
        validation.validate(loaded)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise config.ConfigError(
            f"{run.config} must hold the configuration of a run; got {error}. Restore "
            "it, or train into a new folder."
        ) from error
    return loaded


def versions() -> dict[str, str]:
    """Returns the versions that a number depends on."""
    names = ("jax", "jaxlib", "flax", "numpy")
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Adds one JSON object to a file of lines."""
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of lines; none where there is no file.

    A last line that was cut off, by a machine that stopped, is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_lines(path: Path, last_step: int) -> None:
    """Drops the lines after a step: those that a resumed run will write again."""
    kept: Iterable[dict[str, Any]] = (
        line for line in read_lines(path) if line["step"] <= last_step
    )
    text = "".join(json.dumps(line) + "\n" for line in kept)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text)
    partial.replace(path)
