"""Networks against diffusers': same weights, same images, latents and gradients.

tests/golden has what diffusers computes in each case of peers/make_unet_golden.py and
make_autoencoder_golden.py. Weights are drawn from their names in diffusers, here as
there, and come in as those of a released network would: through the configuration and
the table of names.

Outputs, all of order 1, differ by less than 1e-4. Gradients differ by less than 1e-3 of
the norm of the tensor's: with respect to images the difference itself, with respect to
tensors that of the norms and of the products with some drawn vectors, which estimate
it. Gradients of the larger networks take too long to compile for this place: they are
in peers/test_networks_live.py.
"""

import jax
import make_unet_golden
import numpy as np
import pytest
from peer_networks import GOLDENS, computed, opened

from diffusion_jax.interop import unet_names
from diffusion_jax.nets import blocks

CASES = [(kind, name) for kind, golden in GOLDENS.items() for name in golden.CASES]
# Both sets of constants, and an autoencoder.
GRADIENTS = ("labels", "defaults", "two levels")


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_it_computes_what_diffusers_does(kind, name):
    case, shape_of = GOLDENS[kind].CASES[name], dict[str, tuple[int, ...]]()
    with np.load(GOLDENS[kind].GOLDEN) as file:
        there = {k.removeprefix(f"{name}: "): file[k] for k in file if f"{name}:" in k}
    net, names, own = opened({"_class_name": kind, **case.config})
    empty = {key: np.zeros(shape, np.int8) for key, shape in own.items()}
    for key, each in unet_names.to_tensors(empty, names).items():
        shape_of[key] = each.shape
    said = {key: " ".join(map(str, shape)) for key, shape in shape_of.items()}
    assert said == dict(zip(there["names"], there["shapes"], strict=True))
    drawn = {k: make_unet_golden.tensor(k, shape) for k, shape in shape_of.items()}
    params = unet_names.from_tensors(drawn, names, own, where="the file")
    slopes = name in GRADIENTS
    made = computed(kind, net, names, case, params, slopes=slopes)
    keys = ("output",) if kind == "UNet2DModel" else ("moments", "decoded")
    for key, output in zip(keys, made.outputs, strict=True):
        assert_near(f"{name}: {key}", output, there[key], 1e-4)
    if slopes and "gradient" in there:
        off = np.linalg.norm(made.of_x - there["gradient"])
        assert off < 1e-3 * np.linalg.norm(there["gradient"])
    figures = dict(zip(there["names"], there["figures"], strict=True))
    for key, gradient in made.of_tensors.items():
        off = np.abs(make_unet_golden.figures(key, gradient) - figures[key]).max()
        # A softmax does not see what is added to all keys: that has no gradient.
        norm = figures[key.replace("to_k.bias", "to_q.bias")][0]
        # Nor is there any of a bias before a group of one channel.
        assert norm > 0.01 or kind == "AutoencoderKL", key
        assert off < 1e-3 * max(norm, 0.1 * (kind == "AutoencoderKL")), key


def assert_near(name, actual, expected, most):
    assert actual.shape == expected.shape
    assert np.abs(expected).max() > 0.5
    error = np.abs(actual - expected).max()
    print(f"{name}: largest difference {error:.1e}")
    assert error < most


def test_group_norm_epsilon_is_1e_6():
    """1e-5 is the default of PyTorch and of diffusers, which others take over."""
    x = make_unet_golden.TINY * make_unet_golden.normalized("x", make_unet_golden.PIECE)
    params = {
        leaf: make_unet_golden.tensor(f"norm.{name}", x.shape[-1:])
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    }
    with np.load(make_unet_golden.GOLDEN) as file:
        there = {variant: file[f"norm: {variant}"] for variant in blocks.VARIANTS}
    for variant, constants in blocks.VARIANTS.items():
        norm = blocks.GroupNorm(4, constants.epsilon)
        found = jax.jit(norm.apply)({"params": params}, (x,))
        assert_near(variant, found, there[variant], 1e-5)
    assert np.abs(there["official"] - there["diffusers"]).max() > 0.1
