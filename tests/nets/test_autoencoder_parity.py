"""The autoencoder against diffusers' AutoencoderKL: same weights, images and latents.

tests/golden/diffusers_autoencoders.npz has what that computes in each case of
peers/make_autoencoder_golden.py. Weights come in as those of a released network would:
through the configuration and the table of names.

Moments and images, of order 1, differ by less than 1e-4; gradients, by norms and
products with drawn vectors, by less than 1e-3 of the norm of the tensor's.
"""

import functools

import jax
import jax.numpy as jnp
import make_autoencoder_golden as golden
import make_unet_golden
import numpy as np
import pytest
from small_unets import quick_jit

from diffusion_jax.interop import autoencoder_config, autoencoder_names, unet_names


@pytest.fixture(scope="module")
def file():
    with np.load(golden.GOLDEN) as found:
        return dict(found)


@functools.cache
def opened(name):
    """(network, names, shapes by our names) of a case, by its configuration."""
    config = {"_class_name": "AutoencoderKL", **golden.CASES[name].config}
    net = autoencoder_config.read_config(config, where="config.json").net
    own = autoencoder_names.shapes(net)
    return net, autoencoder_names.diffusers_names(own, len(net.multipliers)), own


@functools.cache
def computed(name):
    """(moments, decoded, gradients of tensors by their names in diffusers)."""
    net, names, own = opened(name)
    empty = {key: np.zeros(shape, np.int8) for key, shape in own.items()}
    drawn = {
        key: make_unet_golden.tensor(key, each.shape)
        for key, each in unet_names.to_tensors(empty, names).items()
    }
    params = unet_names.from_tensors(drawn, names, own, where="the file")
    x, z, c, d = golden.inputs(golden.CASES[name])

    def weighted(params):
        moments = net.apply({"params": params}, x, method="encode")
        moments = jnp.concatenate(moments, axis=-1)
        decoded = net.apply({"params": params}, z, method="decode")
        return (moments * c).sum() + (decoded * d).sum(), (moments, decoded)

    slopes, made = quick_jit(jax.grad(weighted, has_aux=True))(params)
    return *map(np.asarray, made), unet_names.to_tensors(slopes, names)


@pytest.mark.parametrize("name", golden.CASES)
def test_it_computes_what_diffusers_does(name, file):
    shapes = dict(zip(file[f"{name}: names"], file[f"{name}: shapes"], strict=True))
    figures = dict(zip(file[f"{name}: names"], file[f"{name}: figures"], strict=True))
    moments, decoded, gradients = computed(name)
    assert {key: " ".join(map(str, a.shape)) for key, a in gradients.items()} == shapes
    for found, key in ((moments, "moments"), (decoded, "decoded")):
        expected = file[f"{name}: {key}"]
        assert abs(expected).max() > 1
        assert found.shape == expected.shape
        assert abs(found - expected).max() < 1e-4
    for key, slope in gradients.items():
        off = abs(make_unet_golden.figures(key, slope) - figures[key]).max()
        # Of a bias before a group of one channel there is none.
        assert off < 1e-3 * max(figures[key][0], 0.1), key
