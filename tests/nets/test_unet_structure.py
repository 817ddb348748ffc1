"""The U-Net of the paper by its modules and shapes; nothing is compiled."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from small_unets import TWO_LEVELS, normal, shapes

from diffusion_jax.nets import blocks, unet


@pytest.mark.parametrize(
    ("size", "resolutions", "levels"),
    [
        (16, (5,), ()),
        (16, (8, 4), (1, 2)),
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
    assert {name for name in shapes(net, size) if "attention" in name} == expected


def test_every_residual_block_drops_at_the_rate_of_the_network():
    assert (unet.UNet().dropout, unet.UNet().groups) == (0.1, 32)
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


LARGE = (1, 1, 2, 2, 4, 4)


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({}, 32, 35_746_307),
        ({"out_channels": 6}, 32, 35_749_766),
        ({"num_classes": 10}, 32, 35_746_307 + 10 * 4 * 128),
        ({"fourier": (7, 8)}, 32, 35_746_307 + 3 * 3 * 3 * 2 * 2 * 128),
        ({"multipliers": LARGE}, 256, 113_673_219),
        ({"multipliers": LARGE, "channels": 192}, 256, 255_677_955),
    ],
    ids=["cifar10", "learned-variance", "labels", "fourier", "256", "bedroom-large"],
)
def test_number_of_parameters_is_that_of_the_paper(options, size, expected):
    leaves = jax.tree.leaves(shapes(unet.UNet(**options), size))
    assert sum(leaf.size for leaf in leaves) == expected


# Wrong input: options of the network, shape of the images, labels, and what was got.

IMAGES, TEN = (2, 16, 16, 3), {"num_classes": 10}
WRONG = [
    *(({}, shape, None, str(shape)) for shape in ((2, 12, 16, 3), (2, 16, 12, 3))),
    ({}, (16, 16, 3), None, "(16, 16, 3)"),
    ({"channels": 48}, IMAGES, None, "48. Change channels"),
    ({"conv": "fft"}, IMAGES, None, "'fft'"),
    ({"variant": "diffuser"}, IMAGES, None, "'diffuser'. Did you mean 'diffusers'?"),
    ({"channels": 2, "groups": 2}, IMAGES, None, "2. The paper uses 128"),
    ({}, IMAGES, [1, 2], "num_classes=0 and a label"),
    (TEN, IMAGES, None, "num_classes=10 and no label"),
    (TEN, IMAGES, [1, 10], "values from 1 to 10"),
    (TEN, IMAGES, [0, -1], "values from -1 to 0"),
    (TEN, IMAGES, [1], "int64 (1,)"),
    (TEN, IMAGES, [1.0, 2.0], "float64 (2,)"),
]


@pytest.mark.parametrize(("options", "shape", "label", "got"), WRONG)
def test_wrong_input_gets_an_error_in_three_parts(options, shape, label, got, refuses):
    given = np.zeros(shape, np.float32), np.zeros(2, np.int32)
    label = None if label is None else np.array(label)
    with refuses(got):
        unet.UNet(**options).init(jax.random.key(0), *given, label)
