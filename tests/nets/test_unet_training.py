"""Where training of the U-Net starts, its gradients, and rematerialisation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_unets import (
    FAST_KEY,
    assert_close,
    name_of,
    normal,
    parameters,
    quick_jit,
    shapes,
)

from diffusion_jax.nets import unet

# The smallest network that has every kind of block.
LABELLED = unet.UNet(
    channels=8,
    multipliers=(1, 2),
    attention=(4,),
    groups=4,
    blocks=1,
    num_classes=3,
    dropout=0.2,
)


def by_name(tree):
    """Leaves by their path."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): np.asarray(leaf) for path, leaf in pairs}


def is_near_zero(name):
    return re.search("(conv2|attention/out|conv_out)/kernel$", name) is not None


# Initial values.


@pytest.fixture(scope="session")
def initial():
    net = unet.UNet(channels=16, multipliers=(1,), attention=(4,), groups=4, blocks=1)
    x, t = np.zeros([1, 4, 4, 3], np.float32), np.zeros(1, np.int32)
    return by_name(quick_jit(net.init)(FAST_KEY, x, t)["params"])


def check_uniform(kernel, scale):
    """Checks bound, spread and centre of a fan-average uniform initialiser."""
    taps = np.prod(kernel.shape[:-2], initial=1.0)
    fan = taps * (kernel.shape[-2] + kernel.shape[-1]) / 2.0
    bound, n = np.sqrt(3.0 * scale / fan), kernel.size
    # Of n uniform values the largest is above 1 - 20/n but for odds of e^-20.
    assert (1.0 - 20.0 / n) * bound < np.abs(kernel).max() <= bound * (1.0 + 1e-6)
    deviation = np.sqrt(scale / fan)
    # Five standard errors: that of a uniform's deviation is sqrt(0.2 / n).
    assert abs(kernel.std() / deviation - 1.0) < 5.0 * np.sqrt(0.2 / n)
    assert abs(kernel.mean()) < 5.0 * deviation / np.sqrt(n)


def test_initial_values_are_those_of_the_paper(initial):
    """Uniform with scale 1; last layers near zero but not at it; biases 0, scales 1."""
    kernels = {name for name in initial if name.endswith("kernel")}
    last = set(filter(is_near_zero, initial))
    # 1 + 2 + 2 residual blocks, 1 + 1 + 2 attention blocks, the end.
    assert len(last) == 5 + 4 + 1
    others = {"conv_in/kernel", "time1/kernel", "up0_block0/shortcut/kernel"}
    assert others <= kernels - last
    for name, value in initial.items():
        if name in last:
            assert np.count_nonzero(value) > 0.999 * value.size
            check_uniform(value.astype(np.float64), 1e-10)
        elif name in kernels:
            check_uniform(value.astype(np.float64), 1.0)
        else:
            assert name.endswith(("bias", "scale"))
            assert (value == float(name.endswith("scale"))).all()


# Gradients.


def training_gradients(net):
    """A jitted function of parameters to the loss of a training step and gradients."""
    x, t, label = normal(2, 8, 8, 3), np.array([3, 700]), np.array([2, 0])
    images = normal(2, 8, 8, 3, seed=5)

    def loss(params):
        rngs = {"dropout": FAST_KEY}
        out = net.apply({"params": params}, x, t, label, train=True, rngs=rngs)
        return jnp.square(out - images).sum()

    return quick_jit(jax.value_and_grad(loss))


def test_gradients_reach_every_parameter_with_remat_and_without():
    params = parameters(LABELLED, normal(2, 8, 8, 3), np.zeros(2), np.zeros(2, int))
    value, grads = training_gradients(LABELLED)(params)
    other, again = training_gradients(LABELLED.clone(remat=True))(params)
    assert_close(other, value, 1e-6)
    grads, again = by_name(grads), by_name(again)
    size = max(np.abs(grad).max() for grad in grads.values())
    for name, grad in grads.items():
        np.testing.assert_allclose(again[name], grad, rtol=1e-6, atol=1e-6 * size)
    grads = {name: np.abs(grad) for name, grad in grads.items()}
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), name
        if name.endswith("key/bias"):
            # A constant added to all scores of a query cancels in the softmax.
            assert grad.max() < 1e-4 * grads[name.replace("key", "query")].max(), name
        elif name == "label/embedding":
            assert (grad[[0, 2]] > 0).all()
            assert not grad[1].any()  # No image of the batch has this label.
        else:
            assert (grad > 0).all(), name


# Rematerialisation.


def test_remat_stores_far_less_for_the_backward_pass():
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    times = jax.ShapeDtypeStruct((8,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def stored(net):
        def backward(params, x, t, key):
            def run(params):
                rngs = {"dropout": key}
                return net.apply({"params": params}, x, t, train=True, rngs=rngs).sum()

            return jax.vjp(run, params)[1]

        params = shapes(net, 32)
        residuals = jax.tree.leaves(
            jax.eval_shape(backward, params, images, times, key)
        )
        activations = sum(leaf.size for leaf in residuals if leaf.ndim)
        return activations - sum(leaf.size for leaf in jax.tree.leaves(params))

    net = unet.UNet(channels=32, multipliers=(1,), attention=(), blocks=1)
    assert stored(net.clone(remat=True)) < 0.2 * stored(net)
