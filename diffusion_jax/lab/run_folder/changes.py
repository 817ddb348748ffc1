"""Records how the configuration of a run was changed, and from which step.

Each line of changes.jsonl has the `step` after which other values held, and `changed`:
by field the value before and the one from then on; null where the values before were
lost. config.json has the last ones.
"""

import json
from typing import Any

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.network_files.records import public_source
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import Config, changed, from_dict, to_dict


def record(run: runs.Run, config: Config, step: int) -> None:
    """Writes that a run goes on from a step, and with which configuration.

    What was changed at this step or later has made no step that is still there.
    """
    lines = runs.read_lines(run.changes)
    kept = [line for line in lines if line["step"] < step]
    try:
        known = runs.read_config(run)
    except ConfigError:  # it is damaged, or gone
        found = None
    else:
        found = changed(before(run, known, step), config)
    if found is None or found:
        kept.append({"step": step, "changed": found})
    if json.dumps(kept) != json.dumps(lines):
        runs.write_lines(run.changes, kept)
    runs.write_json(run.config, to_dict(config))


def before(run: runs.Run, config: Config, step: int) -> Config:
    """Returns the configuration under which the updates up to a step were made.

    Raises:
      ConfigError: changes.jsonl is damaged.
    """
    values = to_dict(config)
    try:
        for line in reversed(runs.read_lines(run.changes)):
            if line["step"] >= step and line["changed"] is not None:
                for key, (old, _) in line["changed"].items():
                    section, _, name = key.rpartition(".")
                    (values[section] if section else values)[name] = old
        restored: Config = from_dict(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(run, error) from error
    return restored


def in_words(run: runs.Run, step: int) -> tuple[str, ...]:
    """Returns the changes that were made before a step, a few words each."""
    lines = [line for line in runs.read_lines(run.changes) if line["step"] < step]
    try:
        return tuple(_words(line) for line in lines)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(run, error) from error


def _damaged(run: runs.Run, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot read {run.changes}: {error!r}. Restore it, or delete it: then what "
        "was changed is not known."
    )


def _words(line: dict[str, Any]) -> str:
    if line["changed"] is None:
        return f"before step {line['step']:,}: what held was lost"
    fields = (
        f"{key} from {_public(old)} to {_public(new)}"
        for key, (old, new) in line["changed"].items()
    )
    return f"after step {line['step']:,}: {', '.join(fields)}"


def _public(value: Any) -> Any:
    """Returns a value without where files are on this machine."""
    return public_source(value) if isinstance(value, str) else value
