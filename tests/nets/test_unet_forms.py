"""How the U-Net computes: joined parts, casts and dropout."""

import functools
import itertools
import re

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_unets import (
    ONE_LEVEL,
    by_shape,
    name_of,
    normal,
    parameters,
    quick_jit,
    shapes,
)

from diffusion_jax.nets import dropout, unet
from diffusion_jax.training import parallel

INPUTS = normal(2, 8, 8, 3), np.array([3, 700])


def test_skip_connections_are_joined_by_the_normalisation_alone():
    """It reads them part by part; no convolution reads what is joined."""
    params = {"params": shapes(ONE_LEVEL, 8)}
    text = jax.jit(ONE_LEVEL.apply).lower(params, *INPUTS).as_text()
    # Normalised it is of both, once in each block of the way up.
    assert len(re.findall(r"convolution.*: \(tensor<2x8x8x16xf32>", text)) == 2
    assert not re.search(r"dot_general.*: \(tensor<2x8x8x16xf32>", text)


# Casting once.


def test_cast_parameters_give_the_same_bits():
    net = ONE_LEVEL.clone(dtype=jnp.bfloat16, num_classes=3)
    given = *INPUTS, np.array([2, 0])
    params = parameters(net, *given)
    run = quick_jit(lambda params: net.apply({"params": params}, *given))
    cast = unet.cast(params, net.dtype)
    np.testing.assert_array_equal(run(cast), run(params))
    kept = {
        name_of(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
        if leaf.dtype == jnp.float32
    }
    attention = tuple(
        f"_attention/{n}/kernel" for n in ("query", "key", "value", "out")
    )
    assert kept == {
        name
        for name in by_shape(params)
        if name.endswith(("/bias", "/scale", *attention))
    }
    # float32 is left as it is.
    jax.tree.map(np.testing.assert_array_equal, unet.cast(params, jnp.float32), params)


# Dropout.


def drawn(key, shape, rate):
    """1 / keep where a value is kept, 0 elsewhere."""
    packed, keep = dropout.mask(key, shape, rate)
    return jnp.where(dropout.unpacked(packed, shape[-1]), 1 / keep, 0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1e-6])
def test_dropout_keeps_its_share_and_the_mean(rate):
    run = quick_jit(drawn, static_argnums=(1, 2))
    y = np.asarray(run(jax.random.key(1), (2000, 501), rate))
    kept = y != 0
    error = np.sqrt(rate * (1 - rate) / y.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * error + 2**-17
    # The mean over all 65,536 values of the bits is 1, whatever the rate.
    share = round((1 - rate) * 2**16) / 2**16
    np.testing.assert_allclose(y.max() * share, 1, rtol=1e-6)
    assert abs(share - (1 - rate)) <= 2**-17
    np.testing.assert_allclose(y.var(), rate / (1 - rate), rtol=0.02, atol=1e-5)
    if rate > 0.01:
        # No row, column or neighbour depends on another, nor those of one byte.
        for axis in (0, 1):
            spread = kept.mean(axis).std() * np.sqrt(kept.shape[axis])
            np.testing.assert_allclose(spread, np.sqrt(rate * (1 - rate)), rtol=0.15)
        for apart in range(1, 9):
            pairs = (kept[:, apart:] & kept[:, :-apart]).mean()
            assert abs(pairs - (1 - rate) ** 2) < 1e-2


def test_dropout_takes_any_key_and_gives_each_its_own():
    run = functools.partial(drawn, shape=(64, 63), rate=0.5)
    keys = [
        jax.random.key(0),
        jax.random.key(1),
        jax.random.split(jax.random.key(0))[0],
        jax.random.key(0, impl="rbg"),
    ]
    found = [np.asarray(run(key)) for key in keys]
    for a, b in itertools.combinations(found, 2):
        assert 0.4 < (a == b).mean() < 0.6
    np.testing.assert_array_equal(run(keys[0]), found[0])
    with pytest.raises(ValueError, match=r"below 1; got 1\.0"):
        dropout.mask(keys[0], (1, 8), 1.0)


def test_dropout_on_many_devices_is_that_on_one():
    mesh = parallel.make_mesh()
    run = functools.partial(drawn, shape=(16, 5, 12), rate=0.5)
    spread = NamedSharding(mesh, PartitionSpec(parallel.AXIS))
    many = quick_jit(run, out_shardings=spread)(jax.random.key(0))
    np.testing.assert_array_equal(many, quick_jit(run)(jax.random.key(0)))


def test_network_drops_in_training_alone_and_by_its_key():
    net = ONE_LEVEL.clone(dropout=0.5)
    params = {"params": parameters(net, *INPUTS)}

    def apply(key):
        return net.apply(params, *INPUTS, train=True, rngs={"dropout": key})

    run = quick_jit(apply)
    a, b, c = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.01
    text = str(jax.make_jaxpr(functools.partial(net.apply, params))(*INPUTS))
    assert "random" not in text
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(functools.partial(net.apply, params, *INPUTS, train=True))
