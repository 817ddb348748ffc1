"""First weights, drawn on the host, are those that Flax gives."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from small_unets import ONE_LEVEL

from diffusion_jax.nets import fresh


def test_first_weights_are_those_of_the_network_and_float32_in_any_mode():
    net, key = ONE_LEVEL.clone(num_classes=3), jax.random.key(3)
    given = np.zeros((1, 8, 8, 1), "f4"), np.zeros(1, "f4"), np.zeros(1, np.int32)
    with jax.enable_x64(True):
        wide = fresh.params(net, key, *given)
    mine, flax = fresh.params(net, key, *given), jax.jit(net.init)(key, *given)
    jax.tree.map(np.testing.assert_array_equal, mine, wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), mine)
    assert fresh.shapes(net, *given) == shapes
    # Its normal numbers are rounded as the compiler likes.
    pair = [tree.pop("label")["embedding"] for tree in (mine, flax["params"])]
    np.testing.assert_allclose(*pair, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, mine, flax["params"])


def test_first_weights_of_a_network_that_begins_otherwise_are_refused():
    with pytest.raises(KeyError, match="kernel"):
        fresh.params(nn.Dense(3), jax.random.key(0), np.zeros((1, 2), np.float32))
