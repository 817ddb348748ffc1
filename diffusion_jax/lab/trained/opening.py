"""What commands ask of a trained network: the flags they share, how it is opened."""

from typing import Annotated, Any

import tyro

from diffusion_jax.lab.process import hosts
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.checks import with_data, with_sampling
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.training import parallel

Named = Annotated[
    str | None,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="RUN",
        help="A run's folder or name; the newest in runs/ when not given.",
    ),
]
Data = Annotated[
    str | None,
    tyro.conf.arg(
        help="The data to compare with, where the network does not name its own: "
        "cifar10, folder:<path>, or what else data.source may be in training."
    ),
]
# Their fields are flags without a prefix.
How = tyro.conf.OmitArgPrefixes[Sampling]
Which = tyro.conf.OmitArgPrefixes[Weights]


def opened(
    name: str | None,
    options: Any,
    *,
    which: Weights | None = None,
    how: Sampling | None = None,
    data: str | None = None,
) -> tuple[runs.Run, Config]:
    """Returns a trained network's run and configuration, checked on all hosts.

    Args:
      name: of the run or the network's file, as `runs.find` takes it.
      options: of the command, the same on all hosts.
      which: the choice of weights.
      how: the way to sample, in place of the run's.
      data: to compare with, in place of the run's.

    Raises:
      ConfigError: there is no such run, it has no such weights, or a value does not
        fit; or hosts differ.
      ValueError: a file that holds no network.
    """
    run = runs.find(name)
    weights.check_alone(run, which or Weights())
    hosts.check_same("the options", repr(options))
    hosts.check_shared(run.folder)
    config = with_data(runs.read_config(run), data)
    if how is not None:
        config = with_sampling(config, how)
    parallel.persistent_cache(run.cache)
    return run, config
