"""A trained autoencoder in a notebook: what `lab.load` returns of one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab import given
from diffusion_jax.lab.measure import reconstruction
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.wiring import fitting, latent_space


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedAutoencoder:
    """A trained autoencoder: its weights and its configuration."""

    config: Config
    """What it is, and what it was trained on; or that of a network of its latents."""
    space: latent_space.LatentSpace
    """The weights, and the scale of the latents: as they are, or as a diffusion model
    sees them."""
    step: int | None
    """Training steps of the weights, where known."""
    kind: str
    """Which weights, such as "averaged"."""
    run: runs.Run
    """The run's folder."""

    @property
    def params(self) -> Any:
        """Returns the weights, a tree of arrays."""
        return self.space.params

    def __repr__(self) -> str:
        """Returns name, shapes, size and kind of weights in one line."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        image, latent = self.config.data.shape, latents.latent_shape(self.config)
        shapes = " to ".join("x".join(map(str, shape)) for shape in (image, latent))
        said = weights.describe(self.kind, self.step)
        return f"<{self.config.name}: {shapes}, {count:,} weights; {said}>"

    def encode(self, images: ArrayLike) -> np.ndarray:
        """Returns the mean of the latents of images, float32 [N, h, w, z].

        Args:
          images: uint8, [N, H, W, C] or [N, H, W].

        Raises:
          ConfigError, DataError: images that do not fit.
        """
        found = self._images(images)
        run = functools.partial(_encode, self.config, self.space)
        return np.asarray(fitting.by_batches(lambda _, part: run(part), found))

    def decode(self, z: ArrayLike) -> np.ndarray:
        """Returns the images of latents, uint8 [N, H, W, C].

        Args:
          z: latents on the scale of `encode`, [N, h, w, z].

        Raises:
          ConfigError: latents of another shape.
        """
        found = np.asarray(z, np.float32)
        given.check_shape(
            self.config, found.shape[1:], "z", latents.latent_shape(self.config)
        )
        run = functools.partial(_decode, self.config, self.space)
        return pictures.to_uint8(fitting.by_batches(lambda _, part: run(part), found))

    def bits_per_dim(self, images: ArrayLike, *, seed: int = 0) -> np.ndarray:
        """Returns the bound (ELBO) on each image's negative log-likelihood, [N].

        In bits/dim, from one draw of latents an image, as `eval_autoencoder` has it; of
        kind vae.

        Args:
          images: as for `encode`.
          seed: of the draw.

        Raises:
          ConfigError, DataError: images that do not fit, or another kind.
        """
        kind = self.config.autoencoder.kind
        if kind != "vae":
            raise ConfigError(
                "cannot bound a likelihood: only an autoencoder of kind vae learns "
                f"one, and this is of kind {kind}. Train a vae: make train "
                "EXP=digits_vae."
            )
        dataset = given.dataset(self._images(images), None, self.config)
        chosen = np.arange(len(dataset.images))
        how = {"batch_size": fitting.BATCH, "seed": given.whole("seed", seed, least=0)}
        seen = reconstruction.see(self.config, self.params, dataset, chosen, **how)
        return reconstruction.bits_per_dim(seen)

    def _images(self, images: ArrayLike) -> np.ndarray:
        found = given.dataset(images, None, self.config).images
        given.check_shape(self.config, found.shape[1:], "images")
        return np.asarray(found)


@functools.partial(jax.jit, static_argnums=0)
def _encode(
    config: Config, space: latent_space.LatentSpace, images: jax.Array
) -> jax.Array:
    x = images.astype(jnp.float32) / 127.5 - 1
    return latent_space.encode(config, space, x).mode()


@functools.partial(jax.jit, static_argnums=0)
def _decode(config: Config, space: latent_space.LatentSpace, z: jax.Array) -> jax.Array:
    return latent_space.decode(config, space, z)
