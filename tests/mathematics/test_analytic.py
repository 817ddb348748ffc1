"""Analytic-DPM on Gaussian data, whose Var[x0 | x_t] and best variance are exact."""

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest

from diffusion_jax import analytic, continuous, gaussian, schedule

BETAS = np.linspace(0.002, 0.5, 12)
KEY = jax.random.key(0)
TAU = 0.3


def numpy_levels(betas):
    """alpha and sigma for t = 0..T."""
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def round_data(shape=(2, 2, 1)):
    """x0 ~ N(0, TAU^2 I)."""
    size = int(np.prod(shape))
    return mixtures.Mixture([1.0], [np.zeros(size)], [TAU**2 * np.eye(size)], shape)


@pytest.mark.parametrize("estimator", analytic.ESTIMATORS)
def test_table_is_the_posterior_variance(estimator, x64):
    """trace(Cov[x0 | x_t]) / d for correlated pixels, within five standard errors."""
    made, data, count = schedule.from_betas(BETAS), mixtures.one(), 4000
    x0 = data.draw(count)
    got = analytic.x0_variance(
        KEY, data.denoiser(made), made, x0, estimator=estimator, chunk=5
    )
    alpha, sigma = (a[1:, None] for a in numpy_levels(BETAS))
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


def exact_table(made, spread=TAU**2):
    """Of isotropic data, from the levels of a discrete schedule."""
    # (sigma / alpha)^2, which is 0 at t = 0.
    ratio = np.exp(-np.asarray(schedule.tables(made)[1]))
    return spread * ratio / (spread + ratio)


def test_error_is_the_best_for_an_imperfect_mean(x64):
    """A network that halves x0: its own error is the variance to use, not the score."""
    tables = schedule.tables(schedule.linear())
    made = schedule.from_tables(*(table[[0, 300, 500]] for table in tables))
    data = round_data((16,))
    best = data.denoiser(made)

    def halved(x_t, t):
        pred, level = best(x_t, t), made(t).like(x_t)
        x0 = 0.5 * pred.x0
        return gaussian.Prediction(x0, (x_t - level.alpha * x0) / level.sigma)

    truth = exact_table(made)
    # E (x0 - x0_hat / 2)^2 = Var[x0 | x_t] + 1/4 Var[x0_hat].
    expected = (truth + 0.25 * (TAU**2 - truth))[1:]
    error, score = (
        analytic.x0_variance(
            KEY, halved, made, data.draw(4000, seed=1), estimator=name
        )[1:]
        for name in ("error", "score")
    )
    np.testing.assert_allclose(error, expected, rtol=0.05)
    assert np.all(np.abs(score / expected - 1) > 0.1)


def test_every_time_and_image_has_noise_of_its_own(x64):
    """Of data that are 0 the noise is x_t / sigma, and its mean square in the table."""
    made = schedule.from_betas(BETAS)
    _, sigma = numpy_levels(BETAS)

    def denoise(x_t, t):
        return gaussian.Prediction(0 * x_t, x_t / jnp.asarray(sigma)[t][:, None])

    seen = [
        1 - table[1:] * np.exp(made(np.arange(1, 13)).logsnr)
        for table in (
            analytic.x0_variance(KEY, denoise, made, jnp.zeros([count, 3]))
            for count in (1, 2)
        )
    ]
    for squares in seen:
        assert len(np.unique(np.round(squares, 6))) == 12
    assert np.all(np.abs(seen[0] - seen[1]) > 1e-6)


def test_bounded(x64):
    """0 below; above, what x_t / alpha leaves, and the data's range (Theorem 2)."""
    made = schedule.from_betas(BETAS)
    alpha, sigma = numpy_levels(BETAS)
    ratio = (sigma / alpha) ** 2
    high = analytic.bounded(np.full(13, 99.0), made)
    np.testing.assert_allclose(high, np.minimum(ratio, 1), rtol=1e-10)
    assert ratio.min() < 1 < ratio.max()
    wide = analytic.bounded(np.full(13, 99.0), made, half_range=np.inf)
    np.testing.assert_allclose(wide, np.minimum(ratio, 99), rtol=1e-10)
    half = analytic.bounded(np.full(13, 99.0), made, half_range=0.5)
    np.testing.assert_allclose(half, np.minimum(ratio, 0.25), rtol=1e-10)
    assert np.all(analytic.bounded(np.full(13, -0.1), made) == 0)
    table = 0.5 * np.minimum(ratio, 1)
    np.testing.assert_array_equal(analytic.bounded(table, made), table)
    # Two points at the ends of the range are the worst of data.
    x0 = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (500, 4)))
    silent = gaussian.denoiser(lambda x, t: 0 * x, made, "x0")
    worst = analytic.x0_variance(KEY, silent, made, x0, estimator="error")
    np.testing.assert_allclose(worst[1:], 1, rtol=1e-12)


def test_attach_looks_up_t(x64):
    made, x_t = schedule.from_betas(BETAS), jnp.ones([3, 2, 2])
    plain = gaussian.denoiser(lambda x, t: 0.1 * x, made, "eps")
    denoise = analytic.attach(plain, np.arange(13) / 10)
    t = jnp.array([1, 12, 5])
    pred = denoise(x_t, t)
    np.testing.assert_allclose(pred.x0_variance[:, 0, 0], [0.1, 1.2, 0.5])
    assert pred.x0_variance.shape == (3, 1, 1)
    np.testing.assert_array_equal(pred.x0, plain(x_t, t).x0)
    np.testing.assert_allclose(denoise(x_t, 7).x0_variance, 0.7)
    lost = jax.jit(denoise)(x_t, jnp.array([-1, 13, 2])).x0_variance
    np.testing.assert_array_equal(np.isnan(lost[:, 0, 0]), [True, True, False])


LIN, X = schedule.linear(4), np.zeros([1, 2])


REFUSED = [
    (lambda: analytic.x0_variance(KEY, None, LIN, X, estimator="eps"), "'eps'"),
    (lambda: analytic.x0_variance(KEY, None, continuous.vp(), X), "Timed("),
    (lambda: analytic.bounded(np.zeros(4), LIN), "(4,)"),
    (lambda: analytic.bounded(np.zeros(5), LIN, half_range=0.0), "0.0"),
    (lambda: analytic.attach(None, np.zeros([2, 2])), "(2, 2)"),
    (lambda: analytic.attach(None, np.zeros(5))(jnp.asarray(X), 0.5), "float32"),
]


def test_bad_input_is_refused(refuses):
    for call, got in REFUSED:
        with refuses(got):
            call()
