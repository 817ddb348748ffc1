"""Moves images at random in training: mirrored, turned, cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.lab.schema.config import Data


def moved(data: Data, x0: jax.Array, key: jax.Array) -> jax.Array:
    """Returns images mirrored, turned and cut at a random place, as configured.

    Args:
      data: says which of it.
      x0: images as they were loaded, [B, H, W, C].
      key: a key an image, [B].
    """
    if data.flip:
        chosen = jax.vmap(jax.random.bernoulli)(key)
        x0 = jnp.where(chosen[:, None, None, None], x0[:, :, ::-1], x0)
    fold = jax.vmap(jax.random.fold_in, (0, None))

    def cut(key: jax.Array, image: jax.Array) -> jax.Array:
        corner = jax.random.randint(key, [2], 0, data.random_crop + 1)
        return jax.lax.dynamic_slice(image, (*corner, 0), data.shape)

    def turn(key: jax.Array, image: jax.Array) -> jax.Array:
        most = np.deg2rad(data.rotate)
        angle = jax.random.uniform(key, minval=-most, maxval=most)
        middle = (np.array(image.shape[:2]) - 1) / 2
        rows, columns = np.indices(image.shape[:2]) - middle[:, None, None]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        at = (
            middle[0] + cos * rows - sin * columns,
            middle[1] + sin * rows + cos * columns,
        )
        seen = functools.partial(
            jax.scipy.ndimage.map_coordinates, coordinates=at, order=1, mode="reflect"
        )
        return jax.vmap(seen, in_axes=-1, out_axes=-1)(image)

    if data.rotate:  # before the cut, which takes some of the mirrored corners off
        x0 = jax.vmap(turn)(fold(key, 2), x0)
    if data.random_crop:
        x0 = jax.vmap(cut)(fold(key, 1), x0)
    return x0
