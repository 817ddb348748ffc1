"""What a run shows while it trains: samples, or images and their reconstructions."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_jax.data import datasets
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import autoencoders, chains
from diffusion_jax.lab.wiring.latent_space import LatentSpace


def make_draw(
    config: Config, mesh: Any, dataset: datasets.Dataset, space: LatentSpace | None
) -> Callable[..., np.ndarray]:
    """Returns the function that draws the images of a grid, as `chains.make_draw`.

    Of an autoencoder they are the first images of a data set, each before its
    reconstruction from the mean of its latents.
    """
    count = config.sample.count
    if not latents.is_autoencoder(config):
        draw = chains.make_draw(config, count, mesh)
        return lambda drawable, *how: draw(drawable._replace(space=space), *how)
    few = datasets.middle(dataset, config.data.shape[:2]).images
    shown = np.asarray(few[np.arange(min(max(count // 2, 1), len(few)))])

    @jax.jit
    def again(params: Any, images: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32) / 127.5 - 1
        y = autoencoders.apply(config, params, x, "__call__", net=config.net)
        both = jnp.stack([x, y], axis=1)
        return both.reshape(-1, *x.shape[1:])

    return lambda drawable, key, first=0: np.asarray(again(drawable.params, shown))


def picture(config: Config, drawn: np.ndarray) -> Image.Image:
    """Returns the picture of what `make_draw` has drawn, as uint8 images."""
    if not latents.is_autoencoder(config):
        return pictures.by_class(drawn, chains.count_classes(config))
    return pictures.grid(drawn, columns=2 * math.ceil(math.sqrt(len(drawn)) / 2))


def what(config: Config) -> str:
    """Returns what a grid shows, in a word."""
    return "pairs" if latents.is_autoencoder(config) else "samples"


def loss_name(config: Config) -> str:
    """Returns what the loss of a run is called."""
    own = config.autoencoder
    if latents.is_autoencoder(config):
        return "bits/dim" if own.kind == "vae" else own.loss
    return config.diffusion.loss
