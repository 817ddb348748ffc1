"""Opens the network that the playground shows: a run's, or the one that is shipped."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.network_files import networks
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.trained import opening, weights
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.training import parallel

SHIPPED = Path(__file__).with_name("digits") / "digits.safetensors"
"""What `make train` and `experiments.convert` leave: there before any run."""


class Subject(NamedTuple):
    """A trained network, as the playground shows it."""

    run: runs.Run
    config: Config
    drawable: Drawable
    told: str
    """What its weights are, in words."""
    typed: str
    """What stands for it in a command line: RUN, and which weights."""
    shipped: bool = False
    """Whether it is the one that comes with the package."""


def opened(name: str | None, options: Any, which: Weights) -> Subject:
    """Returns the network of a run; that which is shipped where there is no run.

    The arguments are those of `opening.opened`.

    Raises:
      ConfigError, CheckpointError, ValueError: a run was named, and it is not there or
        cannot be read.
    """
    shipped = name is None and not _any()
    if shipped:
        run = runs.Run(SHIPPED.parent, networks.Found(SHIPPED, "diffusion_jax"))
        weights.check_alone(run, which)
        config = runs.read_config(run)
        parallel.persistent_cache(Path("runs/.cache").resolve())
    else:
        run, config = opening.opened(name, options, which=which)
    if latents.is_latent(config) or latents.is_autoencoder(config):
        kind = "an autoencoder" if latents.is_autoencoder(config) else "latents"
        raise ConfigError(
            f"the run must be a diffusion model of pixels; got one of {kind}. Its "
            "pictures are drawn by python -m experiments.sample and "
            "experiments.eval_autoencoder."
        )
    params, step, kind = weights.load(config, run, which)
    where = run.folder if run.network is None else run.network.path
    if where.is_relative_to(Path.cwd()):
        where = where.relative_to(Path.cwd())
    typed = " ".join([shlex.quote(str(where)), weights.flags(which)]).strip()
    told = weights.describe(kind, step)
    return Subject(run, config, Drawable(params), told, typed, shipped)


def describe(subject: Subject) -> dict[str, Any]:
    """Returns what the page says of the network, as JSON."""
    config = subject.config
    height, width, channels = config.data.shape
    leaves = jax.tree.leaves(subject.drawable.params)
    return {
        "name": config.name,
        "weights": subject.told,
        "parameters": sum(leaf.size for leaf in leaves),
        "shipped": subject.shipped,
        "typed": subject.typed,
        "device": jax.devices()[0].device_kind,
        "shape": [height, width, channels],
        "T": config.diffusion.num_steps,
        "schedule": config.diffusion.schedule,
        "prediction": config.diffusion.prediction,
        "classes": config.net.classes,
        "guided": bool(config.net.classes and config.net.label_dropout),
        "data": config.data.source,
        "sampler": config.sample.sampler,
    }


def _any() -> bool:
    """Returns whether there is a run to take when none is named."""
    try:
        runs.find(None)
    except ConfigError:
        return False
    return True
