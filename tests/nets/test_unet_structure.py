"""The U-Net of the paper by its modules and shapes; nothing is compiled."""

import functools

import flax.linen as nn
import jax
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
    ("size", "resolutions", "levels"),
    [
        (16, (), ()),
        (16, (16,), (0,)),
        (16, (8, 4), (1, 2)),
        (16, (5,), ()),
        ((16, 24), (16, 4), (0, 2)),
        ((24, 16), (8,), (1,)),
        ((24, 16), (24, 12, 6), ()),
    ],
)
def test_attention_is_by_resolution_and_always_in_the_middle(size, resolutions, levels):
    """That of a level is its shorter side."""
    net = unet.UNet(
        channels=8, multipliers=(1, 1, 1), attention=resolutions, groups=4, blocks=2
    )
    expected = {"middle_attention"}
    for i in levels:
        expected |= {f"down{i}_block{j}_attention" for j in range(2)}
        expected |= {f"up{i}_block{j}_attention" for j in range(3)}
    assert {name for name in names(net, size) if "attention" in name} == expected


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


# Sizes.


LARGE = (1, 1, 2, 2, 4, 4)


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({}, 32, 35_746_307),
        ({"out_channels": 6}, 32, 35_749_766),
        ({"multipliers": LARGE}, 256, 113_673_219),
        ({"multipliers": LARGE, "channels": 192}, 256, 255_677_955),
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


# Wrong input.

IMAGES = (2, 16, 16, 3)
SIZES = "H and W multiples of 8"
WRONG = {
    "size 12": ({}, (2, 12, 12, 3), None, SIZES, "(2, 12, 12, 3)", "Resize or pad"),
    "odd size": ({}, (2, 7, 7, 3), None, SIZES, "(2, 7, 7, 3)", "pad"),
    "high 12": ({}, (2, 12, 16, 3), None, SIZES, "(2, 12, 16, 3)", "Resize"),
    "wide 12": ({}, (2, 16, 12, 3), None, SIZES, "(2, 16, 12, 3)", "Resize"),
    "no batch": ({}, (16, 16, 3), None, "[B, H, W, C]", "(16, 16, 3)", "Resize"),
    "groups": ({"channels": 48}, IMAGES, None, "groups=32", "48", "Change channels"),
    "convolution": ({"conv": "fft"}, IMAGES, None, "'xla' or 'matmul'", "'fft'", "Lea"),
    "narrow": (
        *({"channels": 2, "groups": 2}, IMAGES, None),
        *("channels must be at least 4", "2", "128"),
    ),
    "a label too many": (
        *({}, IMAGES, [1, 2], "label must be given", "num_classes=0"),
        "class-conditional",
    ),
}
OF_LABELS = {
    "missing": (None, "label must be given", "num_classes=10 and no la", "Pass labels"),
    "too large": ([1, 10], "in 0..9", "values from 1 to 10", "one for no label"),
    "below 0": ([0, -1], "in 0..9", "values from -1 to 0", "rows"),
    "of another batch": ([1], "label must be whole", "int64 (1,)", "Broadcast"),
    "not whole": ([1.0, 2.0], "label must be whole", "float64 (2,)", "Broadcast"),
}
WRONG |= {
    f"label {name}": ({"num_classes": 10}, IMAGES, *row)
    for name, row in OF_LABELS.items()
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_an_error_in_three_parts(name, refuses):
    options, shape, label, rule, got, advice = WRONG[name]
    given = np.zeros(shape, np.float32), np.zeros(2, np.int32)
    label = None if label is None else np.array(label)
    with pytest.raises(ValueError) as error:
        unet.UNet(**options).init(jax.random.key(0), *given, label)
    with refuses(got):
        raise error.value
    before, _, after = str(error.value).partition("; got ")
    assert rule in before
    assert advice in after.partition(". ")[2]
