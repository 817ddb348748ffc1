"""Names, writes and reads the files in the folder of a run."""

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from diffusion_jax import errors
from diffusion_jax.lab.network_files import networks
from diffusion_jax.lab.process import hosts
from diffusion_jax.lab.schema import checks, config, json_fields
from diffusion_jax.storage import files

Read = TypeVar("Read")


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
    def changes(self) -> Path:
        """Returns where the changes of the configuration are, if there were any."""
        return self.folder / "changes.jsonl"

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


def find(path: str | None, output: str = "runs", *, called: str = "RUN") -> Run:
    """Returns the run at a path or of a name; the newest one when none is given.

    In place of a run there may be a network, in a file or a folder. What is drawn with
    it goes to NAME.drawn beside it, so that it stays as it is. Errors call it `called`.

    Raises:
      ConfigError: there is no such run.
      ValueError: a file that holds no network.
    """
    if path is None:
        found = [Run(p.parent) for p in Path(output).glob("*/config.json")]
        found = [run for run in found if has_checkpoint(run)]
        if not found:
            raise errors.ConfigError(
                f"a trained run must be in {output}/; got none in "
                f"{Path(output).resolve()}. Go to where you trained, name the run's "
                "folder, or train one: python -m experiments.train digits"
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
    fetch = f"python -m experiments.convert {path} OUT.safetensors --download"
    ours = path.startswith(f"{output}/")
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not ours
    hub = f" One of the Hugging Face hub is fetched by: {fetch}." if is_name else ""
    there = Path(path).exists() or (Path(output) / path).exists()
    raise errors.ConfigError(
        f"{called} must be a folder that training wrote, or a network in a file; got "
        f"{path!r}, {'which is neither' if there else 'where nothing is'}. Runs in "
        f"{output}/: "
        f"{known or 'none, run `make train` first'}.{hub}"
    )


def has_checkpoint(run: Run) -> bool:
    """Returns whether a run has a checkpoint."""
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
        values = json_fields.load(run.config)
        loaded: config.Config = config.from_dict(values)
        loaded = dataclasses.replace(
            loaded, output=str(where.parent), name=where.name or loaded.name
        )
        checks.validate(loaded)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise errors.ConfigError(
            f"{run.config} must hold the configuration of a run; got {error}. Restore "
            "it, or train into a new folder."
        ) from error
    return loaded


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that compute."""
    names = ("jax", "jaxlib", "flax", "numpy")
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to an OSError that has none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file under a temporary name, then renames it.

    Raises:
      OSError: it cannot be written; nothing is left of it, and what was there stays.
    """
    _write(path, json.dumps(values, indent=2) + "\n")


def recalled(
    path: Path, about: dict[str, Any], read: Callable[..., Read]
) -> Read | None:
    """Returns a cached result, if it was made by what would make it now.

    None where the file is not there, damaged, or made by something else.

    `about`, what decides the result, stands in the file under the same names; `read`
    takes all else that is there, as keywords.
    """
    try:
        values = json.loads(path.read_text())
        made_by = {name: values.pop(name) for name in about}
        same = made_by == json.loads(json.dumps(about))
        return read(**values) if same else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def name_by(about: dict[str, Any]) -> str:
    """Returns a file's name: a digest of what decides its content."""
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Adds one JSON object to a file of lines.

    Raises:
      OSError: it cannot be written; `cut_lines` removes what there is of it.
    """
    with naming(path), path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of lines; none where there is no file.

    A last line that was cut off, by a machine that stopped, is left out.

    Raises:
      ConfigError: another line is no object with a step.
    """
    if not path.exists():
        return []
    lines, found = path.read_bytes().splitlines(keepends=True), []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            value = json.loads(line)
            if not json_fields.is_whole(value["step"]):
                raise ValueError("no step")
        except (ValueError, TypeError, KeyError) as error:
            raise errors.ConfigError(
                f"every line of {path} must be an object with a step; got something "
                f"else in line {number}. Restore the file, or delete that line."
            ) from error
        found.append(value)
    return found


def cut_lines(path: Path, last_step: int) -> None:
    """Drops the lines after a step, which a resumed run writes again."""
    write_lines(path, (x for x in read_lines(path) if x["step"] <= last_step))


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes a file of lines anew, as `write_json`."""
    _write(path, "".join(json.dumps(line) + "\n" for line in lines))


def to_disk(run: Run) -> None:
    """Flushes the logs to the disk, so that no checkpoint is ahead of them."""
    for path in (run.metrics, run.speed):
        if hosts.first() and path.exists():
            with naming(path), path.open("rb+") as file:
                os.fsync(file.fileno())


def remove_partials(run: Run) -> None:
    """Removes what training began to write here when it was killed.

    Only for who holds the run's lock: nobody else writes files of these names.
    """
    partials = ".config.json", ".*.jsonl", ".loss.png", "samples/.step_*.png"
    for name in (*partials, "averages/.*.safetensors"):
        for path in run.folder.glob(f"{name}.*.tmp"):
            path.unlink(missing_ok=True)
    for path in run.folder.glob(".hosts_*"):  # of `hosts.check_shared`
        path.unlink(missing_ok=True)


def check_room(run: Run, state: Any, there: int, keep: int) -> None:
    """Raises ConfigError where no checkpoint fits on the disk; says where few do.

    All hosts must call it alike.

    The checkpoints are of a state of these shapes; `there` are there already, and
    `keep` of the newest stay.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    fits = hosts.tell(min(shutil.disk_usage(run.folder).free // size, 2**30))
    each = f"{size / 2**20:,.2f} MiB"
    if not fits:
        raise errors.ConfigError(
            f"cannot train into {run.folder}: its disk has no room for a checkpoint, "
            f"{each}. Make room, or choose another disk with --output."
        )
    # The newest, the best, and the one that is being written before another goes.
    wanted = max(1, keep + 2 - there)
    if fits < wanted:
        room = errors.counted(fits, "checkpoint")
        hosts.say(
            f"note: the disk of {run.folder} has room for {room} of {each} "
            f"more; train.keep = {keep} takes up to {wanted}"
        )


def _write(path: Path, text: str) -> None:
    with files.replacing(path, durable=True) as file:
        file.write(text.encode())
