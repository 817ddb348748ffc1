"""Where training of the U-Net starts, its gradients, and what it stores and reads."""

import functools
import re

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_unets import (
    FAST_KEY,
    ONE_LEVEL,
    assert_close,
    by_name,
    normal,
    parameters,
    quick_jit,
    shapes,
)

from diffusion_jax.nets import fresh, unet

INPUTS = normal(2, 8, 8, 3), np.array([3, 700])


def check_uniform(kernel, scale):
    """Checks bound, spread and centre of a fan-average uniform initialiser."""
    kernel, n = kernel.astype(np.float64), kernel.size
    fan = np.prod(kernel.shape[:-2], initial=1.0) * sum(kernel.shape[-2:]) / 2.0
    bound, deviation = np.sqrt(3.0 * scale / fan), np.sqrt(scale / fan)
    # Of n uniform values the largest is above 1 - 20/n but for odds of e^-20.
    assert (1.0 - 20.0 / n) * bound < np.abs(kernel).max() <= bound * (1.0 + 1e-6)
    # Five standard errors: that of a uniform's deviation is sqrt(0.2 / n).
    assert abs(kernel.std() / deviation - 1.0) < 5.0 * np.sqrt(0.2 / n)
    assert abs(kernel.mean()) < 5.0 * deviation / np.sqrt(n)


def test_initial_values_are_those_of_the_paper():
    """Uniform with scale 1; last layers near zero but not at it; biases 0, scales 1."""
    net, last = ONE_LEVEL.clone(channels=16, attention=(8,)), 0
    for name, value in by_name(fresh.params(net, jax.random.key(0), *INPUTS)).items():
        if re.search("(conv2|attention/out|conv_out)/kernel$", name):
            last += 1
            assert np.count_nonzero(value) > 0.999 * value.size
            check_uniform(value, 1e-10)
        elif name.endswith("kernel"):
            check_uniform(value, 1.0)
        else:
            assert name.endswith(("bias", "scale"))
            assert (value == float(name.endswith("scale"))).all()
    # 1 + 2 + 2 residual blocks, 1 + 1 + 2 attention blocks, the end.
    assert last == 5 + 4 + 1


def test_training_drops_by_its_key_and_gradients_are_the_same_with_remat():
    net = ONE_LEVEL.clone(dropout=0.5)
    params = parameters(net, *INPUTS)

    def run(net, params, key):
        rngs = {"dropout": key}
        out = net.apply({"params": params}, *INPUTS, train=True, rngs=rngs)
        return jnp.square(out).sum(), out

    run = quick_jit(jax.value_and_grad(run, 1, has_aux=True), static_argnums=0)
    (_, out), gradients = run(net, params, FAST_KEY)
    (_, again), others = run(net.clone(remat=True), params, FAST_KEY)
    assert_close(again, out, 1e-6)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6 * size)
    jax.tree.map(near, others, gradients)
    (_, other), _ = run(net, params, jax.random.key(1, impl="unsafe_rbg"))
    assert np.abs(other - out).max() > 0.01
    apply = functools.partial(net.apply, {"params": params}, *INPUTS)
    assert "random" not in str(jax.make_jaxpr(apply)())
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(functools.partial(apply, train=True))


def test_remat_stores_far_less_for_the_backward_pass():
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    times = jax.ShapeDtypeStruct((8,), jnp.int32)
    net = unet.UNet(channels=32, multipliers=(1,), attention=(), blocks=1, dropout=0)
    params = shapes(net, 32)

    def stored(net):
        def backward(params, *given):
            return jax.vjp(lambda p: net.apply({"params": p}, *given).sum(), params)[1]

        kept = jax.tree.leaves(jax.eval_shape(backward, params, images, times))
        activations = sum(leaf.size for leaf in kept if leaf.ndim)
        return activations - sum(leaf.size for leaf in jax.tree.leaves(params))

    assert stored(net.clone(remat=True)) < 0.2 * stored(net)


def test_skip_connections_are_joined_by_the_normalisation_alone():
    """It reads them part by part; no convolution reads what is joined."""
    params = {"params": shapes(ONE_LEVEL, 8)}
    text = jax.jit(ONE_LEVEL.apply).lower(params, *INPUTS).as_text()
    # Normalised it is of both, once in each block of the way up.
    assert len(re.findall(r"convolution.*: \(tensor<2x8x8x16xf32>", text)) == 2
    assert not re.search(r"dot_general.*: \(tensor<2x8x8x16xf32>", text)


def test_cast_parameters_give_the_same_bits():
    net = ONE_LEVEL.clone(dtype=jnp.bfloat16, num_classes=3)
    given = *INPUTS, np.array([2, 0])
    params = parameters(net, *given)
    run = quick_jit(lambda params: net.apply({"params": params}, *given))
    cast = unet.cast(params, net.dtype)
    np.testing.assert_array_equal(run(cast), run(params))
    for name, leaf in by_name(cast).items():
        kept = re.search("(bias|scale|_attention/(query|key|value|out)/kernel)$", name)
        assert (leaf.dtype == jnp.float32) == bool(kept), name
    # float32 is left as it is.
    jax.tree.map(np.testing.assert_array_equal, unet.cast(params, jnp.float32), params)
