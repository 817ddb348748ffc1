"""The implicit sampler against the exact flow and the exact moments of its chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GaussianData, NumpyDDPM, T, chain_moments

from diffusion_jax import grids, samplers, schedule

SHAPE = (2, 2, 1)
LINEAR = NumpyDDPM.named("linear")
LIN = schedule.linear()
KEY = jax.random.key(0)


def gaussian_image():
    """Four correlated pixels with a mean."""
    root = np.random.default_rng(0).normal(size=(4, 4)) * 0.25
    mean = np.random.default_rng(1).uniform(-0.7, 0.7, SHAPE)
    return GaussianData(mean, root @ root.T + 0.01 * np.eye(4))


DATA = gaussian_image()
DENOISE = DATA.denoiser(LINEAR)


def exact_flow(x_t, t):
    """Where the probability flow takes x_t: the same quantile of the data."""
    alpha, noise = LINEAR.alphas[t], LINEAR.noise[t]
    off = (x_t.reshape(len(x_t), -1) - alpha * DATA.mean.ravel()) @ DATA.basis
    scale = np.sqrt(DATA.spread / (alpha**2 * DATA.spread + noise))
    return (DATA.mean.ravel() + (off * scale) @ DATA.basis.T).reshape(x_t.shape)


def test_without_noise_it_converges_to_the_exact_flow_with_order_one(x64):
    start = jnp.asarray(np.random.default_rng(2).normal(size=(16, *SHAPE)))
    truth = exact_flow(np.asarray(start), T)
    rule = samplers.ddim(DENOISE, LIN)
    counts, errors = np.array([62, 125, 250, 500]), []
    for count in counts:
        grid = grids.quadratic(LIN, count)
        x = samplers.sample(KEY, rule, grid, start.shape, start=start)
        errors.append(np.abs(x - truth).max())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope + 1) < 0.2, errors
    assert errors[-1] < 0.02


def test_the_key_does_not_matter_without_noise():
    grid, start = grids.uniform(LIN, 20), jnp.ones([3, *SHAPE])
    rule = samplers.ddim(DENOISE, LIN)
    one, other = (
        samplers.sample(jax.random.key(seed), rule, grid, start.shape, start=start)
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("steps", [10, 1000])
def test_with_all_noise_it_is_ancestral_sampling(steps, x64):
    """Eq. 16, Song et al. 2020, with eta = 1: the same posterior, the same noise."""
    grid, shape = grids.uniform(LIN, steps), (4, *SHAPE)
    ddim = samplers.sample(KEY, samplers.ddim(DENOISE, LIN, eta=1.0), grid, shape)
    rule = samplers.ddpm(DENOISE, LIN, variance="small")
    ddpm = samplers.sample(KEY, rule, grid, shape)
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-9, atol=1e-9)


def test_some_noise_gives_the_data_too():
    """Every eta has the same marginals in the limit of many steps."""
    rule = samplers.ddim(DENOISE, LIN, eta=0.5)
    grid = grids.uniform(LIN, 250)
    x = np.asarray(samplers.sample(KEY, rule, grid, (20_000, *SHAPE)), np.float64)
    flat = x.reshape(len(x), -1)
    _, small, _ = chain_moments(DATA, LINEAR, grid, "small")
    size = np.sqrt(np.outer(np.diag(DATA.cov), np.diag(DATA.cov)))
    assert (np.abs(np.cov(flat.T) - DATA.cov) / size).max() < 0.06
    assert np.abs(flat.mean(0) - DATA.mean.ravel()).max() < 0.02
    assert (np.abs(small - DATA.cov) / size).max() > 0  # no chain is exact
