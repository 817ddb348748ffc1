"""The whole-chain bound against exact likelihoods and its own terms."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from diffusion_jax import gaussian, likelihood, losses, schedule

GRID = np.linspace(-1, 1, 256)


def test_bound_of_gaussian_data_is_their_exact_likelihood():
    """With the best network and variance p(x_s | x_t) is q(x_s | x_t), and the bound is
    the entropy itself."""
    mean, deviation = 0.1, 0.25
    # The first step is wider than a bin: the denoiser is that of unrounded data.
    levels = schedule.cosine(8)

    def denoise(x_t, t):
        level = levels(t).like(x_t)
        total = (level.alpha * deviation) ** 2 + level.sigma**2
        gain = level.alpha * deviation**2 / total
        x0 = mean + gain * (x_t - level.alpha * mean)
        spread = deviation**2 * level.sigma**2 / total
        eps = (x_t - level.alpha * x0) / level.sigma
        return gaussian.Prediction(x0, eps, x0_variance=spread)

    # Probabilities of the 256 values, the outer bins open.
    edges = np.concatenate([[-np.inf], (GRID[1:] + GRID[:-1]) / 2, [np.inf]])
    mass = np.diff(scipy.stats.norm.cdf(edges, mean, deviation))
    drawn = np.random.default_rng(0).choice(256, size=(2000, 1000), p=mass)
    exact = -np.log2(mass[drawn]).mean(axis=1)
    key, x0 = jax.random.key(0), jnp.asarray(GRID[drawn], jnp.float32)
    bits = jax.jit(
        lambda x0: likelihood.bound(key, denoise, levels, x0, variance="analytic")
    )(x0)
    # Both sides are means over the same data; what is left is the noise of x_t.
    differences = np.asarray(bits.total) - exact
    assert differences.std() / np.sqrt(len(drawn)) < 1e-3
    assert abs(differences.mean()) < 3e-3
    assert 4 < exact.mean() < 8


def test_the_bound_is_its_prior_and_its_terms():
    """Terms are those of `losses.vlb`, which are held to NumPy, at the noise of each.

    Times that are evaluated together change nothing.
    """
    levels = schedule.linear(10)  # far from noise: the prior is most of it
    denoise = gaussian.denoiser(lambda x, t: 0.5 * x, levels, "x0")
    x0, key = jnp.asarray(GRID[::32].reshape(4, 2), jnp.float32), jax.random.key(0)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(4))
    for variance, chunk in (("small", 1), ("large", 300)):
        options = {"variance": variance, "chunk": chunk}
        bits = likelihood.bound(key, denoise, levels, x0, **options)
        np.testing.assert_allclose(bits.prior, losses.prior(x0, levels(10)), rtol=1e-6)
        total = bits.prior + bits.terms.sum(axis=0)
        np.testing.assert_allclose(bits.total, total, rtol=1e-6)
        for t, (term, mse) in enumerate(zip(bits.terms, bits.mse, strict=True), 1):
            times = jnp.full(4, t)
            x_t = gaussian.q_sample(
                x0, gaussian.normal(fold(keys, t), (4, 2)), levels(times)
            )
            pred = denoise(x_t, times)
            expected = losses.vlb(pred, x0, x_t, levels, times, variance=variance)
            np.testing.assert_allclose(term, expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(mse, ((pred.x0 - x0) ** 2).mean(1), rtol=1e-5)


def test_rate_is_what_was_received_before_the_estimate():
    """Table 4: the rate after all steps is the bound without L_0."""
    rng = np.random.default_rng(0)
    terms, mse = rng.uniform(0, 1, 6), np.linspace(0.1, 0.6, 6)
    code = likelihood.rate_distortion(np.float64(0.01), terms, mse)
    np.testing.assert_array_equal(code.steps, [1, 2, 3, 4, 5, 6])
    received = [0.01 + terms[6 - n :].sum() for n in range(6)]
    np.testing.assert_allclose(code.rate, received)
    np.testing.assert_allclose(code.distortion, 127.5 * np.sqrt(mse[::-1]))


@schedule.Timed
def line(t):
    """A schedule whose log-SNR falls from 6 to -4 in a straight line."""
    return schedule.preserving(6 - 10 * jnp.asarray(t, float))


def test_the_times_of_the_continuous_bound_leave_no_gap(x64):
    """A loss of t bits/dim at t: its mean over n even times is within 1 / 2n of 1/2.

    Over examples it is 1/2 itself: each time is uniform.
    """

    def denoise(x_t, t):
        # For x0 = 0 the noise is known; off by what costs t bits/dim at slope 10.
        eps = x_t / line(t).like(x_t).sigma
        off = jnp.sqrt(t * np.log(4) / 10).reshape(-1, 1)
        return gaussian.Prediction(0 * x_t, eps + off)

    bits = likelihood.continuous_bound(
        jax.random.key(0), denoise, line, jnp.zeros([1000, 2]), draws=8, chunk=3
    )
    off = np.asarray(bits.diffusion) - 0.5
    assert np.abs(off).max() <= 1 / 16
    assert np.abs(off).max() > 0.99 / 16
    assert abs(off.mean()) < 4.5 * off.std() / np.sqrt(len(off))
