"""Analytic-DPM on Gaussian data, whose Var[x0 | x_t] and best variance are exact."""

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
from oracles import NumpyDDPM

from diffusion_jax import analytic, gaussian, schedule

BETAS = np.linspace(0.002, 0.5, 12)
MADE, TRUTH, KEY = schedule.from_betas(BETAS), NumpyDDPM(BETAS), jax.random.key(0)


@pytest.mark.parametrize("estimator", analytic.ESTIMATORS)
def test_table_is_the_posterior_variance(estimator, x64):
    """trace(Cov[x0 | x_t]) / d for correlated pixels, within five standard errors."""
    data, count = mixtures.one(), 4000
    options = {"estimator": estimator, "chunk": 5}
    denoise, x0 = data.denoiser(MADE), data.draw(count)
    got = analytic.x0_variance(KEY, denoise, MADE, x0, **options)
    alpha, sigma = (a[1:, None] for a in (TRUTH.alphas, TRUTH.sigmas))
    spread = data.spread[0][None]
    total = alpha**2 * spread + sigma**2
    truth = (spread * sigma**2 / total).mean(axis=1)
    # What is averaged is a sum of squares of normal numbers with these variances.
    square = {
        "error": spread * sigma**2 / total,
        "score": (sigma / alpha) ** 2 * sigma**2 / total,
    }[estimator]
    error = np.sqrt(2 * (square**2).sum(axis=1) / count) / spread.size
    assert got.shape == (len(BETAS) + 1,)
    assert got[0] == 0
    assert np.all(np.abs(got[1:] - truth) < 5 * error)
    # Which says something: "score" is lost in its own noise only where that is large.
    assert np.sum(5 * error < 0.25 * truth) >= (5 if estimator == "score" else 12)


def test_every_time_and_image_has_noise_of_its_own(x64):
    """Of data that are 0 the noise is x_t / sigma, and its mean square in the table."""

    def denoise(x_t, t):
        return gaussian.Prediction(0 * x_t, x_t / MADE(t).like(x_t).sigma)

    def squares(count):
        table = analytic.x0_variance(KEY, denoise, MADE, jnp.zeros([count, 3]))
        return 1 - table[1:] * np.exp(MADE(np.arange(1, 13)).logsnr)

    both = np.round([squares(1), squares(2)], 6)
    assert len(np.unique(both)) == 24


def test_bounded(x64):
    """0 below; above, what x_t / alpha leaves, and the data's range (Theorem 2)."""
    ratio = (TRUTH.sigmas / TRUTH.alphas) ** 2
    for half_range, most in ((1.0, 1.0), (np.inf, 99.0), (0.5, 0.25)):
        got = analytic.bounded(np.full(13, 99.0), MADE, half_range=half_range)
        np.testing.assert_allclose(got, np.minimum(ratio, most), rtol=1e-10)
    assert np.all(analytic.bounded(np.full(13, -0.1), MADE) == 0)
    table = 0.5 * np.minimum(ratio, 1)
    np.testing.assert_array_equal(analytic.bounded(table, MADE), table)


def test_attach_looks_up_t(x64):
    x_t, t = jnp.ones([3, 2, 2]), jnp.array([1, 12, 5])
    plain = gaussian.denoiser(lambda x, t: 0.1 * x, MADE, "eps")
    denoise = analytic.attach(plain, np.arange(13) / 10)
    pred = denoise(x_t, t)
    np.testing.assert_allclose(pred.x0_variance[:, 0, 0], [0.1, 1.2, 0.5])
    assert pred.x0_variance.shape == (3, 1, 1)
    np.testing.assert_array_equal(pred.x0, plain(x_t, t).x0)
    np.testing.assert_allclose(denoise(x_t, 7).x0_variance, 0.7)
    lost = jax.jit(denoise)(x_t, jnp.array([-1, 13, 2])).x0_variance
    np.testing.assert_array_equal(np.isnan(lost[:, 0, 0]), [True, True, False])
