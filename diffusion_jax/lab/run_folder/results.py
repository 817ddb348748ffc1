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
    if (folder / ALL).is_file():
        for line in (folder / ALL).read_text(errors="replace").splitlines():
            values = _parsed(line)
            found.append((str(values.pop("name", "")), values))
    return [(name, v) for name, v in found if v.get("weights_sha256") == digest]


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = json_fields.parse(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
