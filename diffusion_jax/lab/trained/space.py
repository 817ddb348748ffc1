"""Reads the autoencoder of a latent run: <run>/autoencoder.safetensors.

The run keeps a copy, with the scale of its latents, so that it can be moved and sampled
without the run that it is from. Of a network in a file it is in there.
"""

from pathlib import Path

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.network_files import networks
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import latent_space
from diffusion_jax.lab.wiring.latent_space import LatentSpace
from diffusion_jax.storage import trees


def path_of(run: runs.Run) -> Path:
    """Returns where the autoencoder of a latent run is."""
    return run.folder / "autoencoder.safetensors"


def load(config: Config, run: runs.Run) -> LatentSpace:
    """Returns the autoencoder of a latent run.

    Raises:
      ConfigError: it is not there.
      DataError: the file is damaged.
    """
    if run.network is not None:
        found = networks.read(run.network).space
        assert found is not None  # or it is no network of latents
        return found
    path = path_of(run)
    if not path.is_file():
        raise ConfigError(
            f"a latent run must have its autoencoder in {path}; got nothing there. "
            "Restore it, or train the run again."
        )
    stored = trees.read(path).params
    trees.check(stored, latent_space.shapes(config), path)
    return latent_space.of_tree(stored)
