"""Arithmetic is counted as one counts it by hand."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.lab.speed import arithmetic
from diffusion_jax.nets import unet

LAYOUT = ("NHWC", "HWIO", "NHWC")


def of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("strides", [1, 2])
def test_a_convolution_counts_its_taps_and_a_gradient_as_many_again(strides):
    """Of the input and of the kernel: each pairs the same numbers once.

    At the edges a stride leaves out a row of taps or counts one more.
    """
    x, kernel = of(2, 32, 32, 3), of(3, 3, 3, 5)

    def loss(x, kernel):
        made = jax.lax.conv_general_dilated(
            x, kernel, (strides, strides), "SAME", dimension_numbers=LAYOUT
        )
        return (made**2).sum()

    forward = arithmetic.count(loss, x, kernel)
    assert forward == 2 * 2 * (32 // strides) ** 2 * 5 * 3 * 9
    for wanted in (0, 1):
        both = arithmetic.count(jax.grad(loss, argnums=wanted), x, kernel)
        assert abs(both / forward - 2) < (0.001 if strides == 1 else 0.15)


def test_loops_count_as_often_as_they_run(refuses):
    def looped(a):
        return jax.lax.scan(lambda x, _: (x @ a, None), a, None, length=7)[0]

    assert arithmetic.count(jax.jit(looped), of(4, 4)) == 7 * 2 * 4**3
    assert arithmetic.count(jax.vmap(looped), of(3, 4, 4)) == 3 * 7 * 2 * 4**3

    def branch(a):
        return jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a @ a, a)

    assert arithmetic.count(branch, of(4, 4)) == 2 * 2 * 4**3

    def until(a):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, a)

    with refuses("while loop"):
        arithmetic.count(until, of(4, 4))


def test_the_network_of_the_paper():
    """11.50 GFLOP an image, and a little for all of them; three times that with the
    gradient, but for the first layer, whose input needs none, and for what doubles.
    """
    net = unet.UNet()
    x, t = of(1, 32, 32, 3), of(1)
    params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    forward = arithmetic.count(net.apply, params, x, t)
    two = arithmetic.count(net.apply, params, of(2, 32, 32, 3), of(2))
    # As the network is written down, but for two of the four products of 256 channels
    # in five attentions of 256 pixels, and one of 16.
    spared = 2 * 2 * (5 * 256 + 16) * 256**2
    # To double 16 to 32 pixels takes 17 by 17 corners of four pixels each.
    plain, spread = ([2 * n * k**2 * 256**2 for k in (4, 8, 16)] for n in (36, 16))
    corners = 2 * 17**2 * 16 * 256**2
    assert two - forward == 12_443_713_536 - spared - (plain[2] - corners)
    # Which are products of parameters in their place, with their biases.
    folded = 6 * 2 * 2 * 257 * 256**2
    assert 0 < forward - (two - forward) - folded < 0.001 * forward
    first = 2 * 32 * 32 * 9 * 3 * 128 + 2 * 128 * 512
    gradient = arithmetic.count(
        jax.grad(lambda p, x, t: net.apply(p, x, t).sum()), params, x, t
    )
    doubling = sum(spread) + sum(plain) - 2 * (plain[0] + plain[1] + corners)
    assert abs(gradient - (3 * forward - first + doubling)) < 1e-4 * gradient
    # Patches times kernel are the arithmetic of what is written down.
    other = unet.UNet(conv="matmul")
    written = forward + plain[2] - corners
    assert arithmetic.count(other.apply, params, x, t) == written
