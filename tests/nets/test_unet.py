"""Whole U-Nets: their images, labels, features and types; one program a shape."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_unet
import pytest
from small_unets import (
    ONE_LEVEL,
    TWO_LEVELS,
    apply,
    assert_close,
    by_shape,
    double,
    normal,
    parameters,
    quick_jit,
    record,
    shapes,
)

from diffusion_jax.nets import embeddings, unet

# High grey images, three levels, odd width, labels, learned variance.
UNUSUAL = unet.UNet(
    channels=9,
    multipliers=(1, 2, 1),
    attention=(8, 4),
    groups=3,
    blocks=1,
    out_channels=2,
    num_classes=3,
)


@pytest.fixture(scope="session")
def unusual():
    """(params, x, t, jitted apply) of `UNUSUAL`."""
    x, t = normal(2, 24, 16, 1), np.array([0, 512])
    params = parameters(UNUSUAL, x, t, np.array([0, 0]))
    run = quick_jit(lambda p, x, t, label: UNUSUAL.apply({"params": p}, x, t, label))
    return params, x, t, run


def test_every_image_is_computed_on_its_own(unusual):
    params, x, t, run = unusual
    label = np.array([2, 0])
    other = np.stack([x[0], 10.0 * x[1]])
    before = run(params, x, t, label)[0]
    after = run(params, other, np.array([0, 77]), np.array([2, 1]))[0]
    np.testing.assert_array_equal(before, after)


def test_a_label_out_of_range_is_nan_where_it_cannot_be_refused(unusual):
    params, x, t, run = unusual
    for wrong in (3, -1):
        out = run(params, x, t, np.array([1, wrong]))
        assert np.all(np.isfinite(out[0]))
        assert np.all(np.isnan(out[1]))


def test_a_known_label_is_refused_inside_a_trace_too(refuses):
    label = jnp.array([1, 3])
    x = jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32)
    t = jax.ShapeDtypeStruct((2,), jnp.int32)
    with refuses("values from 1 to 3"):
        jax.eval_shape(lambda x, t: UNUSUAL.init(jax.random.key(0), x, t, label), x, t)


# Fourier features.


def test_fourier_features_equal_numpy():
    x = 3 * normal(2, 3, 3, 2)
    out = np.asarray(embeddings.fourier_features(jnp.asarray(x), (0, 7, 8)))
    assert out.shape == (2, 3, 3, 12)
    assert out.dtype == np.float32
    for channel in range(2):
        for k, n in enumerate((0, 7, 8)):
            phase = 2.0**n * np.pi * x[..., channel].astype(np.float64)
            place = 3 * channel + k
            np.testing.assert_allclose(out[..., place], np.sin(phase), atol=5e-7)
            np.testing.assert_allclose(out[..., 6 + place], np.cos(phase), atol=5e-7)


def test_network_sees_fourier_features_beside_the_image():
    """Features are taken before the image is rounded to the type of the network."""
    x, t = 0.3 * normal(2, 8, 8, 3), np.array([3, 700])
    net = ONE_LEVEL.clone(fourier=(2, 7), dtype=jnp.bfloat16)
    params = parameters(net, x, t)
    _, inputs, _ = record(net.apply, params, x, t)
    (seen,) = inputs["conv_in"]
    np.testing.assert_array_equal(seen[..., :3], x)
    features = embeddings.fourier_features(jnp.asarray(x), (2, 7))
    np.testing.assert_allclose(seen[..., 3:], features, atol=1e-6)


# bfloat16.


def test_bfloat16_keeps_parameters_and_output_in_float32():
    for leaf in jax.tree.leaves(shapes(unet.UNet(dtype=jnp.bfloat16), 32)):
        assert leaf.dtype == jnp.float32
    x, t = normal(2, 16, 16, 3), np.array([3, 999])
    params = parameters(TWO_LEVELS, x, t)
    expected, _, _ = record(TWO_LEVELS.apply, params, x, t)
    half = TWO_LEVELS.clone(dtype=jnp.bfloat16)
    output, inputs, outputs = record(half.apply, params, x, t)
    assert output.dtype == np.float32
    # bfloat16 has a rounding error of 2^-9 = 0.002; some forty layers follow each
    # other, whose errors add up like a random walk.
    error = np.sqrt(np.mean((output - expected) ** 2) / np.mean(expected**2))
    assert error < 0.02
    # The sum of the last convolution is in float32, what it reads is not.
    for name, value in outputs.items():
        if name not in ("", "conv_out") and value is not None:
            assert value.dtype == jnp.bfloat16, name
    (last,) = inputs["conv_out"]
    params = params["conv_out"]
    kernel = np.asarray(jnp.asarray(params["kernel"], jnp.bfloat16))
    params = double({"kernel": kernel, "bias": params["bias"]})
    assert_close(output, numpy_unet.conv3x3(params, double(last)), 1e-6)


# float64.


def test_in_float64_nothing_is_rounded_to_less(x64, forms_of):
    net = UNUSUAL.clone(dtype=jnp.float64)
    x, t, label = normal(2, 12, 8, 1), np.array([3, 999]), np.array([2, 0])
    params = parameters(net, x, t, label)
    out = quick_jit(lambda p: net.apply({"params": p}, x, t, label))(params)
    assert out.dtype == np.float64
    expected = numpy_unet.unet(
        double(params),
        x,
        t,
        label,
        channels=9,
        levels=3,
        blocks=1,
        attention_at=(8, 4),
        groups=3,
    )
    assert_close(out, expected, 1e-13)
    shape = jax.eval_shape(
        jax.grad(lambda p: net.apply({"params": p}, x, t, label).sum()), params
    )
    assert by_shape(shape) == by_shape(params)
    phase = 2.0**7 * np.pi * x.astype(np.float64)
    features = embeddings.fourier_features(jnp.asarray(x), (7,), dtype=jnp.float64)
    np.testing.assert_allclose(features[..., :1], np.sin(phase), atol=1e-13)


def test_float64_is_refused_where_jax_would_compute_in_less(refuses):
    with refuses("it off"):
        jax.eval_shape(
            ONE_LEVEL.clone(dtype=np.dtype("float64")).init,
            jax.random.key(0),
            normal(2, 8, 8, 3),
            np.zeros(2),
        )


# Compilation.


def test_second_call_does_not_compile_again_and_products_give_the_same():
    traces = []

    @jax.jit
    def run(params, x, t):
        traces.append(x.shape)
        # A new module each time, as in a function that builds its network.
        return ONE_LEVEL.clone().apply({"params": params}, x, t)

    params = parameters(ONE_LEVEL, normal(2, 8, 8, 3), np.zeros(2))
    given = [(normal(2, 8, 8, 3, seed=i), np.array([i, 700])) for i in (0, 1)]
    outs = [run(params, *one) for one in given]
    assert traces == [(2, 8, 8, 3)]
    assert np.abs(outs[0] - outs[1]).max() > 0.01
    net = ONE_LEVEL.clone(conv="matmul")
    assert by_shape(shapes(net, 8)) == by_shape(params)
    assert_close(apply(net, params, *given[1]), outs[1], 2e-6)
