"""U-Nets and autoencoders of diffusers, opened and computed as ours."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import make_autoencoder_golden
import make_unet_golden
import numpy as np
from small_unets import quick_jit

from diffusion_jax.interop import (
    autoencoder_config,
    autoencoder_names,
    unet_config,
    unet_names,
)

GOLDENS = {"UNet2DModel": make_unet_golden, "AutoencoderKL": make_autoencoder_golden}
"""What is compared, by the class in diffusers."""


def opened(config, where="config.json"):
    """(network, names in diffusers, shapes by our names) by a configuration."""
    if config["_class_name"] == "AutoencoderKL":
        net = autoencoder_config.read_config(config, where=where).net
        own = autoencoder_names.shapes(net)
        return net, autoencoder_names.diffusers_names(own, len(net.multipliers)), own
    net, size, channels = unet_config.read_config(config, where=where)
    own = unet_names.shapes(net, channels, image_size=size)
    return net, unet_names.diffusers_names(own, len(net.multipliers)), own


def of_unet(net, case, params, x):
    """What is derived, and all outputs."""
    _, t, label = make_unet_golden.inputs(case)
    output = net.apply({"params": params}, x, t, label)
    return (output * make_unet_golden.weighting(case)).sum(), (output,)


def of_autoencoder(net, case, params, x):
    """The same of both halves."""
    _, z, c, d = make_autoencoder_golden.inputs(case)
    moments = net.apply({"params": params}, x, method="encode")
    moments = jnp.concatenate(moments, axis=-1)
    decoded = net.apply({"params": params}, z, method="decode")
    return (moments * c).sum() + (decoded * d).sum(), (moments, decoded)


class Computed(NamedTuple):
    outputs: tuple[np.ndarray, ...]
    of_x: np.ndarray | None
    """The gradient by the images."""
    of_tensors: Mapping[str, np.ndarray]
    """Those of tensors by their names in diffusers; none where there are no slopes."""


def computed(kind, net, names, case, params, *, slopes):
    form = {"UNet2DModel": of_unet, "AutoencoderKL": of_autoencoder}[kind]
    x = GOLDENS[kind].inputs(case)[0]

    def run(params, x):
        return form(net, case, params, x)

    if not slopes:
        outputs = quick_jit(run)(params, x)[1]
        return Computed(jax.tree.map(np.asarray, outputs), None, {})
    derived = quick_jit(jax.grad(run, (0, 1), has_aux=True))(params, x)
    (of_params, of_x), outputs = jax.tree.map(np.asarray, derived)
    return Computed(outputs, of_x, unet_names.to_tensors(of_params, names))
