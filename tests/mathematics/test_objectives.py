"""What losses teach, and parts of the continuous bound in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import normal

from diffusion_jax import gaussian, likelihood, losses, schedule

pytestmark = pytest.mark.usefixtures("x64")
LN2 = np.log(2)
SMALL_T, GRID = 8, np.linspace(-1, 1, 256)
SHORT = schedule.cosine(SMALL_T)
THETA = {"mean": np.array([0.6, -0.2, 0.1]), "variance": np.array([0.3, 0.2])}
IMAGES = GRID[np.random.default_rng(3).integers(60, 200, (6, 2, 2, 1))]


def tiny(theta):
    """A network of five weights, with both learned variances."""

    def denoise(x_t, t):
        a, b, c = theta["mean"]
        d, e = theta["variance"]
        time = (t / SMALL_T).reshape(-1, 1, 1, 1)
        output = a * x_t + b * jnp.sin(3 * x_t) + c * time
        pred = gaussian.predict("v", output, x_t, SHORT(t))
        free = d + e * jnp.cos(x_t) + 0.1 * time
        return pred._replace(log_variance=free - 3, fraction=free)

    return denoise


def test_the_hybrid_loss_teaches_mean_and_variance_apart():
    """The mean by the simple loss alone, the variance by scale T of the bound alone."""
    x0, t = jnp.asarray(IMAGES), jnp.array([1, 2, 3, 5, 7, 8])
    eps = jnp.asarray(np.random.default_rng(4).normal(size=IMAGES.shape))
    x_t = gaussian.q_sample(x0, eps, SHORT(t))

    @functools.partial(jax.jit, static_argnums=1)
    def grads(theta, variance):
        def of(loss, *args, **options):
            pred = lambda theta: tiny(theta)(x_t, t)  # noqa: E731
            total = lambda theta: loss(pred(theta), *args, **options).sum()  # noqa: E731
            return jax.grad(total)(theta)

        known = {"variance": variance}
        return (
            of(losses.hybrid, x0, x_t, eps, SHORT, t, scale=0.01, **known),
            of(losses.simple, x0, eps, SHORT(t)),
            of(losses.vlb, x0, x_t, SHORT, t, **known),
        )

    for variance in ("learned", "range"):
        both, mean, bound = grads(THETA, variance)
        np.testing.assert_allclose(both["mean"], mean["mean"], rtol=1e-12)
        expected = 0.01 * SMALL_T * bound["variance"]
        np.testing.assert_allclose(both["variance"], expected, rtol=1e-12)
        assert np.all(mean["variance"] == 0)
        # What stop_gradient holds back is not small.
        held = np.abs(0.01 * SMALL_T * bound["mean"])
        assert np.all(held > 1e-3 * np.abs(mean["mean"]))


# Normal data, and a schedule from one log-SNR to another. The noise at t = 0 is wider
# than a bin, so that the best guess for data on the grid is that for normal ones.
FROM, TO, MEAN, DEVIATION = 7.0, -9.0, 0.1, 0.25
NORMAL = normal(np.full(4, MEAN), DEVIATION**2 * np.eye(4))


@schedule.Timed
def path(t):
    share = 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.asarray(t, float))
    return schedule.preserving(FROM + (TO - FROM) * share)


def information(logsnr):
    """I(x0; x_t) in nats: its derivative is half the error in eps of the best guess."""
    return 0.5 * np.log1p(DEVIATION**2 * np.exp(logsnr))


EXACT = (information(FROM) - information(TO)) / LN2


def test_continuous_bound_is_unbiased():
    """All of its parts, whose sum is the entropy and what the two ends cost.

    The integral is one of log-SNR (Sec. 5.1, Kingma et al. 2021): any path gives the
    information that x_0 has of x beyond what x_T has.

    The best decoder of z_0 would know that data are normal, and the best prior that
    z_1 is not quite: both are the little by which the bound is not tight.
    """
    rng = np.random.default_rng(5)
    mass = np.exp(-0.5 * ((GRID - MEAN) / DEVIATION) ** 2)
    x0 = jnp.asarray(rng.choice(GRID, (6000, 4), p=mass / mass.sum()))
    bits = jax.jit(
        lambda key, x0: likelihood.continuous_bound(
            key, NORMAL.denoiser(path), path, x0, draws=16
        )
    )(jax.random.key(0), x0)
    snr, end = np.exp(FROM), np.exp(TO)
    power = (DEVIATION**2 + MEAN**2) * end / (1 + end)
    noise = 1 / (1 + end)
    exact = {
        "prior": 0.5 * (noise - 1 - np.log(noise) + power) / LN2,
        "diffusion": EXACT,
        "reconstruction": np.log2(np.sqrt(2 * np.pi * np.e / snr) * 127.5),
    }
    entropy = np.log2(DEVIATION * np.sqrt(2 * np.pi * np.e) * 127.5)
    gap = 0.5 * np.log1p(1 / (DEVIATION**2 * snr)) - information(TO)
    exact["total"] = entropy + gap / LN2 + exact["prior"]
    np.testing.assert_allclose(exact["total"], sum(list(exact.values())[:3]))
    for name, value in exact.items():
        part = np.asarray(getattr(bits, name))
        error = part.std() / np.sqrt(len(part))
        assert error < 0.02, name
        assert abs(part.mean() - value) < 4.5 * error, name


def test_reconstruction_is_the_softmax_over_256_values():
    rng = np.random.default_rng(6)
    level = schedule.NoiseLevel(jnp.array([-0.02, 0.0, -0.3]), jnp.array([12.0, 7, 1]))
    picked = rng.integers(0, 256, (3, 2, 2))
    alpha = np.exp(np.asarray(level.log_alpha)).reshape(3, 1, 1)
    sigma = alpha * np.exp(-0.5 * np.asarray(level.logsnr)).reshape(3, 1, 1)
    z0 = alpha * GRID[picked] + sigma * rng.normal(size=picked.shape)
    logits = -0.5 * ((z0[..., None] - alpha[..., None] * GRID) / sigma[..., None]) ** 2
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    chance = np.take_along_axis(odds, picked[..., None], -1)[..., 0] / odds.sum(axis=-1)
    exact = -np.log2(chance).mean(axis=(1, 2))
    for dtype, close in ((jnp.float64, {"rtol": 1e-9}), (jnp.float32, {"atol": 1e-4})):
        x0, short, *fields = (jnp.asarray(a, dtype) for a in (GRID[picked], z0, *level))
        got = losses.reconstruction(x0, short, schedule.NoiseLevel(*fields))
        assert got.dtype == dtype
        np.testing.assert_allclose(got, exact, **close)


def test_prior_changes_its_rule_where_sigma_is_one():
    """On both sides the KL to N(0, max(1, sigma)^2), by its textbook expression."""
    x0 = jnp.asarray(IMAGES)
    for alpha, sigma in ((0.7, 0.3), (0.7, 0.99), (0.7, 1.01), (0.7, 4.0), (1.0, 50.0)):
        std = max(1.0, sigma)
        fields = np.log(alpha), 2 * np.log(alpha / sigma)
        level = schedule.NoiseLevel(*map(jnp.asarray, fields))
        ratio = (sigma / std) ** 2
        nats = 0.5 * (ratio - 1 - np.log(ratio) + (alpha * IMAGES / std) ** 2)
        expected = nats.mean(axis=(1, 2, 3)) / LN2
        np.testing.assert_allclose(losses.prior(x0, level), expected, rtol=1e-10)


def test_weighted_is_a_mean_over_pixels_of_squares():
    eps, guess = np.random.default_rng(8).normal(size=(2, 6, 2, 2, 1))
    level = schedule.NoiseLevel(jnp.zeros(6), jnp.linspace(-8, 8, 6))
    pred = gaussian.Prediction(jnp.asarray(eps), jnp.asarray(guess))
    expected = np.exp(level.logsnr) * ((guess - eps) ** 2).mean(axis=(1, 2, 3))
    got = losses.weighted(pred, jnp.asarray(eps), level, jnp.exp)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
