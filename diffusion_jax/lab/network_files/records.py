"""Keeps what has to be known of a trained network beside its weights (metadata)."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema import checks, json_fields
from diffusion_jax.lab.schema.config import Config, from_dict, to_dict
from diffusion_jax.lab.wiring.latent_space import LatentSpace

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
    params: Any
    """As `build.init_params` makes them, NumPy arrays."""
    about: About
    sha256: str
    """Of the file that the weights came from; of the weights where it is a run."""
    space: LatentSpace | None = None
    """The autoencoder, where it learns latents."""


class Described(NamedTuple):
    """What a file or folder says of its network."""

    config: Config
    about: About
    notes: tuple[str, ...] = ()
    """What is taken for granted, for the user to know."""


def write(network: Network) -> dict[str, Any]:
    """Returns the metadata of a network, as JSON has it."""
    data = network.config.data
    # Paths on this machine are not published.
    data = dataclasses.replace(
        data,
        path=None,
        source=public_source(data.source),
        latent=data.latent and Path(data.latent).name,
    )
    config = dataclasses.replace(
        network.config,
        name=Config.name,  # that of the file
        output=Config.output,
        init_from=None,
        data=data,
    )
    about = network.about._asdict()
    return {"version": VERSION, "config": to_dict(config), "about": about}


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
    """Returns what `write` made of a network, from its text.

    Raises:
      ConfigError: it is damaged, of another version, or of nothing that can be run.
    """
    try:
        values = json_fields.parse(text)
        if values["version"] != VERSION:
            raise ConfigError(f"version {values['version']}, not {VERSION}")
        # A missing field is younger than the file: its default is what networks did
        # before.
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
    """Returns what was written of weights; raises ConfigError for anything else."""
    about = About(**values)
    words = [about.weights, about.origin, *about.changes]
    words += [score[key] for score in about.scores.values() for key in ("value", "of")]
    step = 0 if about.step is None else about.step
    counted = json_fields.is_whole(step) and step >= 0
    if not counted or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{values} of weights")
    return about._replace(changes=tuple(about.changes))


def plain_name(name: str) -> str:
    """Returns a name that a run may have."""
    return name.lstrip(".") or "network"
