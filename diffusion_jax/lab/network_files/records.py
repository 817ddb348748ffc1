"""What has to be known of a trained network beside its weights, and how it is kept."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema import checks, json_fields
from diffusion_jax.lab.schema.config import Config, from_dict, to_dict

PyTree = Any

VERSION = 1


class About(NamedTuple):
    """What has to be known of weights, beside the configuration."""

    weights: str
    """Which they are: "averaged", "last", "averaged (length 0.08)", "released"."""
    step: int | None
    """Updates that made them, where that is known."""
    origin: str
    """Where they came from, in words."""
    scores: dict[str, dict[str, str]]
    """What was measured of them: for each number its "value", and "of" what it is."""
    recipe: bool
    """Whether the configuration is also that of the training that made them, and not
    only that of the network and its diffusion."""
    changes: tuple[str, ...] = ()
    """Of the recipe: what was changed while they were made, in words."""


class Network(NamedTuple):
    """A trained network."""

    config: Config
    params: PyTree
    """As `build.init_params` makes them, NumPy arrays."""
    about: About
    sha256: str
    """Of the file that the weights came from; of the weights where it is a run."""


class Described(NamedTuple):
    """What a file or folder says of its network."""

    config: Config
    about: About
    notes: tuple[str, ...] = ()
    """What is taken for granted, for the user to know."""


def write(network: Network) -> dict[str, Any]:
    """Returns what is to be known of a network beside its weights, as JSON has it."""
    config = network.config
    # Where files are on this machine is nobody else's business.
    config = dataclasses.replace(
        config,
        name=Config.name,  # that of the file
        output=Config.output,
        init_from=None,
        data=dataclasses.replace(
            config.data, path=None, source=public_source(config.data.source)
        ),
    )
    return {
        "version": VERSION,
        "config": to_dict(config),
        "about": network.about._asdict(),
    }


def public_source(source: str) -> str:
    """Returns a source of data without the folders that its files are in.

    >>> public_source("folder:/home/me/photos"), public_source("cifar10")
    ('folder:photos', 'cifar10')
    """
    kind, colon, paths = source.partition(":")
    if kind == "tfds":
        return source
    return kind + colon + ",".join(Path(path).name for path in paths.split(","))


def read(text: str, where: Path) -> tuple[Config, About]:
    """Returns configuration and weights' story from what `write` made, as text.

    Raises:
      ConfigError: it is damaged, of another version, or of nothing that can be run.
    """
    try:
        values = json_fields.parse(text)
        if values["version"] != VERSION:
            raise ConfigError(f"version {values['version']}, not {VERSION}")
        # A field that is not there is younger than the file: what it has by default is
        # what networks did before.
        config: Config = from_dict(values["config"])
        about = _about(values["about"])
        checks.validate(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{where} must describe a network of this project; got "
            f"{type(error).__name__}: {str(error).rstrip('.')}. Convert it again with "
            "this version."
        ) from error
    return config, about


def _about(values: dict[str, Any]) -> About:
    """Returns what was written of weights, or raises where it is something else."""
    about = About(**values)
    about = about._replace(changes=tuple(about.changes))
    words = [about.weights, about.origin, *about.changes]
    for score in about.scores.values():
        words += [score["value"], score["of"]]
    step = about.step
    counted = step is None or (json_fields.is_whole(step) and step >= 0)
    if not counted or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{values} of weights")
    return about


def plain_name(name: str) -> str:
    """Returns a name that a run may have."""
    return name.lstrip(".") or "network"
