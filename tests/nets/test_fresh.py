"""First weights, drawn on the host, are those that Flax gives."""

from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest

from diffusion_jax.lab.schema.config import Config, Data, Net
from diffusion_jax.lab.wiring import build
from diffusion_jax.nets import fresh

SMALL = Config(
    data=Data(image_size=8, channels=1),
    net=Net(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4),
)


@pytest.mark.parametrize("classes", [0, 3])
def test_first_weights_are_those_of_the_network(classes):
    """And float32, also where JAX computes in float64."""
    net = replace(SMALL.net, classes=classes)
    net, key = build.make_network(replace(SMALL, net=net)), jax.random.key(3)
    label = np.zeros(1, np.int32) if classes else None
    inputs = np.zeros((1, 8, 8, 1), np.float32), np.zeros(1, np.float32), label
    with jax.enable_x64(classes == 0):
        mine, flax = fresh.params(net, key, *inputs), jax.jit(net.init)(key, *inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(mine)} == {np.dtype(np.float32)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), mine)
    assert fresh.shapes(net, *inputs) == shapes
    if classes:  # its normal numbers are rounded as the compiler likes
        pair = [tree.pop("label")["embedding"] for tree in (mine, flax["params"])]
        np.testing.assert_allclose(*pair, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, mine, flax["params"])


def test_first_weights_of_a_network_that_begins_otherwise_are_refused():
    with pytest.raises(KeyError, match="kernel"):
        fresh.params(nn.Dense(3), jax.random.key(0), np.zeros((1, 2), np.float32))
