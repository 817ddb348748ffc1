"""The blocks of the U-Net against a NumPy float64 reference, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_unet
import pytest
from small_unets import assert_close, double, normal, parameters, quick_jit

from diffusion_jax.nets import blocks, convolutions, embeddings


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
    assert_close(out, expected, 0.02)


# Convolutions.


def applied(block, x):
    """(parameters in float64, result) of a block on its own."""
    params = parameters(block, x)
    return double(params), jax.jit(block.apply)({"params": params}, x)


@pytest.mark.parametrize("conv", ["xla", "matmul"])
@pytest.mark.parametrize("way", ["downsample", "upsample"])
def test_changes_of_size_equal_numpy(way, conv):
    """Strides of 2 pad below and to the right only; the nearest pixel is repeated."""
    kind = {"downsample": blocks.Downsample, "upsample": blocks.Upsample}[way]
    x = normal(2, 4, 6, 5)
    params, found = applied(kind(conv=conv, dtype=jnp.float32), x)
    assert_close(found.whole(), getattr(numpy_unet, way)(params, x))


@pytest.mark.usefixtures("forms_of")
def test_few_channels_are_convolved_as_many():
    x = normal(2, 4, 6, 3)
    params, (y, bias) = applied(blocks.Conv(5, "xla", jnp.float32), x)
    assert_close(y + bias[None, None, None], numpy_unet.conv3x3(params, x))


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
    pair = (run(form, x, kernel) for form in (convolutions.doubled, plainly))
    for a, b in zip(*pair, strict=True):
        assert_close(a, b, 2e-5)


def test_the_gradient_of_a_kernel_is_summed_in_float32():
    # What a bfloat16 network has: activations of few digits, and weights of all.
    x, of_y = (jnp.asarray(normal(2, 5, 6, n), jnp.bfloat16) for n in (8, 4))
    kernel = jnp.asarray(normal(8, 4), jnp.float32)

    def loss(kernel):
        return (convolutions.product((x,), kernel) * of_y).astype(jnp.float32).sum()

    # Within one program XLA may leave the rounding out; here it cannot.
    made = jax.grad(loss)(kernel)
    assert made.dtype == jnp.float32
    assert_close(made, np.einsum("bhwc,bhwd->cd", double(x), double(of_y)), 1e-5)
