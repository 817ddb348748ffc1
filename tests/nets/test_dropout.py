"""Which values dropout keeps, and where it stands."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_unets import FAST_KEY, assert_close, normal, parameters, quick_jit

from diffusion_jax.nets import blocks, dropout
from diffusion_jax.training import parallel


def drawn(key, shape, rate):
    """1 / keep where a value is kept, 0 elsewhere."""
    packed, keep = dropout.mask(key, shape, rate)
    return jnp.where(dropout.unpacked(packed, shape[-1]), 1 / keep, 0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1e-6])
def test_it_keeps_its_share_and_the_mean(rate):
    run = quick_jit(drawn, static_argnums=(1, 2))
    y = np.asarray(run(jax.random.key(1), (2000, 501), rate))
    kept = y != 0
    error = np.sqrt(rate * (1 - rate) / y.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * error + 2**-17
    # The mean over all 65,536 values of the bits is 1, whatever the rate.
    share = round((1 - rate) * 2**16) / 2**16
    np.testing.assert_allclose(y.max() * share, 1, rtol=1e-6)
    if rate > 0.01:
        # No row, column or neighbour depends on another, nor those of one byte.
        for axis in (0, 1):
            spread = kept.mean(axis).std() * np.sqrt(kept.shape[axis])
            np.testing.assert_allclose(spread, np.sqrt(rate * (1 - rate)), rtol=0.15)
        for apart in range(1, 9):
            pairs = (kept[:, apart:] & kept[:, :-apart]).mean()
            assert abs(pairs - (1 - rate) ** 2) < 1e-2


def test_it_takes_any_key_and_gives_each_its_own_on_any_number_of_devices():
    run = functools.partial(drawn, shape=(64, 63), rate=0.5)
    keys = jax.random.split(jax.random.key(0))
    keys = [jax.random.key(0), *keys, jax.random.key(0, impl="rbg")]
    found = [np.asarray(run(key)) for key in keys]
    for a, b in itertools.combinations(found, 2):
        assert 0.4 < (a == b).mean() < 0.6
    spread = NamedSharding(parallel.make_mesh(), PartitionSpec(parallel.AXIS))
    many = quick_jit(run, out_shardings=spread)(keys[0])
    np.testing.assert_array_equal(many, found[0])
    with pytest.raises(ValueError, match=r"below 1; got 1\.0"):
        dropout.mask(keys[0], (1, 8), 1.0)


def test_it_is_of_what_the_last_convolution_reads():
    rate, read = 0.1, []
    block = blocks.ResBlock(8, 4, rate, "xla", jnp.float32)
    args = blocks.Activation((normal(2, 6, 6, 8),), normal(8)), normal(2, 8, seed=2)
    params = {"params": parameters(block, *args, None)}

    def listen(module, args, kwargs, context):
        if context.module.name == "conv2":
            read.append(args[0])
        return module(*args, **kwargs)

    for key in (FAST_KEY, None):
        with nn.intercept_methods(listen):
            block.apply(params, *args, key)
    dropped, before = (np.asarray(x) for x in read)
    factors = drawn(FAST_KEY, before.shape, rate)
    assert_close(dropped, before * factors, 2e-6)
    assert 0.5 * rate < np.mean(factors == 0) < 2 * rate
