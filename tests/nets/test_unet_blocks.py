"""The blocks of the U-Net against a NumPy float64 reference, and by hand."""

import flax.linen as nn
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
)

from diffusion_jax.nets import blocks, convolutions, dropout, embeddings


def res_block(**options):
    """A small residual block; options replace the defaults."""
    defaults = {"channels": 8, "groups": 4, "dropout": 0.5, "conv": "xla"}
    return blocks.ResBlock(**{**defaults, **options}, dtype=jnp.float32)


# The embedding of time.


@pytest.mark.parametrize("channels", [4, 5, 128])
def test_time_embedding_equals_numpy(channels):
    t = np.array([0, 1, 10, 500, 999])
    actual = embeddings.time_embedding(jnp.asarray(t), channels)
    assert actual.dtype == jnp.float32
    # A phase of 999 radians has a rounding error of 3e-5 in float32.
    assert_close(actual, numpy_unet.time_embedding(t, channels), 6e-5)
    assert_close(actual[:3], numpy_unet.time_embedding(t[:3], channels), 2e-6)
    of_float = embeddings.time_embedding(jnp.asarray(t, float), channels)
    np.testing.assert_array_equal(of_float, actual)


# Residual blocks and their dropout.


class WithTime(nn.Module):
    """A block, and what it adds of the embedding of time, in one module."""

    block: blocks.ResBlock

    def __call__(self, parts, shift, time, key=None):
        kernel, bias = self.block.time(time.shape[-1])
        x = blocks.Activation(parts, shift)
        return self.block(x, jax.nn.silu(time) @ kernel + bias[None], key).whole()


# One part, two, and two whose groups straddle; with a shift that was never written.
PARTS = {"one": (8,), "two": (8, 4), "straddling": (6, 6)}


def given_block(sizes, width, **options):
    """A block that is told the time, its arguments, and its parameters."""
    block = WithTime(res_block(channels=width, **options))
    parts = tuple(normal(2, 6, 6, size, seed=size + i) for i, size in enumerate(sizes))
    args = parts, normal(sum(sizes), seed=4), normal(2, 32, seed=2)
    return block, args, parameters(block, *args)


def true_block(params, parts, shift, time):
    """The same by NumPy, in float64."""
    x = np.concatenate(parts, axis=-1) + shift
    return numpy_unet.res_block(params["block"], x, time, 4)


def test_dropout_is_of_what_the_last_convolution_reads():
    rate, read = 0.1, []
    block, args, params = given_block((8,), 8, dropout=rate)

    def listen(module, args, kwargs, context):
        if context.module.name == "conv2":
            read.append(args[0])
        return module(*args, **kwargs)

    for key in (FAST_KEY, None):
        with nn.intercept_methods(listen):
            block.apply({"params": params}, *args, key)
    dropped, before = (np.asarray(x) for x in read)
    kept = dropout.unpacked(dropout.mask(FAST_KEY, before.shape, rate)[0], 8)
    share = dropout.mask(FAST_KEY, (1, 1), rate)[1]
    assert_close(dropped, np.where(kept, before / share, 0), 2e-6)
    assert 0.5 * rate < 1 - np.mean(kept) < 2 * rate


# Attention.


def test_softmax_is_float32_in_bfloat16():
    # All scores are about 360, where bfloat16 counts in steps of 2; what decides
    # between the pixels is smaller than that.
    q = np.zeros([1, 16, 8]) + np.array([32.0, 1, 1, 1, 1, 1, 1, 1])
    k = np.concatenate([np.full([1, 16, 1], 32.0), normal(1, 16, 7)], axis=-1)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, normal(1, 16, 8, seed=2))]
    q, k, v = double(half)
    scores = np.einsum("bqc,bkc->bqk", q, k) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    out = quick_jit(lambda *args: convolutions.attend(*args, 8**-0.5))(*half)
    assert out.dtype == jnp.bfloat16
    error = np.abs(double(out) - expected)
    assert error.max() < 0.02 * np.abs(expected).max()


# Down and up.


@pytest.mark.parametrize("conv", ["xla", "matmul"])
@pytest.mark.parametrize("way", ["downsample", "upsample"])
def test_changes_of_size_equal_numpy(way, conv):
    """Strides of 2 pad below and to the right only; the nearest pixel is repeated."""
    kind = {"downsample": blocks.Downsample, "upsample": blocks.Upsample}[way]
    block, x = kind(conv=conv, dtype=jnp.float32), normal(2, 4, 6, 5)
    params = parameters(block, x)
    found = apply(block, params, x).whole()
    assert_close(found, getattr(numpy_unet, way)(double(params), x))


@pytest.mark.usefixtures("forms_of")
@pytest.mark.parametrize("side", [4, 16])
def test_doubling_is_repetition_and_a_convolution(side):
    """Value and gradients, of few pixels and of many."""
    x, kernel = normal(1, side, side + 2, 3), normal(3, 3, 3, 2, seed=1)
    of_y = normal(1, 2 * side, 2 * side + 4, 2, seed=2)

    def plainly(x, kernel):
        wide = x.repeat(2, axis=1).repeat(2, axis=2)
        names = ("NHWC", "HWIO", "NHWC")
        conv = jax.lax.conv_general_dilated
        return conv(wide, kernel, (1, 1), "SAME", dimension_numbers=names)

    def run(form, *args):
        out, back = jax.vjp(form, *args)
        return out, *back(jnp.asarray(of_y))

    run = quick_jit(run, static_argnums=0)
    found, expected = (
        run(form, jnp.asarray(x), jnp.asarray(kernel))
        for form in (convolutions.doubled, plainly)
    )
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 2e-5)


@pytest.mark.usefixtures("forms_of")
def test_few_channels_are_convolved_as_many():
    x = normal(2, 4, 6, 3)
    conv = blocks.Conv(5, "xla", jnp.float32)
    params = parameters(conv, x)
    y, bias = apply(conv, params, x)
    assert_close(y + bias[None, None, None], numpy_unet.conv3x3(double(params), x))


def test_the_gradient_of_a_kernel_is_summed_in_float32():
    # What a bfloat16 network has: activations of few digits, and weights of all.
    x, of_y = (jnp.asarray(normal(2, 5, 6, n), jnp.bfloat16) for n in (8, 4))
    kernel = jnp.asarray(normal(8, 4), jnp.float32)

    def loss(kernel):
        return (convolutions.product((x,), kernel) * of_y).astype(jnp.float32).sum()

    # Within one program XLA may leave the rounding out; here it cannot.
    made = jax.grad(loss)(kernel)
    assert made.dtype == jnp.float32
    truth = np.einsum("bhwc,bhwd->cd", double(x), double(of_y))
    assert_close(made, truth, 1e-5)
