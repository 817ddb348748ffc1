"""Builds what encodes, decodes and trains an autoencoder from a configuration."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import autoencoding
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config, Net
from diffusion_jax.lab.wiring import critics, moving
from diffusion_jax.nets import fresh
from diffusion_jax.nets.autoencoder import AutoencoderKL, Moments
from diffusion_jax.training import state

ALIKE = (
    *("channels", "multipliers", "blocks", "latent", "attention"),
    *("middle_attention", "groups", "quant"),
)
"""Fields of a configuration's autoencoder that the network has under the same names."""
TERMS = ("reconstruction", "kl", "perceptual", "adversarial")
"""Of the loss of an autoencoder, by their names in metrics.jsonl."""


def make_network(config: Config, net: Net | None = None) -> AutoencoderKL:
    """Returns the autoencoder; `net` says how it is computed, in float32 without."""
    own = config.autoencoder
    return AutoencoderKL(
        noise=own.kind != "ae",
        image_channels=config.data.channels,
        **{name: getattr(own, name) for name in ALIKE},
        **computed(net or Net()),
    )


def computed(net: Net) -> dict[str, Any]:
    """Returns the fields of a network that say how it is computed, not what it is."""
    conv = "xla" if net.conv == "auto" else net.conv
    return {"dtype": jnp.dtype(net.dtype), "conv": conv, "remat": net.remat}


def init_decoder(config: Config) -> dict[str, Any]:
    """Returns what is trained beside the network: of vae its log variance, [1]."""
    vae = config.autoencoder.kind == "vae"
    return {"log_variance": np.full(1, -3.0, np.float32)} if vae else {}


def shapes(config: Config) -> Any:
    """Returns the shapes of the network's parameters, as `jax.ShapeDtypeStruct`."""
    image = np.zeros((1, *config.data.shape), np.float32)
    return fresh.shapes(make_network(config), image)


def apply(
    config: Config, params: Any, x: jax.Array, method: str, *, net: Net | None = None
) -> Any:
    """Returns what the network makes of images in [-1, 1], or of latents, not scaled.

    Args:
      config: of the autoencoder.
      params: {"net": its weights}.
      x: images, [B, H, W, C], or latents, [B, h, w, z].
      method: "encode", to `Moments`; "decode"; or "__call__", from images to images.
      net: as of `make_network`.
    """
    made = make_network(config, net)
    return made.apply({"params": params["net"]}, x, method=method)


def make_loss(config: Config) -> state.LossFn:
    """Returns the loss of an autoencoder, of a batch as that of `learning.make_loss`.

    Of kl and ae: the error of an image, and kl_weight times the KL divergence of its
    latents, both divided by its numbers. Of vae: the bound in bits/dim, with kl_weight
    (beta) times the rate. What it has seen are the terms of each example, without
    weights, and with a discriminator what it learns from.
    """
    own, weight, net = config.autoencoder, latents.kl_weight(config), config.net

    def loss_fn(
        params: Any, batch: dict[str, jax.Array], key: jax.Array, memory: Any = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["position"])
        several = jax.vmap(lambda k: jax.random.split(k, 2))(keys)
        move_key, draw_key = jnp.unstack(several, axis=1)
        x = batch["image"].astype(jnp.float32) / 127.5 - 1
        x = moving.moved(config.data, x, move_key)
        moments: Moments = apply(config, params, x, "encode", net=net)
        if own.kind == "ae":
            again = apply(config, params, moments.mode(), "decode", net=net)
            error = autoencoding.reconstruction(x, again, kind=own.loss, mean=True)
            return error.mean(), {"reconstruction": error, "kl": 0 * error}
        z = jax.vmap(Moments.sample)(moments, draw_key)
        again = apply(config, params, z, "decode", net=net)
        if own.kind == "vae":
            scale = params["log_variance"]
            free = own.free_bits
            error, kl = autoencoding.elbo(x, again, scale, moments, free=free)[1:]
            return (error + weight * kl).mean(), {"reconstruction": error, "kl": kl}
        kl = autoencoding.kl(moments) / np.prod(x.shape[1:])
        each, seen = _judged(config, params, x, z, again, memory)
        return (each + weight * kl).mean(), {**seen, "kl": kl}

    return loss_fn


def _judged(
    config: Config,
    params: Any,
    x: jax.Array,
    z: jax.Array,
    again: jax.Array,
    memory: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss of decoded images by all judges, [B], and its terms."""
    own = config.autoencoder

    def error(again: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        off = autoencoding.reconstruction(x, again, kind=own.loss, mean=True)
        if not own.perceptual:
            return off, {"reconstruction": off}
        far = critics.perceptual(memory.judge, x, again)
        return off + own.perceptual * far, {"reconstruction": off, "perceptual": far}

    total, seen = error(again)
    if not own.discriminator:
        return total, seen
    fixed, of = jax.lax.stop_gradient((params["net"], z))
    decoder = fixed["decoder"]

    def redone(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        last = {**decoder["conv_out"], "kernel": kernel}
        net = {**fixed, "decoder": {**decoder, "conv_out": last}}
        image = apply(config, {"net": net}, of, "decode", net=config.net)
        return image, error(image)[0]

    kernel = decoder["conv_out"]["kernel"]
    against = critics.adversarial(config, memory, again, kernel, redone)
    seen |= {"adversarial": against, "images": x, "decoded": again}
    return total + against, seen


def means(config: Config, seen: dict[str, jax.Array]) -> state.Metrics:
    """Returns the mean terms of a batch, for the log."""
    return {name: seen[name].mean() for name in TERMS if name in seen}
