"""Whole U-Nets: their modules, shapes, images, labels, features and types."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_unet
import pytest
from small_unets import (
    TWO_LEVELS,
    assert_close,
    by_name,
    double,
    normal,
    parameters,
    quick_jit,
    shapes,
)

from diffusion_jax.nets import blocks, embeddings, unet

# Odd width, labels, learned variance: for grey images.
UNUSUAL = unet.UNet(
    channels=9,
    multipliers=(1, 2),
    attention=(8,),
    groups=3,
    blocks=1,
    out_channels=2,
    num_classes=3,
)

# Modules and shapes.


@pytest.mark.parametrize(
    ("size", "resolutions", "levels"),
    [((16, 24), (16, 6, 5), [0]), ((24, 16), (24, 8, 4), [1, 2])],
)
def test_attention_is_by_the_shorter_side_and_always_in_the_middle(
    size, resolutions, levels
):
    net = TWO_LEVELS.clone(multipliers=(1, 1, 1), attention=resolutions)
    blocks = [f"{block}{i}" for block in ("down", "up") for i in levels]
    expected = {f"{block}_block0_attention" for block in blocks} | {"middle_attention"}
    expected |= {f"up{i}_block1_attention" for i in levels}
    assert {name for name in shapes(net, size) if "attention" in name} == expected


def test_every_residual_block_drops_at_the_rate_of_the_network():
    assert (unet.UNet().dropout, unet.UNet().groups) == (0.1, 32)
    net, given = TWO_LEVELS.clone(dropout=0.3, blocks=2), []

    def listen(module, args, kwargs, context):
        if isinstance(context.module, blocks.ResBlock) and len(args) == 3:
            given.append((context.module.dropout, id(args[2])))
        return module(*args, **kwargs)

    rngs, params = {"dropout": jax.random.key(0)}, {"params": shapes(net, 8)}
    train = functools.partial(net.apply, train=True, rngs=rngs)
    with nn.intercept_methods(listen):
        jax.eval_shape(train, params, normal(2, 8, 8, 3), np.zeros(2))
    assert {rate for rate, _ in given} == {0.3}
    assert len(given) == len({key for _, key in given}) == 2 * 2 + 2 + 2 * 3


LARGE = (1, 1, 2, 2, 4, 4)


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({}, 32, 35_746_307),
        ({"multipliers": LARGE}, 256, 113_673_219),
        ({"multipliers": LARGE, "channels": 192}, 256, 255_677_955),
    ],
    ids=["cifar10", "256", "bedroom-large"],
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
    ({"dtype": np.dtype("float64")}, IMAGES, None, "it off"),
    ({}, IMAGES, [1, 2], "num_classes=0 and a label"),
    (TEN, IMAGES, None, "num_classes=10 and no label"),
    (TEN, IMAGES, [1, 10], "values from 1 to 10"),
    (TEN, IMAGES, [0, -1], "values from -1 to 0"),
    (TEN, IMAGES, [1], "int64 (1,)"),
    (TEN, IMAGES, [1.0, 2.0], "float64 (2,)"),
]


@pytest.mark.parametrize(("options", "shape", "label", "got"), WRONG)
def test_wrong_input_is_refused_inside_a_trace_too(options, shape, label, got, refuses):
    x, t = jax.ShapeDtypeStruct(shape, jnp.float32), np.zeros(2, np.int32)
    label = None if label is None else np.array(label)
    net = unet.UNet(**options)
    with refuses(got):
        jax.eval_shape(lambda x: net.init(jax.random.key(0), x, t, label), x)


# Images, labels and features.


def test_every_image_is_computed_on_its_own_and_nan_if_its_label_is_traced_and_wrong():
    x, t = normal(2, 24, 16, 1), np.array([0, 512])
    params = {"params": parameters(UNUSUAL, x, t, np.array([0, 0]))}
    run = quick_jit(UNUSUAL.apply)
    before = run(params, x, t, np.array([2, 0]))
    assert np.all(np.isfinite(before))
    for wrong in (3, -1):
        other, times = np.stack([x[0], 10.0 * x[1]]), np.array([0, 77])
        after = run(params, other, times, np.array([2, wrong]))
        np.testing.assert_array_equal(before[0], after[0])
        assert np.all(np.isnan(after[1]))


def test_fourier_features_equal_numpy(precision):
    x = 3 * normal(2, 3, 3, 2)
    out = embeddings.fourier_features(jnp.asarray(x), (0, 7, 8), dtype=precision)
    turns = x[..., None].astype(np.float64) * 2.0 ** np.array([0, 7, 8])
    phase = np.pi * np.mod(turns, 2).reshape(2, 3, 3, 6)
    expected = np.concatenate([np.sin(phase), np.cos(phase)], axis=-1)
    assert out.dtype == precision
    error = {"float32": 5e-7, "float64": 1e-13}[precision]
    np.testing.assert_allclose(out, expected, atol=error)


# Types.


def whole(value):
    """What a module takes or gives as one array, None where it is none."""
    match value:
        case blocks.Activation():
            return value.whole()
        case (jax.Array(ndim=4), jax.Array(ndim=1)):  # and a bias
            return value[0] + value[1].astype(value[0].dtype)[(None,) * 3]
    return value if isinstance(value, jax.Array) else None


def test_bfloat16_keeps_parameters_features_and_output_in_float32():
    x, t = normal(2, 16, 16, 3), np.array([3, 999])
    net = TWO_LEVELS.clone(fourier=(2, 7))
    half = net.clone(dtype=jnp.bfloat16)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(shapes(half, 16)))
    params = parameters(net, x, t)

    def recorded(params):
        inputs, outputs = {}, {}

        def listen(module, args, kwargs, context):
            out = module(*args, **kwargs)
            if context.method_name == "__call__" and context.module.path:
                name = "/".join(context.module.path)
                inputs[name], outputs[name] = whole(args[0]), whole(out)
            return out

        with nn.intercept_methods(listen):
            return half.apply({"params": params}, x, t), inputs, outputs

    output, inputs, outputs = quick_jit(recorded)(params)
    expected = quick_jit(net.apply)({"params": params}, x, t)
    assert output.dtype == jnp.float32
    # bfloat16 has a rounding error of 2^-9 = 0.002; some forty layers follow each
    # other, whose errors add up like a random walk.
    error = np.sqrt(np.mean((output - expected) ** 2) / np.mean(expected**2))
    assert error < 0.02
    # Features are taken before the image is rounded.
    features = embeddings.fourier_features(jnp.asarray(x), (2, 7))
    assert_close(inputs["conv_in"], np.concatenate([x, features], axis=-1), 1e-6)
    # The sum of the last convolution is in float32, what it reads is not.
    typed = {name: value.dtype for name, value in outputs.items() if value is not None}
    assert typed.pop("conv_out") == jnp.float32
    assert set(typed.values()) == {jnp.dtype(jnp.bfloat16)}
    kernel = jnp.asarray(params["conv_out"]["kernel"], jnp.bfloat16)
    last = double({"kernel": kernel, "bias": params["conv_out"]["bias"]})
    assert_close(output, numpy_unet.conv3x3(last, double(inputs["conv_out"])), 1e-6)


def test_in_float64_nothing_is_rounded_to_less(x64, forms_of):
    net = UNUSUAL.clone(dtype=jnp.float64)
    x, t, label = normal(2, 12, 8, 1), np.array([3, 999]), np.array([2, 0])
    params = parameters(net, x, t, label)

    def run(params):
        return net.apply({"params": params}, x, t, label)

    out = quick_jit(run)(params)
    assert out.dtype == np.float64
    shape = {"channels": 9, "levels": 2, "blocks": 1, "attention_at": (8,), "groups": 3}
    expected = numpy_unet.unet(double(params), x, t, label, **shape)
    assert_close(out, expected, 1e-13)
    gradients = jax.eval_shape(jax.grad(lambda params: run(params).sum()), params)
    assert by_name(gradients).keys() == by_name(params).keys()
