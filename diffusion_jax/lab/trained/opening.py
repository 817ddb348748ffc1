"""Opens a trained network for a command: its run and its checked configuration."""

from typing import Any

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import hosts
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.checks import with_data, with_sampling
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.trained import weights
from diffusion_jax.training import parallel


def opened(
    name: str | None,
    options: Any,
    *,
    which: Weights | None = None,
    how: Sampling | None = None,
    data: str | None = None,
    autoencoder: bool | None = False,
) -> tuple[runs.Run, Config]:
    """Returns a trained network's run and configuration, checked on all hosts.

    Args:
      name: of the run or the network's file, as `runs.find` takes it.
      options: of the command, the same on all hosts.
      which: the choice of weights.
      how: the way to sample, in place of the run's.
      data: to compare with, in place of the run's.
      autoencoder: whether the run must be one of an autoencoder, and not of diffusion;
        None for either.

    Raises:
      ConfigError: there is no such run, it has no such weights, is of the other kind,
        or a value does not fit; or hosts differ.
      ValueError: a file that holds no network.
    """
    run = runs.find(name)
    weights.check_alone(run, which or Weights())
    hosts.check_same("the options", repr(options))
    hosts.check_shared(run.folder)
    config = with_data(runs.read_config(run), data)
    if autoencoder not in (None, latents.is_autoencoder(config)):
        kinds = "diffusion", "an autoencoder"
        raise ConfigError(
            f"RUN must be of {kinds[autoencoder]}; got {run.folder}, of "
            f"{kinds[not autoencoder]}. Name another run, or use this one by python -m "
            f"experiments.{'sample' if autoencoder else 'eval_autoencoder'}."
        )
    if how is not None:
        config = with_sampling(config, how)
    parallel.persistent_cache(run.cache)
    return run, config
