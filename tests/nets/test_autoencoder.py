"""The autoencoder: its size to the parameter, its moments, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_unets import assert_close, normal, parameters, quick_jit

from diffusion_jax import latents, losses
from diffusion_jax.nets import autoencoder, fresh
from diffusion_jax.nets.autoencoder import AutoencoderKL, Moments, factor

SMALL = AutoencoderKL(channels=4, multipliers=(1, 2), blocks=1, latent=3, groups=2)
DEEP = {"multipliers": (1, 1, 2, 2, 4, 4), "latent": 64, "attention": (4, 5)}
OURS = {"channels": 16, "blocks": 1, "groups": 8, "image_channels": 1}
# As computed by hand, block by block: encoder, decoder, the two products.
SIZES = {
    "kl-f8": (AutoencoderKL(), 34_163_592, 49_490_179, 92),
    "kl-f32": (AutoencoderKL(**DEEP), 42_614_656, 61_244_803, 20_672),
    "sd3": (AutoencoderKL(latent=16, quant=False), 34_274_208, 49_545_475, 0),
    "digits": (
        AutoencoderKL(**OURS, multipliers=(1, 2), latent=2),
        64_468,
        101_089,
        26,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_it_has_as_many_parameters_as_the_released_ones(name):
    net, *expected = SIZES[name]
    x = jax.ShapeDtypeStruct((1, factor(net), factor(net), net.image_channels), "f4")
    of = {"encoder": 0, "decoder": 0, "quant_conv": 0, "post_quant_conv": 0}
    for part, tree in fresh.shapes(net, x).items():
        of[part] = sum(leaf.size for leaf in jax.tree.leaves(tree))
    encoder, decoder, *products = of.values()
    assert [encoder, decoder, sum(products)] == expected


def test_images_need_not_be_square_and_results_are_wide():
    net = SMALL.clone(dtype=jnp.bfloat16, remat=True, attention=(1,), image_channels=5)
    x = jax.ShapeDtypeStruct((2, 6, 10, 5), jnp.float32)
    params = fresh.shapes(net, x)
    attentions = {name for name in params["decoder"] if "attention" in name}
    others = {f"up1_block{j}_attention" for j in (0, 1)}
    assert attentions == {"middle_attention", *others}

    def both(params, x):
        moments = net.apply({"params": params}, x, method="encode")
        return moments, net.apply({"params": params}, moments.mode(), method="decode")

    (mean, log_variance), out = jax.eval_shape(both, params, x)
    assert mean.shape == log_variance.shape == (2, 3, 5, 3)
    assert out.shape == x.shape
    assert mean.dtype == out.dtype == jnp.float32


# Moments.


def program(net, method):
    return quick_jit(lambda p, x: net.apply({"params": p}, x, method=method))


encode, decode = (program(SMALL, method) for method in ("encode", "decode"))
IMAGES = normal(1, 4, 4, 3)


def test_log_variance_is_clamped():
    params = parameters(SMALL, IMAGES)
    params["quant_conv"]["bias"][3:] = [-100.0, 0.0, 100.0]
    low, free, high = np.moveaxis(encode(params, IMAGES).log_variance, -1, 0)
    assert np.all(low == -30)
    assert np.all(high == 20)
    assert np.all(abs(free) < 20)


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
    params = parameters(net, IMAGES)
    assert params["encoder"]["conv_out"]["kernel"].shape[-1] == 3
    moments = program(net, "encode")(params, IMAGES)
    np.testing.assert_array_equal(moments.sample(jax.random.key(0)), moments.mode())
    assert np.all(moments.kl() == np.inf)


def test_a_scale_in_the_weights_is_one_of_the_latents():
    params, z = parameters(SMALL, IMAGES), normal(1, 2, 2, 3)
    scale = latents.Scale(np.array([2.0, -1.0, 0.3]), np.array([0.2, 3.0, 1.5]))
    other = autoencoder.rescaled(params, *scale)
    found, moments = encode(other, IMAGES), encode(params, IMAGES)
    assert_close(found.mean, scale.apply(moments.mean))
    assert_close(found.log_variance, scale.log_variance(moments.log_variance))
    assert_close(decode(other, z), decode(params, scale.invert(z)))
    with pytest.raises(ValueError, match="quant must be True"):
        autoencoder.rescaled({"encoder": {}}, *scale)


def test_what_does_not_fit_is_refused(refuses):
    for shape, dtype, options, got in (
        ((1, 6, 7, 3), "f4", {}, "(1, 6, 7, 3)"),
        ((1, 8, 8, 3), "u1", {}, "uint8 (1, 8, 8, 3)"),
        ((1, 8, 8, 1), "f4", {}, "float32 (1, 8, 8, 1)"),
        ((1, 8, 8, 3), "f4", {"attention": (2,)}, "(2,)"),
        ((1, 8, 8, 3), "f4", {"groups": 3}, "4. Change channels"),
        ((1, 8, 8, 3), "f4", {"conv": "xl"}, "'xl'"),
        ((1, 8, 8, 3), "f4", {"dtype": np.float64}, "it off"),
    ):
        with refuses(got):
            fresh.shapes(SMALL.clone(**options), jax.ShapeDtypeStruct(shape, dtype))
    with refuses("(1, 4, 4, 4)"):
        SMALL.apply({}, normal(1, 4, 4, 4), method="decode")
