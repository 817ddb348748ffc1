"""Scale and bound of latents, where moments and densities are known."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from diffusion_jax import autoencoding, gaussian, latents, likelihood, schedule


def batches(*sizes):
    """Moments with channels far from 0, of very different deviations."""
    rng = np.random.default_rng(0)
    for size in sizes:
        mean = rng.normal([100.0, 0.0, -3.0], [0.1, 2.0, 0.0], (size, 2, 5, 3))
        yield mean, rng.normal(-1.0, 0.5, mean.shape)


def test_scaled_latents_have_mean_0_and_variance_1_whatever_the_batches():
    parts, all_but = list(batches(7, 1, 24)), (0, 1, 2)
    scale = latents.fit(parts)
    mean, log_variance = (np.concatenate(a) for a in zip(*parts, strict=True))
    total = mean.var(axis=all_but) + np.exp(log_variance).mean(axis=all_but)
    np.testing.assert_allclose(scale.shift, mean.mean(axis=all_but), rtol=1e-12)
    np.testing.assert_allclose(scale.scale, total**-0.5, rtol=1e-12)


def test_inverting_and_applying_are_each_other_and_variances_follow():
    scale = latents.Scale(np.array([1.0, -2.0]), np.array([0.18215, 3.0]))
    z = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)
    seen = scale.apply(z)
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen, (z - scale.shift) * scale.scale, rtol=1e-5)
    np.testing.assert_allclose(scale.invert(seen), z, atol=1e-6)
    expected = z + 2 * np.log(scale.scale)
    np.testing.assert_allclose(scale.log_variance(z), expected, rtol=1e-5, atol=1e-5)


def test_moments_that_give_no_scale_are_refused(refuses):
    mean, log_variance = next(batches(4))
    with refuses("none"):
        latents.fit([])
    for wrong in (np.nan, np.inf):
        spoiled = mean.copy()
        spoiled[0, 0, 0, 1] = wrong
        with refuses("some that are not"):
            latents.fit([(mean, log_variance), (spoiled, log_variance)])
    for spread, got in ((-np.inf, "1 that do not"), (1e5, "some that are not")):
        with refuses(got):
            latents.fit([(mean, np.full_like(mean, spread))])


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
        error = autoencoding.reconstruction(x, guess, np.log(noise), kind="l2")
        told = 0.5 * (error / 5 + np.log(2 * np.pi)) / np.log(2)
        options = {"real": True, "chunk": 8}
        steps = likelihood.bound(key, best(LEVELS), LEVELS, z, **options)
        options["draws"] = 16
        real = likelihood.continuous_bound(key, best(STRAIGHT), STRAIGHT, z, **options)
        entropy = scale.log_variance(log_variance)
        return [
            latents.bound(told, bits.total, entropy, dimensions=5)
            for bits in (steps, real)
        ]

    for bits in run(jax.random.key(0)):
        off = np.asarray(bits.total) - exact / (5 * np.log(2))
        error = off.std() / np.sqrt(len(x))
        assert error < 0.01
        assert abs(off.mean()) < 4 * error + 1e-3
        assert bits.rate.mean() > 0
        np.testing.assert_allclose(bits.total, bits.reconstruction + bits.rate)
