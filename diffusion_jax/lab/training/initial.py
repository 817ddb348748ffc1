"""Fine-tuning: weights to start from, and the fields that come with them."""

import dataclasses
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import students
from diffusion_jax.lab.schema.config import Config, Net, replace
from diffusion_jax.lab.schema.facts import HOW, SHAPE, marked
from diffusion_jax.lab.schema.few import DISTILLED
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.lab.wiring import build
from diffusion_jax.storage import trees


def given(config: Config, *, force: bool = False) -> Config:
    """Returns the configuration of the weights to start from.

    For a run that has begun from them it is its own, and they may be gone. The
    autoencoder of a latent run is the copy that it has.

    Raises:
      ConfigError: there are no such weights.
    """
    begun = _begun(config, force)
    if begun is not None and begun.init_from == config.init_from:
        return begun
    source = runs.find(config.init_from, called="init_from")
    found = runs.read_config(source)
    if found.data.latent is not None and source.network is None:
        found = replace(found, "data", latent=str(source.folder))
    return found


def resolved(config: Config, *, force: bool = False) -> Config:
    """Returns the configuration with init_from as an absolute path.

    So the run finds the weights from any folder. Where none are named, a run that has
    begun from weights keeps its own.
    """
    begun = _begun(config, force)
    known = None if begun is None else begun.init_from
    if config.init_from is None:
        return dataclasses.replace(config, init_from=known)
    whole = str(Path(config.init_from).resolve())
    if known != whole:
        source = runs.find(config.init_from, called="init_from")
        place = source.folder if source.network is None else source.network.path
        whole = str(place.resolve())
    return dataclasses.replace(config, init_from=whole)


def like(experiment: Config, given: Config) -> Config:
    """Returns an experiment with the network and the diffusion of given weights.

    Its data, optimiser and run stay; so do the fields of how the network is computed,
    and its sampling rule, as far as they fit.
    """
    data = dataclasses.replace(
        experiment.data,
        image_size=given.data.image_size,
        channels=given.data.channels,
        latent=given.data.latent,
        latent_draw=given.data.latent_draw,
    )
    how = {name: getattr(experiment.net, name) for name in marked(Net, HOW)}
    net = dataclasses.replace(given.net, **how)
    if experiment.few.method != "none":  # a teacher's targets are noise enough
        net = dataclasses.replace(net, dropout=experiment.net.dropout)
    steps = experiment.sample.steps
    if steps is not None and steps > given.diffusion.num_steps:
        steps = None
    ddpm = experiment.sample.sampler == given.sample.sampler == "ddpm"
    sample = dataclasses.replace(
        experiment.sample,
        steps=steps,
        clip=given.sample.clip,
        variance=given.sample.variance if ddpm else experiment.sample.variance,
    )
    made = dataclasses.replace(
        experiment,
        data=data,
        diffusion=given.diffusion,
        net=net,
        autoencoder=given.autoencoder,
        sample=sample,
    )
    taught = experiment.few.method in DISTILLED
    return students.turned(made, given) if taught else made


def params(config: Config) -> Any:
    """Returns the trained parameters to start from; None without init_from.

    Raises:
      ConfigError: those of config.init_from are of another network, or not finite.
    """
    if config.init_from is None:
        return None
    source = runs.find(config.init_from, called="init_from")
    given = runs.read_config(source)
    if config.few.method != "none" and given.few.method != "none":
        raise ConfigError(
            "the teacher must be a network that was not distilled; got one of "
            f"few.method {given.few.method} in {config.init_from}. Name its own: "
            f"{given.init_from or 'a network of few.method none'}."
        )
    wrong = [
        f"{name} {old}, not {new}"
        for name in marked(Config, SHAPE)
        if (old := attrgetter(name)(given)) != (new := attrgetter(name)(config))
    ]
    for name, special in (
        ("variance", ("learned", "range")),
        ("schedule", ("learned",)),
    ):
        old, new = (getattr(c.diffusion, name) for c in (given, config))
        if old != new and (old in special or new in special):
            wrong.append(f"diffusion.{name} {old}, not {new}")
    jumps = [c.few.method == "mean_flow" for c in (given, config)]
    if jumps[0] != jumps[1]:
        wrong.append(f"few.method {given.few.method}, not {config.few.method}")
    # Where all these are alike, only a resolution with attention can be another.
    if not wrong and build.param_shapes(given) != build.param_shapes(config):
        wrong = [f"net.attention {given.net.attention}, not {config.net.attention}"]
    if wrong:
        raise ConfigError(
            f"the network must be that of {config.init_from}; got {'; '.join(wrong)}. "
            "Leave out these flags: the values are then those of the weights."
        )
    found = weights.load(given, source, Weights())[0]
    leaves = trees.by_path(found).items()
    bad = [name for name, leaf in leaves if not np.isfinite(np.asarray(leaf)).all()]
    if bad:  # every step would be skipped
        raise ConfigError(
            f"the weights of {config.init_from} must be finite; got others in "
            f"{len(bad)} tensors, first in {bad[0]}. Take another set of weights."
        )
    return found


def _begun(config: Config, force: bool) -> Config | None:
    """Returns the configuration of a run that has a checkpoint, else None.

    With force a damaged one is None too.
    """
    run = runs.of(config)
    if not (runs.has_checkpoint(run) and run.config.is_file()):
        return None
    try:
        return runs.read_config(run)
    except ConfigError:
        if not force:
            raise
        return None
