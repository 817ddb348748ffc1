"""Training that starts from trained weights: what it takes from them, and what not."""

import dataclasses
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import Config, Net
from diffusion_jax.lab.schema.facts import HOW, SHAPE, marked
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.lab.wiring import build
from diffusion_jax.storage import trees


def given(config: Config, *, force: bool = False) -> Config:
    """Returns what the network and its diffusion are by the weights to start from.

    A run that has begun knows it, and needs the weights no more.

    Raises:
      ConfigError: there are no such weights.
    """
    begun = _begun(config, force)
    if begun is not None and begun.init_from == config.init_from:
        return begun
    return runs.read_config(_source(config))


def resolved(config: Config, *, force: bool = False) -> Config:
    """Returns the configuration with the weights by their whole path.

    So that the run finds them from any folder, and under any spelling. Where none are
    named, a run that has begun from weights keeps its own.
    """
    if config.init_from is not None:
        begun = _begun(config, force)
        whole = str(Path(config.init_from).resolve())
        if begun is None or begun.init_from != whole:
            source = _source(config)
            place = source.folder if source.network is None else source.network.path
            whole = str(place.resolve())
        return dataclasses.replace(config, init_from=whole)
    begun = _begun(config, force)
    known = None if begun is None else begun.init_from
    return dataclasses.replace(config, init_from=known)


def like(experiment: Config, given: Config) -> Config:
    """Returns an experiment of the same network and diffusion as given weights have.

    What is data, optimiser and run stays; so does how the network is computed, and by
    which rule its pictures are drawn, as far as that fits.
    """
    data = dataclasses.replace(
        experiment.data,
        image_size=given.data.image_size,
        channels=given.data.channels,
    )
    how = {name: getattr(experiment.net, name) for name in marked(Net, HOW)}
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
    return dataclasses.replace(
        experiment,
        data=data,
        diffusion=given.diffusion,
        net=dataclasses.replace(given.net, **how),
        sample=sample,
    )


def params(config: Config) -> Any:
    """Returns the parameters that training starts from, if it starts from weights.

    Raises:
      ConfigError: those of config.init_from are of another network, or not finite.
    """
    if config.init_from is None:
        return None
    source = _source(config)
    given = runs.read_config(source)
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
    # Where all these are alike, only a resolution with attention can be another.
    if not wrong and build.param_shapes(given) != build.param_shapes(config):
        wrong = [f"net.attention {given.net.attention}, not {config.net.attention}"]
    if wrong:
        raise ConfigError(
            f"the network must be that of {config.init_from}; got {'; '.join(wrong)}. "
            "Leave out these flags: what they say is as it was there."
        )
    found = weights.load(given, source, Weights())[0]
    leaves = trees.by_path(found).items()
    bad = [name for name, leaf in leaves if not np.isfinite(np.asarray(leaf)).all()]
    if bad:  # no step could mend them, nor log
        raise ConfigError(
            f"the weights of {config.init_from} must be finite; got others in "
            f"{len(bad)} tensors, first in {bad[0]}. Take another set of weights."
        )
    return found


def _begun(config: Config, force: bool) -> Config | None:
    """Returns the configuration of the run, if it has a checkpoint.

    With force one that is damaged counts for nothing.
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


def _source(config: Config) -> runs.Run:
    try:
        return runs.find(config.init_from)
    except ConfigError as error:
        # Which other commands call RUN.
        raise ConfigError(str(error).replace("RUN must", "init_from must", 1)) from None
