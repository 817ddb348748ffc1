"""What was measured of a run: the newest result of a kind, and a line for every one."""

from pathlib import Path
from typing import Any

from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import json_fields

ALL = "results.jsonl"
"""All results there ever were, each with its `name`, the oldest first."""


def write(run: runs.Run, name: str, result: dict[str, Any]) -> Path:
    """Writes a result to eval/NAME.json, and to the end of all; returns the first."""
    path = run.folder / "eval" / f"{name}.json"
    runs.write_json(path, result)
    runs.append_line(path.with_name(ALL), {"name": name, **result})
    return path


IN_TRAINING = "fid_training"
"""The name of those that a run made while it was trained."""


def in_training(run: runs.Run) -> dict[int, float]:
    """Returns the distances that a run measured of itself, by step; the newest."""
    found = {}
    for name, values in _every(run):
        if name == IN_TRAINING:
            (number,) = values["numbers"].values()
            found[values["training_step"]] = number["mean"]
    return found


def read(run: runs.Run, digest: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the results of just these weights by name, the newest last.

    What is damaged, or of another kind, is left out.

    Args:
      run: of which they are.
      digest: of the weights.
    """
    folder = run.folder / "eval"
    found = [  # also those of before there were lines
        (path.stem, _parsed(path.read_text(errors="replace")))
        for path in sorted(folder.glob("*.json"))
    ]
    found += _every(run)
    return [(name, v) for name, v in found if v.get("weights_sha256") == digest]


def _every(run: runs.Run) -> list[tuple[str, dict[str, Any]]]:
    """Returns all results that there ever were, with their names."""
    path, found = run.folder / "eval" / ALL, []
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            values = _parsed(line)
            found.append((str(values.pop("name", "")), values))
    return found


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = json_fields.parse(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
