"""A network in float64: the same for every batch and device, and only there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_networks

from diffusion_jax.lab.schema.sampling import Sample
from diffusion_jax.lab.trained import exact
from diffusion_jax.lab.wiring import chains
from diffusion_jax.training import parallel

SAMPLES = {
    "digits_conditional": Sample(guidance=2.0, guidance_interval=(0.1, 50.0)),
    "digits_cosine_hybrid": Sample(threshold=0.9),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_x0_is_the_same_for_every_batch_and_number_of_devices(name):
    small = small_networks.small(name, multipliers=(1,), attention=())
    config = dataclasses.replace(small, sample=SAMPLES[name])
    params = small_networks.network_of(config).params
    drawable = chains.Drawable(jax.tree.map(lambda leaf: leaf / 4, params))
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 1))
    rough = jax.jit(lambda x, t: chains.make_denoiser(config, drawable)(x, t).x0)
    before = np.asarray(rough(jnp.asarray(x, jnp.float32), 200))
    eight = exact.denoise64(config, drawable)
    one = exact.denoise64(config, drawable, mesh=parallel.make_mesh(1))
    whole = eight(x, 200)
    assert whole.dtype == np.float64
    assert 1e-8 < np.abs(whole - before).max() < 1e-3
    assert (np.abs(whole) < 0.99).mean() > 0.1
    alone = [one(x[i : i + 1], 200, i) for i in (0, 5, 15)]
    for other in (one(x, 200)[[0, 5, 15]], np.concatenate(alone)):
        assert np.abs(other - whole[[0, 5, 15]]).max() < 1e-13
    # Outside nothing has changed.
    assert jnp.asarray(1.5).dtype == jnp.float32
    np.testing.assert_array_equal(rough(jnp.asarray(x, jnp.float32), 200), before)
