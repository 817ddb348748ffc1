"""Takes images to the latents that a diffusion model learns, and back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import autoencoders
from diffusion_jax.latents import Scale
from diffusion_jax.nets.autoencoder import Moments


class LatentSpace(NamedTuple):
    """An autoencoder, and the scale of its latents for diffusion; a pytree."""

    params: Any
    """Its weights, {"net", "log_variance"}: the last, [1], of p(x | z), if it has any
    noise."""
    scale: Scale
    """By which the latents of the training images have mean 0 and variance 1."""


def to_tree(space: LatentSpace) -> dict[str, Any]:
    """Returns it as files have it."""
    beside = {name: leaf for name, leaf in space.params.items() if name != "net"}
    tree = {"net": space.params["net"], "scale": space.scale._asdict()}
    return tree | ({"beside": beside} if beside else {})


def of_tree(tree: dict[str, Any]) -> LatentSpace:
    """Returns what `to_tree` was given."""
    params = {"net": tree["net"], **tree.get("beside", {})}
    return LatentSpace(params, Scale(**tree["scale"]))


def shapes(config: Config, *, decoder: bool = True) -> dict[str, Any]:
    """Returns the shapes of `to_tree` for a latent run, as `jax.ShapeDtypeStruct`.

    Args:
      config: of the run.
      decoder: whether the variance of p(x | z) is known.
    """
    one: Any = jax.ShapeDtypeStruct((config.autoencoder.latent,), jnp.float32)
    params = {"net": autoencoders.shapes(config)}
    if decoder and config.autoencoder.kind != "ae":
        params["log_variance"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    return to_tree(LatentSpace(params, Scale(one, one)))


def encode(config: Config, space: LatentSpace, x: jax.Array) -> Moments:
    """Returns the distribution of the scaled latents of images in [-1, 1]."""
    mean, log_variance = autoencoders.apply(config, space.params, x, "encode")
    return Moments(space.scale.apply(mean), space.scale.log_variance(log_variance))


def decode(config: Config, space: LatentSpace | None, z: jax.Array) -> jax.Array:
    """Returns the images, about [-1, 1], of what the network learns, [..., h, w, z].

    With the images themselves, where there are no latents.
    """
    if space is None:
        return z
    flat = space.scale.invert(z).reshape(-1, *z.shape[-3:])
    image: jax.Array = autoencoders.apply(config, space.params, flat, "decode")
    return image.reshape(*z.shape[:-3], *image.shape[1:])


def of_images(config: Config, space: LatentSpace | None, x: jax.Array) -> jax.Array:
    """Returns what the network learns of images: the mean latents, or the images."""
    return x if space is None else encode(config, space, x).mode()


def draw(config: Config, stored: jax.Array, key: jax.Array) -> jax.Array:
    """Returns scaled latents of a batch: drawn, or as data.latent_draw says the mean.

    Args:
      config: of a latent run.
      stored: mean and log variance on that scale, [B, 1, h, w, 2z]; with data.flip of
        the image and of its mirror image, [B, 2, h, w, 2z].
      key: a key an image, [B].
    """
    seen, fold = stored[:, 0], jax.vmap(jax.random.fold_in, (0, None))
    if config.data.flip:
        chosen = jax.vmap(jax.random.bernoulli)(key)
        seen = jnp.where(chosen[:, None, None, None], stored[:, -1], seen)
    mean, log_variance = jnp.split(seen, 2, axis=-1)
    if config.data.latent_draw == "mode":
        return mean
    return jax.vmap(Moments.sample)(Moments(mean, log_variance), fold(key, 1))
