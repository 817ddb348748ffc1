"""The U-Net against diffusers' UNet2DModel: same weights, same images.

tests/golden/diffusers_unets.npz has what that computes in each case of
peers/make_unet_golden.py. Weights are drawn from their names in diffusers, here as
there, and come in as those of a released network would: through the configuration and
the table of names.

Outputs, all of order 1, differ by less than 1e-4. Gradients differ by less than 1e-3 of
the norm of the tensor's: with respect to images the difference itself, with respect to
tensors that of the norms and of the products with some drawn vectors, which estimate
it. Gradients of the larger networks take too long to compile for this place: they are
in peers/test_unets_live.py.
"""

import functools

import jax
import jax.numpy as jnp
import make_unet_golden as golden
import numpy as np
import pytest
from small_unets import quick_jit, whole

from diffusion_jax.interop import unet_config, unet_names
from diffusion_jax.nets import blocks

# Both sets of constants.
GRADIENTS = ("labels", "defaults")


@pytest.fixture(scope="module")
def file():
    with np.load(golden.GOLDEN) as found:
        return dict(found)


@functools.cache
def opened(name):
    """(network, names, shapes by our names) of a case, by its configuration."""
    config = {"_class_name": "UNet2DModel", **golden.CASES[name].config}
    net, size, channels = unet_config.read_config(config, where="config.json")
    own = unet_names.shapes(net, channels, image_size=size)
    return net, unet_names.diffusers_names(own, len(net.multipliers)), own


@functools.cache
def their_shapes(name):
    """Shapes of a case's tensors, by the names in diffusers."""
    _, names, own = opened(name)
    empty = {key: np.zeros(shape, np.int8) for key, shape in own.items()}
    return {
        key: each.shape for key, each in unet_names.to_tensors(empty, names).items()
    }


def parameters(name):
    _, names, own = opened(name)
    drawn = {
        key: golden.tensor(key, shape) for key, shape in their_shapes(name).items()
    }
    return unet_names.from_tensors(drawn, names, own, where="the file")


@functools.cache
def computed(name):
    """(output, gradient with respect to images, those of tensors by their names)."""
    case, (net, names, _) = golden.CASES[name], opened(name)
    params = parameters(name)
    x, t, label = golden.inputs(case)

    def weighted(params, x):
        output = net.apply({"params": params}, x, t, label)
        return jnp.sum(output * golden.weighting(case)), output

    if name not in GRADIENTS:
        return np.asarray(quick_jit(weighted)(params, x)[1]), None, None
    run = quick_jit(jax.grad(weighted, (0, 1), has_aux=True))
    (of_params, of_x), output = run(params, x)
    return *map(np.asarray, (output, of_x)), unet_names.to_tensors(of_params, names)


def difference(name, actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(expected).max() > 0.5
    error = np.abs(actual - expected).max()
    print(f"{name}: largest difference {error:.1e}")
    return error


# Networks.


@pytest.mark.parametrize("name", golden.CASES)
def test_tensors_have_the_names_and_shapes_of_diffusers(name, file):
    expected = dict(zip(file[f"{name}: names"], file[f"{name}: shapes"], strict=True))
    shapes = their_shapes(name)
    assert {key: " ".join(map(str, shapes[key])) for key in shapes} == expected


@pytest.mark.parametrize("name", golden.CASES)
def test_output_is_that_of_diffusers(name, file):
    output, _, _ = computed(name)
    assert difference(name, output, file[f"{name}: output"]) < 1e-4


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_diffusers(name, file):
    _, of_x, gradients = computed(name)
    expected = file[f"{name}: gradient"]
    worst = np.linalg.norm(of_x - expected) / np.linalg.norm(expected)
    assert worst < 1e-3
    figures = dict(zip(file[f"{name}: names"], file[f"{name}: figures"], strict=True))
    for key, of_tensor in gradients.items():
        off = np.abs(golden.figures(key, of_tensor) - figures[key]).max()
        # A softmax does not see what is added to all keys: that has no gradient.
        norm = figures[key.replace("to_k.bias", "to_q.bias")][0]
        assert norm > 0.01, key
        assert off < 1e-3 * norm, key
        worst = max(worst, off / norm)
    print(f"{name}: largest difference of gradients {worst:.1e}")


# What other implementations get wrong.


def apply(module, params, x):
    return np.asarray(whole(jax.jit(module.apply)({"params": params}, x)))


def test_group_norm_epsilon_is_1e_6(file):
    channels = golden.PIECE[-1]
    x = golden.TINY * golden.normalized("x", golden.PIECE)
    params = {
        "scale": golden.tensor("norm.weight", (channels,)),
        "bias": golden.tensor("norm.bias", (channels,)),
    }
    ours, other = (
        apply(blocks.GroupNorm(4, variant.epsilon), params, (x,))
        for variant in blocks.VARIANTS.values()
    )
    assert difference("norm", ours, file["norm: official"]) < 1e-5
    # 1e-5 is the default of PyTorch and of diffusers.
    assert difference("1e-5", other, file["norm: diffusers"]) < 1e-5
    assert difference("wrong", other, file["norm: official"]) > 0.1
