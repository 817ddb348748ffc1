"""The U-Net of the paper by its modules and shapes; nothing is compiled."""

import functools
import re

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_unets import TWO_LEVELS, by_shape, normal, shapes

from diffusion_jax.nets import blocks, unet


def names(net, size):
    """Names of the modules directly below a network for images of this size."""
    return set(shapes(net, size))


def count(net, size=32):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(net, size)))


# Modules.


def test_every_group_norm_is_this_one_with_32_groups():
    groups = {}

    def listen(module, args, kwargs, context):
        if "Norm" in type(context.module).__name__:
            assert isinstance(context.module, blocks.GroupNorm)
            groups["/".join(context.module.path)] = context.module.groups
        return module(*args, **kwargs)

    params = shapes(unet.UNet(), 32)
    x, t = np.zeros([2, 32, 32, 3], np.float32), np.zeros(2)
    with nn.intercept_methods(listen):
        jax.eval_shape(unet.UNet().apply, {"params": params}, x, t)
    # 22 residual blocks have 2, 6 attention blocks 1, the end 1.
    assert len(groups) == 22 * 2 + 6 + 1
    assert set(groups.values()) == {32}
    scales = {name for name in by_shape(params) if name.endswith("/scale")}
    assert {f"{name}/scale" for name in groups} == scales


@pytest.mark.parametrize(
    ("resolutions", "levels"), [((), ()), ((16,), (0,)), ((8, 4), (1, 2)), ((5,), ())]
)
def test_attention_is_by_resolution_and_always_in_the_middle(resolutions, levels):
    net = unet.UNet(
        channels=8, multipliers=(1, 1, 1), attention=resolutions, groups=4, blocks=2
    )
    expected = {"middle_attention"}
    for i in levels:
        expected |= {f"down{i}_block{j}_attention" for j in range(2)}
        expected |= {f"up{i}_block{j}_attention" for j in range(3)}
    assert {name for name in names(net, 16) if "attention" in name} == expected


def test_the_cifar_network_has_six_attention_blocks():
    assert sum("attention" in name for name in names(unet.UNet(), 32)) == 2 + 1 + 3
    net = unet.UNet(multipliers=(1, 1, 2, 2, 4, 4))
    assert sum("attention" in name for name in names(net, 256)) == 2 + 1 + 3


def test_every_residual_block_drops_at_the_rate_of_the_network():
    assert unet.UNet().dropout == 0.1
    net = TWO_LEVELS.clone(dropout=0.3)
    given = []

    def listen(module, args, kwargs, context):
        if isinstance(context.module, blocks.ResBlock) and len(args) == 3:
            given.append((context.module.dropout, args[2]))
        return module(*args, **kwargs)

    params = {"params": shapes(net, 8)}
    train = functools.partial(
        net.apply, train=True, rngs={"dropout": jax.random.key(0)}
    )
    with nn.intercept_methods(listen):
        jax.eval_shape(train, params, normal(2, 8, 8, 3), np.zeros(2))
    assert {rate for rate, _ in given} == {0.3}
    assert len(given) == 2 * 2 + 2 + 2 * 3
    assert len({id(key) for _, key in given}) == len(given)


def test_network_samples_unless_told_to_train_and_training_needs_a_key():
    x, t = np.zeros([1, 8, 8, 3], np.float32), np.zeros(1, np.int32)
    params = {"params": shapes(TWO_LEVELS, 8)}
    jax.eval_shape(TWO_LEVELS.apply, params, x, t)
    train = functools.partial(TWO_LEVELS.apply, train=True)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(train, params, x, t)
    rngs = {"dropout": jax.random.key(0)}
    jax.eval_shape(functools.partial(train, rngs=rngs), params, x, t)


# Sizes.


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({}, 32, 35_746_307),
        ({"out_channels": 6}, 32, 35_749_766),
        ({"multipliers": (1, 1, 2, 2, 4, 4)}, 256, 113_673_219),
        ({"multipliers": (1, 1, 2, 2, 4, 4), "channels": 192}, 256, 255_677_955),
    ],
    ids=["cifar10", "learned-variance", "256", "bedroom-large"],
)
def test_number_of_parameters_is_that_of_the_paper(options, size, expected):
    assert count(unet.UNet(**options), size) == expected


def test_labels_add_one_embedding_a_class():
    assert count(unet.UNet(num_classes=10)) - count(unet.UNet()) == 10 * 4 * 128


def test_fourier_features_widen_the_first_convolution_alone():
    nets = unet.UNet(), unet.UNet(fourier=(7, 8))
    plain, wide = (by_shape(shapes(net, 32)) for net in nets)
    assert plain.pop("conv_in/kernel") == (3, 3, 3, 128)
    assert wide.pop("conv_in/kernel") == (3, 3, 3 * (1 + 2 * 2), 128)
    assert wide == plain


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_output_has_the_shape_of_the_images(size, channels):
    net = unet.UNet(out_channels=channels, blocks=1)
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    times = jax.ShapeDtypeStruct((2,), jnp.int32)
    params = shapes(net, size, channels)
    assert params["conv_in"]["kernel"].shape == (3, 3, channels, 128)
    out = jax.eval_shape(net.apply, {"params": params}, images, times)
    assert out.shape == images.shape
    assert out.dtype == jnp.float32


# Wrong input.


@pytest.mark.parametrize(
    ("net", "shape", "label", "parts"),
    [
        (
            unet.UNet(),
            (2, 12, 12, 3),
            None,
            ["H = W a multiple of 8", "got (2, 12, 12, 3)", "Resize or pad"],
        ),
        (unet.UNet(), (2, 7, 7, 3), None, ["multiple of 8", "got (2, 7, 7, 3)", "pad"]),
        (
            unet.UNet(),
            (2, 16, 32, 3),
            None,
            ["H = W", "got (2, 16, 32, 3)", "Resize or pad"],
        ),
        (unet.UNet(), (16, 16, 3), None, ["[B, H, W, C]", "got (16, 16, 3)", "Resize"]),
        (
            unet.UNet(channels=48),
            (2, 16, 16, 3),
            None,
            ["a multiple of groups=32", "got 48", "Change channels"],
        ),
        (
            unet.UNet(conv="fft"),
            (2, 16, 16, 3),
            None,
            ["conv must be 'xla' or 'matmul'", "got 'fft'", "Leave"],
        ),
        (
            unet.UNet(channels=2, groups=2),
            (2, 16, 16, 3),
            None,
            ["channels must be at least 4", "got 2", "128"],
        ),
        (
            unet.UNet(num_classes=10),
            (2, 16, 16, 3),
            None,
            ["label must be given", "got num_classes=10 and no label", "Pass labels"],
        ),
        (
            unet.UNet(),
            (2, 16, 16, 3),
            np.array([1, 2]),
            ["label must be given", "got num_classes=0", "class-conditional"],
        ),
        (
            unet.UNet(num_classes=10),
            (2, 16, 16, 3),
            np.array([1, 10]),
            ["label must be in 0..9", "got values from 1 to 10", "one for no label"],
        ),
        (
            unet.UNet(num_classes=1),
            (2, 16, 16, 3),
            np.array([0, -1]),
            ["label must be in 0..0", "got values from -1 to 0", "rows"],
        ),
        (
            unet.UNet(num_classes=10),
            (2, 16, 16, 3),
            np.array([1]),
            ["label must be whole numbers", "got int64 (1,)", "Broadcast"],
        ),
        (
            unet.UNet(num_classes=10),
            (2, 16, 16, 3),
            np.array([1.0, 2.0]),
            ["label must be whole numbers", "got float64 (2,)", "Broadcast"],
        ),
    ],
    ids=[
        "size-12",
        "odd-size",
        "not-square",
        "no-batch",
        "groups",
        "convolution",
        "narrow",
        "label-missing",
        "label-superfluous",
        "label-too-large",
        "label-below-0",
        "label-of-another-batch",
        "label-not-whole",
    ],
)
def test_wrong_input_gets_an_error_in_three_parts(net, shape, label, parts):
    x, t = np.zeros(shape, np.float32), np.zeros(2, np.int32)
    with pytest.raises(ValueError) as error:
        net.init(jax.random.key(0), x, t, label)
    message = str(error.value)
    rule, got, advice = parts
    pattern = ".*".join(["must", re.escape(rule), re.escape(got), re.escape(advice)])
    if rule.split()[0] in (
        "label",
        "channels",
        "conv",
    ):  # The rule begins the sentence.
        pattern = ".*".join(map(re.escape, parts))
        assert " must " in message
    assert re.search(pattern, message), message
    assert re.search(r"; got .*\. [A-Z].*\.$", message), message
