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
        def totals(theta):
            pred, known = tiny(theta)(x_t, t), {"variance": variance}
            losses_of = (
                losses.hybrid(pred, x0, x_t, eps, SHORT, t, scale=0.01, **known),
                losses.simple(pred, x0, eps, SHORT(t)),
                losses.vlb(pred, x0, x_t, SHORT, t, **known),
            )
            return jnp.stack(losses_of).sum(axis=1)

        slopes = jax.jacrev(totals)(theta)
        return [jax.tree.map(lambda a, k=k: a[k], slopes) for k in range(3)]

    for variance in ("learned", "range"):
        both, mean, bound = grads(THETA, variance)
        np.testing.assert_allclose(both["mean"], mean["mean"], rtol=1e-12)
        expected = 0.01 * SMALL_T * bound["variance"]
        np.testing.assert_allclose(both["variance"], expected, rtol=1e-12)
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


def test_continuous_bound_is_unbiased():
    """All of its parts, whose sum is the entropy and what the two ends cost.

    The integral is one of log-SNR (Sec. 5.1, Kingma et al. 2021): any path gives the
    information that x_0 has of x beyond what x_T has.
    """
    rng = np.random.default_rng(5)
    mass = np.exp(-0.5 * ((GRID - MEAN) / DEVIATION) ** 2)
    x0 = jnp.asarray(rng.choice(GRID, (6000, 4), p=mass / mass.sum()))
    bound = functools.partial(likelihood.continuous_bound, draws=16)
    bits = jax.jit(
        lambda x0: bound(jax.random.key(0), NORMAL.denoiser(path), path, x0)
    )(x0)
    power, noise = DEVIATION**2 + MEAN**2, 1 / (1 + np.exp(TO))
    prior = noise - 1 - np.log(noise) + power * (1 - noise)
    exact = {
        "prior": 0.5 * prior / LN2,
        "diffusion": (information(FROM) - information(TO)) / LN2,
        "reconstruction": np.log2(np.sqrt(2 * np.pi * np.e / np.exp(FROM)) * 127.5),
    }
    exact["total"] = sum(exact.values())
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
