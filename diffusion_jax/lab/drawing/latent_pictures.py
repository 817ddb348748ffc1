"""Pictures of an autoencoder: pairs, decoded noise, traversals, interpolations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.measure.reconstruction import Seen
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import autoencoders

COUNT = 8
"""Images of a row."""


def all_of(
    config: Config, params: Any, seen: Seen, seed: int
) -> dict[str, Image.Image]:
    """Returns the pictures by name.

    pairs has images above their reconstructions. prior is decoded from noise, N(0, I):
    samples of a vae, and of no other kind images. traversals moves one of the most
    varied units at a time, by up to three of its deviations, in the first image.
    interpolation goes between two images in the latents, and below them in pixels.
    """
    decode = decoder_of(config, params)
    count = min(COUNT, len(seen.images))
    pairs = np.concatenate([seen.images[:count], seen.again[:count]])
    shape = (4 * COUNT, *seen.mean.shape[1:])
    noise = np.asarray(jax.random.normal(jax.random.key(seed), shape))
    return {
        "pairs": _rows(pairs, count, ["image", "again"]),
        "prior": pictures.grid(decode(noise), columns=COUNT),
        "traversals": _traversals(decode, seen),
        "interpolation": _interpolation(decode, seen),
    }


def decoder_of(config: Config, params: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function from latents, not scaled, to uint8 images."""
    run = jax.jit(partial(autoencoders.apply, config, method="decode"))

    def decode(z: np.ndarray) -> np.ndarray:
        return pictures.to_uint8(np.asarray(run(params, jnp.asarray(z, jnp.float32))))

    return decode


def _traversals(decode: Callable[..., np.ndarray], seen: Seen) -> Image.Image:
    flat = seen.mean.reshape(len(seen.mean), -1)
    spread = flat.std(axis=0)
    chosen = np.argsort(-spread)[:COUNT]
    steps = np.linspace(-3, 3, 7)
    many = np.broadcast_to(flat[0], (len(chosen), len(steps), flat.shape[1])).copy()
    for row, unit in enumerate(chosen):
        many[row, :, unit] = flat[:, unit].mean() + steps * spread[unit]
    images = decode(many.reshape(-1, *seen.mean.shape[1:]))
    names = [
        "{},{} channel {}".format(*np.unravel_index(unit, seen.mean.shape[1:]))
        for unit in chosen
    ]
    picture = pictures.grid(images, columns=len(steps))
    return pictures.labelled(picture, above=[f"{s:+g} sd" for s in steps], left=names)


def _interpolation(decode: Callable[..., np.ndarray], seen: Seen) -> Image.Image:
    share = np.linspace(0, 1, COUNT).reshape(-1, 1, 1, 1)
    rows, left = [], []
    for a in range(0, min(6, len(seen.mean) - 1), 2):
        rows.append(decode((1 - share) * seen.mean[a] + share * seen.mean[a + 1]))
        mixed = (1 - share) * seen.images[a] + share * seen.images[a + 1]
        rows.append(np.rint(mixed).astype(np.uint8))
        left += ["latents", "pixels"]
    return _rows(np.concatenate(rows), COUNT, left)


def _rows(images: np.ndarray, columns: int, left: list[str]) -> Image.Image:
    return pictures.labelled(pictures.grid(images, columns=columns), left=left)
