"""Scale and bound of latents, where moments and densities are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffusion_jax import (
    autoencoding,
    gaussian,
    grids,
    latents,
    likelihood,
    samplers,
    schedule,
)
from diffusion_jax.evaluation import metrics, moments


def batches(*sizes, seed=0):
    """Moments with channels far from 0, of very different deviations."""
    rng = np.random.default_rng(seed)
    for size in sizes:
        mean = rng.normal([100.0, 0.0, -3.0], [0.1, 2.0, 0.0], (size, 2, 5, 3))
        yield mean, rng.normal(-1.0, 0.5, mean.shape)


def test_scaled_latents_have_mean_0_and_variance_1_whatever_the_batches():
    scale = latents.fit(batches(7, 1, 24))
    mean, log_variance = (
        np.concatenate(a) for a in zip(*batches(7, 1, 24), strict=True)
    )
    total = mean.var(axis=(0, 1, 2)) + np.exp(log_variance).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(scale.shift, mean.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(scale.scale, total**-0.5, rtol=1e-12)
    drawn = np.random.default_rng(1).normal(mean, np.exp(0.5 * log_variance))
    seen = np.asarray(scale.apply(drawn.astype(np.float32)))
    assert np.all(abs(seen.mean(axis=(0, 1, 2))) < 0.2)
    assert np.all(abs(seen.std(axis=(0, 1, 2)) - 1) < 0.1)


def test_inverting_and_applying_are_each_other_and_variances_follow():
    scale = latents.Scale(np.array([1.0, -2.0]), np.array([0.18215, 3.0]))
    z = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)
    np.testing.assert_allclose(scale.invert(scale.apply(z)), z, atol=1e-6)
    both = scale.apply(np.stack([z, z + 1]))
    assert both.dtype == np.float32
    np.testing.assert_allclose(
        scale.log_variance(z) - z,
        np.broadcast_to(2 * np.log((both[1] - both[0])[0, 0, 0]), z.shape),
        rtol=1e-5,
    )


def test_moments_that_give_no_scale_are_refused(refuses):
    mean, log_variance = next(batches(4))
    with refuses("none"):
        latents.fit([])
    for wrong in (np.nan, np.inf):
        spoiled = mean.copy()
        spoiled[0, 0, 0, 1] = wrong
        with refuses("some that are not"):
            latents.fit([(mean, log_variance), (spoiled, log_variance)])
    with refuses("1 that do not"):
        latents.fit([(mean, np.full_like(mean, -np.inf))])
    with pytest.raises(ValueError, match="some that are not"):
        latents.fit([(mean, np.full_like(mean, 1e5))])


# Eigenvalues and their vectors, of data that two latents explain up to noise.
VALUES = np.array([4.0, 1.5, 0.2, 0.2, 0.2])
TURN = scipy.stats.ortho_group.rvs(5, random_state=np.random.default_rng(0))
COVARIANCE = TURN @ np.diag(VALUES) @ TURN.T
LEVELS = schedule.cosine(8)
STRAIGHT = schedule.Timed(lambda t: schedule.preserving(10.0 - 16.0 * t))


def best(levels):
    """The denoiser of data from N(0, I)."""

    def denoise(x_t, t):
        level = levels(t).like(x_t)
        return gaussian.Prediction(level.alpha * x_t, level.sigma * x_t)

    return denoise


def test_the_bound_of_images_is_exact_where_all_is_linear_and_gaussian():
    """Probabilistic PCA: between bound and density is only the noise of the draws."""
    noise = VALUES[-1]
    decoder = TURN[:, :2] * np.sqrt(VALUES[:2] - noise)
    x = np.random.default_rng(1).multivariate_normal(np.zeros(5), COVARIANCE, 16_000)
    exact = -scipy.stats.multivariate_normal(np.zeros(5), COVARIANCE).logpdf(x)
    # The posterior of latents that the decoder takes on another scale.
    gain = np.linalg.inv(decoder.T @ decoder + noise * np.eye(2))
    scale = latents.Scale(np.array([3.0, -1.0]), np.array([0.2, 5.0]))
    mean = scale.invert(jnp.asarray(x @ decoder @ gain))
    spread = jnp.log(noise * np.diag(gain)) - 2 * jnp.log(scale.scale)
    log_variance = jnp.broadcast_to(spread[None], mean.shape)

    @jax.jit
    def run(key):
        drawn = gaussian.normal(key, mean.shape)
        z = scale.apply(mean + jnp.exp(0.5 * log_variance) * drawn)
        guess = scale.apply(scale.invert(z)) @ decoder.T
        nats = 0.5 * (
            autoencoding.reconstruction(x, guess, np.log(noise), kind="l2")
            + 5 * np.log(2 * np.pi)
        )
        options = {"real": True, "chunk": 8}
        of_latents = (
            likelihood.bound(key, best(LEVELS), LEVELS, z, **options),
            likelihood.continuous_bound(
                key, best(STRAIGHT), STRAIGHT, z, draws=16, **options
            ),
        )
        return [
            latents.bound(
                nats / (5 * np.log(2)),
                bits.total,
                scale.log_variance(log_variance),
                dimensions=5,
            )
            for bits in of_latents
        ]

    for bits in run(jax.random.key(0)):
        off = np.asarray(bits.total) - exact / (5 * np.log(2))
        error = off.std() / np.sqrt(len(x))
        assert error < 0.01
        assert abs(off.mean()) < 4 * error + 1e-3
        assert bits.rate.mean() > 0
        np.testing.assert_allclose(bits.total, bits.reconstruction + bits.rate)


def test_what_a_model_of_latents_lacks_is_what_the_decoder_cannot_say():
    """The Frechet distance of decoded samples is the sum of eigenvalues left out."""
    flat = np.random.default_rng(2).normal(size=(4000, 2)) * np.sqrt(VALUES[:2])
    # Exact second moments.
    flat -= flat.mean(axis=0)
    flat = flat @ np.linalg.inv(np.linalg.cholesky(np.cov(flat.T, ddof=0))).T
    flat = flat * np.sqrt(VALUES[:2])
    scale = latents.fit([(flat[:, None, None], np.full((4000, 1, 1, 2), -np.inf))])
    np.testing.assert_allclose(scale.scale, VALUES[:2] ** -0.5)
    levels = schedule.linear()
    rule = samplers.ddpm(best(levels), levels, variance="large")
    grid = grids.quadratic(levels, 20)
    z = samplers.sample(jax.random.key(0), rule, grid, (20_000, 1, 1, 2))
    decoded = np.asarray(scale.invert(z)).reshape(-1, 2) @ TURN[:, :2].T
    found = metrics.frechet_distance(
        *moments.finish(moments.update(moments.init(5), decoded)),
        np.zeros(5),
        COVARIANCE,
    )
    assert abs(found - VALUES[2:].sum()) < 0.01
