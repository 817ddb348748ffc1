"""Keeps what was measured of a run: the newest of each kind, and a line for all."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import json_fields

ALL = "results.jsonl"
"""All results there ever were, each with its `name`, the oldest first."""
IN_TRAINING = "fid_training"
"""The name of those that a run made while it was trained."""


def write(run: runs.Run, name: str, result: dict[str, Any]) -> Path:
    """Writes a result to eval/NAME.json, and to the end of all; returns the first."""
    path = run.folder / "eval" / f"{name}.json"
    runs.write_json(path, result)
    runs.append_line(path.with_name(ALL), {"name": name, **result})
    return path


def in_training(run: runs.Run) -> dict[int, float]:
    """Returns the distances that a run measured of itself, by step; the newest."""
    found = {}
    for name, values in every(run):
        if name == IN_TRAINING:
            (number,) = values["numbers"].values()
            found[values["training_step"]] = number["mean"]
    return found


def read(run: runs.Run, digest: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the results of just these weights by name, the newest last.

    What is damaged, or of another kind, is left out.
    """
    folder = run.folder / "eval"
    found = [  # older versions wrote no lines
        (path.stem, _parsed(path.read_text(errors="replace")))
        for path in sorted(folder.glob("*.json"))
    ]
    found += every(run)
    return [(name, v) for name, v in found if v.get("weights_sha256") == digest]


def every(run: runs.Run) -> list[tuple[str, dict[str, Any]]]:
    """Returns all results there ever were with their names, the oldest first.

    A line that is damaged is empty.
    """
    path = run.folder / "eval" / ALL
    text = path.read_text(errors="replace") if path.is_file() else ""
    lines = map(_parsed, text.splitlines())
    return [(str(values.pop("name", "")), values) for values in lines]


def _parsed(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        values = json_fields.parse(text)
        if isinstance(values, dict):
            return values
    return {}
