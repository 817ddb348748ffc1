"""The blocks of the U-Net against a NumPy float64 reference, and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_unet
import pytest
from small_unets import (
    FAST_KEY,
    apply,
    assert_close,
    double,
    normal,
    parameters,
    quick_jit,
    record,
)

from diffusion_jax.nets import blocks, embeddings


def res_block(**options):
    """A small residual block; options replace the defaults."""
    defaults = {"channels": 8, "groups": 4, "dropout": 0.5, "conv": "xla"}
    return blocks.ResBlock(**{**defaults, **options}, dtype=jnp.float32)


# The embedding of time.


@pytest.mark.parametrize("channels", [4, 5, 16, 17, 128])
def test_time_embedding_equals_numpy(channels):
    t = np.array([0, 1, 10, 500, 999])
    actual = embeddings.time_embedding(jnp.asarray(t), channels)
    assert actual.dtype == jnp.float32
    # A phase of 999 radians has a rounding error of 3e-5 in float32.
    assert_close(actual, numpy_unet.time_embedding(t, channels), 6e-5)
    assert_close(actual[:3], numpy_unet.time_embedding(t[:3], channels), 2e-6)


def test_time_embedding_is_sines_then_cosines():
    embedding = embeddings.time_embedding(jnp.array([0, 1]), 6)
    np.testing.assert_array_equal(embedding[0], [0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(
        embedding[1],
        [np.sin(1), np.sin(1e-2), np.sin(1e-4), np.cos(1), np.cos(1e-2), np.cos(1e-4)],
        rtol=2e-6,
    )


def test_integer_and_float_times_are_the_same():
    times = [jnp.array([3, 999], kind) for kind in (int, float)]
    np.testing.assert_array_equal(*(embeddings.time_embedding(t, 8) for t in times))


@pytest.mark.parametrize("channels", [4, 5, 64, 128])
def test_slowest_frequency_is_1e_4(channels):
    embedding = embeddings.time_embedding(jnp.array([1]), channels)
    np.testing.assert_allclose(embedding[0, channels // 2 - 1], 1e-4, rtol=2e-6)


def test_odd_time_embedding_ends_in_a_zero():
    t = jnp.array([0, 1, 999])
    odd, even = embeddings.time_embedding(t, 9), embeddings.time_embedding(t, 8)
    assert odd.shape == (3, 9)
    np.testing.assert_array_equal(odd[:, :8], even)
    np.testing.assert_array_equal(odd[:, 8], 0)


# Residual blocks and their dropout.


@pytest.mark.parametrize("conv", ["xla", "matmul"])
@pytest.mark.parametrize("width", [8, 12])
def test_res_block_equals_numpy(width, conv):
    block = res_block(channels=width, conv=conv)
    x, time = normal(2, 6, 6, 8), normal(2, 32, seed=2)
    params = parameters(block, x, time, False)
    assert ("shortcut" in params) == (width != 8)
    expected = numpy_unet.res_block(double(params), x, time, 4)
    assert_close(apply(block, params, x, time, False), expected)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_rate_in_training_before_the_last_convolution(rate):
    block = res_block(dropout=rate)
    x, time = normal(8, 16, 16, 8), normal(8, 32, seed=2)
    params = parameters(block, x, time, False)
    rngs = {"dropout": FAST_KEY}
    train = functools.partial(block.apply, train=True, rngs=rngs)
    _, inputs, outputs = record(train, params, x, time)
    dropped = outputs["Dropout_0"] == 0
    error = np.sqrt(rate * (1.0 - rate) / dropped.size)
    assert abs(dropped.mean() - rate) < 5.0 * error
    (before,) = inputs["Dropout_0"]
    np.testing.assert_array_equal(before, outputs["norm2"])  # with SiLU
    expected = np.where(dropped, 0.0, before / (1.0 - rate))
    assert_close(inputs["conv2"][0], expected, 2e-6)


def test_dropout_depends_on_the_key_in_training_and_is_off_at_sampling():
    block = res_block()
    x, time = normal(2, 4, 4, 8), normal(2, 32, seed=2)
    params = parameters(block, x, time, False)

    @functools.partial(quick_jit, static_argnums=1)
    def run(key, train):
        return block.apply({"params": params}, x, time, train, rngs={"dropout": key})

    keys = [jax.random.key(seed, impl="unsafe_rbg") for seed in (0, 0, 1)]
    a, b, c = (run(key, True) for key in keys)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.01
    np.testing.assert_array_equal(run(keys[0], False), run(keys[2], False))
    expected = numpy_unet.res_block(double(params), x, time, 4)
    assert_close(run(keys[0], False), expected)


# Attention.


def test_attention_equals_numpy():
    block = blocks.Attention(groups=4, dtype=jnp.float32)
    x = normal(2, 4, 6, 8)
    params = parameters(block, x)
    expected = numpy_unet.attention(double(params), x, 4)
    assert_close(apply(block, params, x), expected)


def test_softmax_is_float32_in_bfloat16():
    # All scores are about 360, where bfloat16 counts in steps of 2; what decides
    # between the pixels is smaller than that.
    block = blocks.Attention(groups=4, dtype=jnp.bfloat16)
    x = normal(1, 4, 4, 8)
    params = parameters(block, x)
    params["query"] = {
        "kernel": np.zeros([8, 8], np.float32),
        "bias": np.array([32, 1, 1, 1, 1, 1, 1, 1], np.float32),
    }
    params["key"]["kernel"][:, 0] = 0.0
    params["key"]["bias"][0] = 32.0
    # The output is the mean of the values by the weights alone.
    params["value"] = {"kernel": np.eye(8, dtype=np.float32), "bias": np.zeros(8)}
    params["out"] = {"kernel": np.eye(8, dtype=np.float32), "bias": np.zeros(8)}
    expected = numpy_unet.attention(double(params), x, 4)
    out = apply(block, params, jnp.asarray(x, jnp.bfloat16))
    error = np.abs(np.asarray(out, np.float64) - expected)
    assert error.max() < 0.02 * np.abs(expected).max()


# Down and up.


@pytest.mark.parametrize("conv", ["xla", "matmul"])
def test_downsample_equals_numpy(conv):
    block = blocks.Downsample(conv=conv, dtype=jnp.float32)
    x = normal(2, 6, 8, 5)
    params = parameters(block, x)
    assert_close(apply(block, params, x), numpy_unet.downsample(double(params), x))


@pytest.mark.parametrize("conv", ["xla", "matmul"])
def test_stride_2_pads_only_below_and_right(conv):
    block = blocks.Downsample(conv=conv, dtype=jnp.float32)
    run, x = jax.jit(block.apply), normal(1, 4, 4, 1)
    for row, col in np.ndindex(3, 3):
        kernel = np.zeros([3, 3, 1, 1], np.float32)
        kernel[row, col] = 1.0
        params = {"conv": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}
        out = np.asarray(run({"params": params}, x))
        for i, j in np.ndindex(2, 2):
            inside = 2 * i + row < 4 and 2 * j + col < 4
            expected = x[0, 2 * i + row, 2 * j + col, 0] if inside else 0.0
            assert out[0, i, j, 0] == expected


@pytest.mark.parametrize("conv", ["xla", "matmul"])
def test_upsample_equals_numpy(conv):
    block = blocks.Upsample(conv=conv, dtype=jnp.float32)
    x = normal(2, 3, 4, 5)
    params = parameters(block, x)
    assert_close(apply(block, params, x), numpy_unet.upsample(double(params), x))


# Group normalisation.


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_equals_numpy(groups):
    x = 3.0 * normal(2, 5, 6, 8) + 1.0
    norm = blocks.GroupNorm(groups=groups, dtype=jnp.float32)
    params = parameters(norm, x)
    expected = numpy_unet.group_norm(double(params), x, groups)
    assert_close(apply(norm, params, x), expected)


def test_group_norm_epsilon_is_1e_6():
    # The variance is 1e-6 exactly, so that epsilon halves the square of the output.
    x = 1e-3 * (-1.0) ** np.arange(4 * 4 * 8).reshape(1, 4, 4, 8).astype(np.float32)
    norm = blocks.GroupNorm(groups=4, dtype=jnp.float32)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    np.testing.assert_allclose(
        np.abs(norm.apply({"params": params}, x)), np.sqrt(0.5), rtol=1e-5
    )


def test_group_norm_is_accurate_where_the_mean_is_large():
    # E[x^2] - E[x]^2 loses all digits here; the official code takes two passes.
    x = normal(1, 8, 8, 32) + 100.0
    norm = blocks.GroupNorm(groups=8, dtype=jnp.float32)
    params = {"scale": np.ones(32, np.float32), "bias": np.zeros(32, np.float32)}
    expected = numpy_unet.group_norm(params, x.astype(np.float64), 8)
    assert_close(norm.apply({"params": params}, x), expected, 5e-5)


def test_group_norm_statistics_are_float32_in_bfloat16():
    # In bfloat16 E[x^2] = 64.25 would be off by up to 0.25, the whole variance.
    x = jnp.asarray(8.0 + 0.5 * normal(1, 16, 16, 8), jnp.bfloat16)
    norm = blocks.GroupNorm(groups=2, dtype=jnp.bfloat16)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    out = norm.apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    expected = numpy_unet.group_norm(params, np.asarray(x, np.float64), 2)
    # One rounding of the result, relative to each value.
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-4
    )
