"""The autoencoder: its size to the parameter, its moments, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_unets import assert_close, normal, parameters

from diffusion_jax import latents, losses
from diffusion_jax.nets import autoencoder, fresh
from diffusion_jax.nets.autoencoder import AutoencoderKL, Moments, factor

HALF = ("encoder", "decoder")
SMALL = AutoencoderKL(channels=4, multipliers=(1, 2), blocks=1, latent=3, groups=2)
PAPER = functools.partial(AutoencoderKL, 128)
OURS = functools.partial(AutoencoderKL, blocks=1, groups=8, image_channels=1)
# As computed by hand, block by block: encoder, decoder, the two products, all.
SIZES = {
    "kl-f4": (PAPER((1, 2, 4), latent=3), 22_351_238, 32_960_771, 54, 55_312_063),
    "kl-f8": (AutoencoderKL(), 34_163_592, 49_490_179, 92, 83_653_863),
    "kl-f16": (
        PAPER((1, 1, 2, 2, 4), latent=16, attention=(4,)),
        *(28_265_760, 41_343_875, 1_328, 69_610_963),
    ),
    "kl-f32": (
        PAPER((1, 1, 2, 2, 4, 4), latent=64, attention=(4, 5)),
        *(42_614_656, 61_244_803, 20_672, 103_880_131),
    ),
    "sd3": (
        AutoencoderKL(latent=16, quant=False),
        *(34_274_208, 49_545_475, 0, 83_819_683),
    ),
    "fashion_mnist": (OURS(16, (1, 2, 2)), 93_496, 148_161, 92, 241_749),
    "wider": (OURS(32, (1, 2, 2)), 366_696, 586_625, 92, 953_413),
    "digits": (OURS(16, (1, 2), latent=2), 64_468, 101_089, 26, 165_583),
}


def images(net, *, batch=1, side=32):
    return jax.ShapeDtypeStruct((batch, side, side, net.image_channels), jnp.float32)


@pytest.mark.parametrize("name", SIZES)
def test_it_has_as_many_parameters_as_the_released_ones(name):
    net, *expected = SIZES[name]
    side = factor(net)
    x = jax.ShapeDtypeStruct((1, side, side, net.image_channels), jnp.float32)
    params = fresh.shapes(net, x)
    halves = [sum(leaf.size for leaf in jax.tree.leaves(params[half])) for half in HALF]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert [*halves, total - sum(halves), total] == expected


def test_images_need_not_be_square_and_results_are_wide():
    net = SMALL.clone(dtype=jnp.bfloat16, remat=True, attention=(1,), image_channels=5)
    x = jax.ShapeDtypeStruct((2, 6, 10, 5), jnp.float32)
    params = fresh.shapes(net, x)
    attentions = {name for name in params["decoder"] if "attention" in name}
    assert attentions == {
        *("middle_attention", "up1_block0_attention", "up1_block1_attention")
    }

    def both(params, x):
        encode, decode = (
            functools.partial(net.apply, {"params": params}, method=method)
            for method in ("encode", "decode")
        )
        return encode(x), decode(encode(x).mode())

    moments, out = jax.eval_shape(both, params, x)
    assert moments.mean.shape == moments.log_variance.shape == (2, 3, 5, 3)
    assert out.shape == x.shape
    assert {moments.mean.dtype, out.dtype} == {jnp.dtype(jnp.float32)}


def test_log_variance_is_clamped():
    params = parameters(SMALL, normal(1, 4, 4, 3))
    bias = params["quant_conv"]["bias"]
    bias[3:] = [-100.0, 0.0, 100.0]
    encode = functools.partial(SMALL.apply, {"params": params}, method="encode")
    log_variance = encode(normal(1, 4, 4, 3)).log_variance
    assert np.all(log_variance[..., 0] == -30)
    assert np.all(log_variance[..., 2] == 20)
    assert np.all(abs(log_variance[..., 1]) < 20)


def test_kl_is_that_of_two_normals_and_gradients_pass_through_a_draw():
    mean, log_variance = normal(2, 2, 3, 4), normal(2, 2, 3, 4, seed=2)
    moments = Moments(mean, log_variance)
    terms = losses.normal_kl(mean, log_variance, 0 * mean, 0 * mean)
    assert_close(moments.kl(), terms.sum(axis=(1, 2, 3)))
    key = jax.random.key(5)
    slopes = jax.grad(lambda m: (m.sample(key) ** 2).sum())(moments)
    z = moments.sample(key)
    assert_close(slopes.mean, 2 * z)
    assert_close(slopes.log_variance, z * (z - mean))


def test_a_draw_is_of_the_keys_and_has_the_deviation():
    wide = Moments(jnp.full([2, 50, 50, 4], 3.0), jnp.full([2, 50, 50, 4], np.log(4)))
    keys = jax.random.split(jax.random.key(0), 2)
    both, second = wide.sample(keys), Moments(*(a[1:] for a in wide)).sample(keys[1:])
    np.testing.assert_array_equal(both[1:], second)
    assert abs(both.mean() - 3) < 0.1
    assert abs(both.std() - 2) < 0.1


def test_one_without_noise_draws_its_mean_and_has_no_bound():
    net = SMALL.clone(noise=False)
    x = normal(2, 4, 4, 3)
    params = parameters(net, x)
    assert params["encoder"]["conv_out"]["kernel"].shape[-1] == 3
    moments = net.apply({"params": params}, x, method="encode")
    drawn = moments.sample(jax.random.key(0))
    np.testing.assert_array_equal(drawn, moments.mode())
    assert np.all(moments.kl() == np.inf)


def test_a_scale_in_the_weights_is_one_of_the_latents():
    x, params = normal(1, 4, 4, 3), parameters(SMALL, normal(1, 4, 4, 3))
    scale = latents.Scale(np.array([2.0, -1.0, 0.3]), np.array([0.2, 3.0, 1.5]))
    other = autoencoder.rescaled(params, *scale)
    encode, decode = (
        jax.jit(lambda p, x, m=method: SMALL.apply({"params": p}, x, method=m))
        for method in ("encode", "decode")
    )
    found, moments = encode(other, x), encode(params, x)
    assert_close(found.mean, scale.apply(moments.mean))
    assert_close(found.log_variance, scale.log_variance(moments.log_variance))
    z = normal(1, 2, 2, 3)
    assert_close(decode(other, z), decode(params, scale.invert(z)))
    with pytest.raises(ValueError, match="quant must be True"):
        autoencoder.rescaled({"encoder": {}}, *scale)


def test_what_does_not_fit_is_refused(refuses):
    def shapes(net, *shape, dtype=jnp.float32):
        fresh.shapes(net, jax.ShapeDtypeStruct(shape, dtype))

    with refuses("(1, 6, 7, 3)"):
        shapes(SMALL, 1, 6, 7, 3)
    with refuses("uint8 (1, 8, 8, 3)"):
        shapes(SMALL, 1, 8, 8, 3, dtype=jnp.uint8)
    with refuses("float32 (1, 8, 8, 1)"):
        shapes(SMALL, 1, 8, 8, 1)
    with refuses("(2,)"):
        shapes(SMALL.clone(attention=(2,)), 1, 8, 8, 3)
    with refuses("4. Change channels"):
        shapes(SMALL.clone(groups=3), 1, 8, 8, 3)
    with refuses("'xl'"):
        shapes(SMALL.clone(conv="xl"), 1, 8, 8, 3)
    with pytest.raises(ValueError, match=r"x64 mode on; got it off\. Set"):
        shapes(SMALL.clone(dtype=np.float64), 1, 8, 8, 3)
    with refuses("(1, 4, 4, 4)"):
        SMALL.apply({}, normal(1, 4, 4, 4), method="decode")
