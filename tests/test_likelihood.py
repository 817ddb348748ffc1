"""The whole-chain bound against exact likelihoods and against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats

from diffusion_jax import continuous, gaussian, likelihood, losses, schedule

GRID = np.linspace(-1, 1, 256)


def discretised_normal(mean, deviation):
    """Probabilities of the 256 values, the outer bins open."""
    edges = np.concatenate([[-np.inf], (GRID[1:] + GRID[:-1]) / 2, [np.inf]])
    return np.diff(scipy.stats.norm.cdf(edges, mean, deviation))


def exact_denoiser(mean, deviation, levels):
    """The best network for normal data, and the exact variance of each reverse step.

    With both, p(x_s | x_t) is q(x_s | x_t), and the bound is the entropy itself.
    """

    def denoise(x_t, t):
        level, prev = levels(t).like(x_t), levels(t - 1).like(x_t)
        signal, noise = (level.alpha * deviation) ** 2, level.sigma**2
        gain = level.alpha * deviation**2 / (signal + noise)
        x0 = mean + gain * (x_t - level.alpha * mean)
        spread = deviation**2 * noise / (signal + noise)
        # c0^2 Var[x0 | x_t] + Var[x_s | x_t, x0], by the law of total variance.
        c0, variance = gaussian.q_posterior(
            jnp.ones_like(x_t), jnp.zeros_like(x_t), level, prev
        )
        log_variance = jnp.log(variance + c0**2 * spread)
        eps = (x_t - level.alpha * x0) / level.sigma
        return gaussian.Prediction(x0, eps, log_variance)

    return denoise


@pytest.mark.parametrize("make", [schedule.linear, schedule.cosine])
def test_bound_of_gaussian_data_is_their_exact_likelihood(make):
    mean, deviation = 0.1, 0.25
    # The first step is wider than a bin: the denoiser is that of unrounded data.
    ends = {} if make is schedule.cosine else {"beta_start": 0.02, "beta_end": 0.9}
    levels = make(8, **ends)
    mass = discretised_normal(mean, deviation)
    drawn = np.random.default_rng(0).choice(256, size=(12000, 1000), p=mass)
    exact = -np.log2(mass[drawn]).mean()
    denoise = exact_denoiser(mean, deviation, levels)
    bits = jax.jit(
        lambda key, x0: likelihood.bound(key, denoise, levels, x0, variance="learned")
    )(jax.random.key(0), jnp.asarray(GRID[drawn], jnp.float32))
    # Both sides are means over the same data; what is left is the noise of x_t.
    differences = np.asarray(bits.total) + np.log2(mass[drawn]).mean(axis=1)
    assert differences.std() / np.sqrt(len(drawn)) < 4e-4
    assert abs(bits.total.mean() - exact) < 1e-3
    assert 4 < exact < 8


@pytest.mark.parametrize("variance", ["small", "large"])
def test_bound_and_terms_equal_plain_numpy(variance):
    truth, levels = oracles.NumpyDDPM.named("linear"), schedule.linear()
    drawn = np.random.default_rng(1).normal(128, 30, (4, 2, 2, 1))
    x0 = GRID[np.clip(np.rint(drawn), 0, 255).astype(int)]
    key = jax.random.key(2)
    # E[eps | x_t] = gain x_t for data from N(0, 0.25^2), by what a network counts as t.
    gain = truth.sigmas / (truth.alphas_bar * 0.25**2 + truth.noise)

    def network(x, t):
        return jnp.asarray(gain[1:], jnp.float32)[t].reshape(-1, 1, 1, 1) * x

    denoise = gaussian.denoiser(network, levels, "eps", clip=True)
    bits = jax.jit(
        lambda x: likelihood.bound(key, denoise, levels, x, variance=variance)
    )(jnp.asarray(x0, jnp.float32))

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(4))
    draw = jax.jit(lambda k: gaussian.normal(k, x0.shape))
    terms, mse = np.zeros((1000, 4)), np.zeros((1000, 4))
    for t in range(1, 1001):
        folded = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        times, eps = np.full(4, t), np.asarray(draw(folded), np.float64)
        x_t = truth.q_sample(x0, eps, times)
        output = gain[t] * x_t
        guess = np.clip(truth.x0_from_eps(x_t, output, times), -1, 1)
        log_variance = truth.log_variance(variance, times).reshape(-1, 1, 1, 1)
        terms[t - 1] = truth.bound_term(x0, x_t, guess, times, log_variance)
        mse[t - 1] = ((guess - x0) ** 2).mean(axis=(1, 2, 3))
    total = truth.prior(x0) + terms.sum(axis=0)
    assert np.abs(bits.total - total).max() < 1e-4  # bits/dim
    np.testing.assert_allclose(bits.terms, terms, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(bits.mse, mse, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(bits.prior, truth.prior(x0), rtol=1e-4)


@pytest.mark.parametrize("chunk", [3, 10, 100])
def test_chunks_change_memory_and_nothing_else(chunk):
    levels = schedule.linear(10)
    denoise = gaussian.denoiser(lambda x, t: 0.5 * x, levels, "x0")
    x0, key = jnp.asarray(GRID[::32].reshape(4, 2), jnp.float32), jax.random.key(0)
    one = likelihood.bound(key, denoise, levels, x0)
    many = likelihood.bound(key, denoise, levels, x0, chunk=chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, many)


def test_an_example_does_not_depend_on_its_batch():
    levels = schedule.linear(10)
    denoise = gaussian.denoiser(lambda x, t: 0.5 * x, levels, "x0")
    x0 = jnp.asarray(GRID[::32].reshape(4, 2), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    whole = likelihood.bound(keys, denoise, levels, x0)
    part = likelihood.bound(keys[2:], denoise, levels, x0[2:])
    np.testing.assert_allclose(part.total, whole.total[2:], rtol=1e-6)


def test_rate_is_what_was_received_before_the_estimate():
    """Table 4: the rate after all steps is the bound without L_0."""
    rng = np.random.default_rng(0)
    terms, mse = rng.uniform(0, 1, 6), np.linspace(0.1, 0.6, 6)
    code = likelihood.rate_distortion(np.float64(0.01), terms, mse)
    np.testing.assert_array_equal(code.steps, [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(code.rate[0], 0.01)
    np.testing.assert_allclose(code.rate[1], 0.01 + terms[5])
    np.testing.assert_allclose(code.rate[-1], 0.01 + terms[1:].sum())
    np.testing.assert_allclose(code.distortion[[0, -1]], 127.5 * np.sqrt([0.6, 0.1]))
    assert np.all(np.diff(code.rate) >= 0)


def test_a_perfect_network_pays_for_the_prior_and_the_decoder_alone():
    levels = schedule.linear(1000)
    x0 = jnp.zeros([3, 4]).at[0, 0].set(1.0)
    denoise = gaussian.denoiser(lambda x, t: x0, levels, "x0")
    bits = likelihood.bound(jax.random.key(0), denoise, levels, x0, variance="small")
    assert np.abs(bits.terms[1:]).max() < 1e-9
    expected = losses.prior(x0, levels(1000)) + bits.terms[0]
    np.testing.assert_allclose(bits.total, expected, rtol=1e-6)


def test_bound_of_an_exploding_chain_is_the_exact_likelihood(x64):
    """From data without noise to fifty times their range, where alpha = 1.

    What it costs that the prior does not know the data is below 1e-4 bits/dim.
    """
    mean, deviation = 0.1, 0.25
    made = continuous.discretize(continuous.ve(sigma_min=0.01), 12)
    log_alpha, logsnr = (np.array(table) for table in schedule.tables(made))
    # The first step with noise is wider than a bin: see above.
    levels = schedule.from_tables(log_alpha[1:], np.append(np.inf, logsnr[2:]))
    mass = discretised_normal(mean, deviation)
    drawn = np.random.default_rng(3).choice(256, size=(3000, 1000), p=mass)
    denoise = exact_denoiser(mean, deviation, levels)
    bits = jax.jit(
        lambda key, x0: likelihood.bound(key, denoise, levels, x0, variance="learned")
    )(jax.random.key(0), jnp.asarray(GRID[drawn], jnp.float32))
    differences = np.asarray(bits.total) + np.log2(mass[drawn]).mean(axis=1)
    assert differences.std() / np.sqrt(len(drawn)) < 1e-3
    assert abs(differences.mean()) < 3e-3
    assert 0 < bits.prior.mean() < 1e-4


def line(t):
    """A schedule whose log-SNR falls from 6 to -4 in a straight line."""
    logsnr = 6 - 10 * jnp.asarray(t, float)
    return schedule.NoiseLevel(0.5 * jax.nn.log_sigmoid(logsnr), logsnr)


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
        jax.random.key(0), denoise, line, jnp.zeros([4000, 2]), draws=8
    )
    off = np.asarray(bits.diffusion) - 0.5
    assert np.abs(off).max() <= 1 / 16
    assert np.abs(off).max() > 0.99 / 16
    assert abs(off.mean()) < 4.5 * off.std() / np.sqrt(len(off))


def test_continuous_bound_of_an_example_depends_on_its_key_alone():
    denoise = gaussian.denoiser(lambda x, t: 0.5 * x, line, "x0")
    x0 = jnp.asarray(GRID[::32].reshape(4, 2), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4)

    @functools.partial(jax.jit, static_argnums=2)
    def bits(keys, x0, chunk=1):
        return likelihood.continuous_bound(
            keys, denoise, line, x0, draws=5, chunk=chunk
        )

    whole = bits(keys, x0)
    for one, other in zip(bits(keys[2:], x0[2:], 3), whole, strict=True):
        np.testing.assert_allclose(one, other[2:], rtol=1e-5)
    # Where one key is given, an example has its own of it.
    assert len(set(np.asarray(bits(jax.random.key(0), 0 * x0).total).tolist())) == 4


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("made", "draws", "got"),
    [
        (schedule.linear(10), 4, "10 whole"),
        (continuous.vp(), 4, "inf"),
        (continuous.interpolate(schedule.linear(10)), 4, "inf"),
        (continuous.ve(), 0, "0"),
    ],
)
def test_continuous_bound_refuses(made, draws, got, jit, refuses):
    def call(x0):
        denoise = gaussian.denoiser(lambda x, t: x, made, "eps")
        key = jax.random.key(0)
        return likelihood.continuous_bound(key, denoise, made, x0, draws=draws)

    with refuses(got):
        (jax.jit(call) if jit else call)(jnp.zeros([2, 3]))


def test_the_decoder_of_an_exploding_chain_has_the_variance_that_is_asked_for(x64):
    """L_0 is -log of the share of the bin, to NumPy; the borrowed one is too sure."""
    chain = continuous.discretize(continuous.ve(), 200, clean=True)
    rng = np.random.default_rng(0)
    x0 = GRID[rng.integers(1, 255, size=(64, 8))]
    eps, t = rng.normal(size=x0.shape), jnp.ones(64, int)
    x_t = gaussian.q_sample(jnp.asarray(x0), jnp.asarray(eps), chain(t))
    # x0 may be anything, as far as x_1 says.
    pred = gaussian.Prediction(x_t, 0 * x_t)
    variance = jnp.exp(-chain(1).logsnr)
    bits, borrowed = (
        losses.vlb(pred, jnp.asarray(x0), x_t, chain, t, decoder_variance=chosen)
        for chosen in (variance, None)
    )
    nats = oracles.decoder_nll(x0, np.asarray(x_t), np.log(float(variance)))
    np.testing.assert_allclose(bits, nats.mean(axis=1) / np.log(2), rtol=1e-9)
    assert bits.mean() < 0.5 * borrowed.mean()
