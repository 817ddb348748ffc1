"""Single steps of the Langevin rules against the papers' formulas, in NumPy float64.

Moves along the score leave a distribution as it is whatever their size, so that
moments alone cannot tell whether the size is right.
"""

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
from oracles import NumpyDDPM

from diffusion_jax import continuous, gaussian, langevin, schedule

LINEAR = NumpyDDPM.named("linear")
DATA = mixtures.one((3, 3, 1))
KEYS = jax.random.split(jax.random.key(4), 5)
X = np.random.default_rng(0).normal(size=(5, 3, 3, 1))


def noise(fold=None):
    keys = KEYS
    if fold is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, fold)
    return np.asarray(gaussian.normal(keys, X.shape))


def score(made, x, t):
    pred = DATA.denoiser(made)(jnp.asarray(x), t)
    return -np.asarray(pred.eps) / float(made(t).sigma)


def end(rule, made, t, s, **options):
    rule = rule(DATA.denoiser(made), made, **options)
    return np.asarray(rule.step(KEYS, jnp.asarray(X), (), *map(jnp.asarray, (t, s))).x)


def predicted(made, t, s):
    return end(langevin.predictor_corrector, made, t, s, corrections=0)


@pytest.mark.parametrize("t", [1, 2, 400, 1000])
def test_reverse_diffusion_of_vp_without_noise_in_the_last_step(t, x64):
    """Eq. 46, Song et al. 2021, of the step x_i = sqrt(1 - b) x + sqrt(b) z."""
    made, beta = schedule.linear(), LINEAR.betas[t]
    truth = (2 - np.sqrt(1 - beta)) * X + beta * score(made, X, t)
    truth = truth + (t > 1) * np.sqrt(beta) * noise()
    np.testing.assert_allclose(predicted(made, t, t - 1), truth, rtol=1e-8, atol=1e-10)


def test_reverse_diffusion_of_ve(x64):
    """x + (sigma_t^2 - sigma_s^2) score + its root times z."""
    made, t, s = continuous.ve(), 0.6, 0.5
    width = float(made(t).sigma) ** 2 - float(made(s).sigma) ** 2
    truth = X + width * score(made, X, t) + np.sqrt(width) * noise()
    np.testing.assert_allclose(predicted(made, t, s), truth, rtol=1e-8)


@pytest.mark.parametrize("snr", [0.05, 0.16])
@pytest.mark.parametrize(
    ("name", "t", "s"), [("linear", 400, 399), ("linear", 400, 300), ("ve", 0.6, 0.5)]
)
def test_corrector_moves_by_the_signal_to_noise_ratio(name, t, s, snr, x64):
    """Algorithms 4 and 5: e = 2 a (snr |z| / |g|)^2, x + e g + sqrt(2 e) z, twice.

    At x_i the paper's a is 1 - beta_i, of the step from i to the next.
    """
    made, ratio = continuous.ve(), 1.0
    if name == "linear":
        made, bars = schedule.linear(), LINEAR.alphas_bar
        ratio = bars[s] / bars[2 * s - t]
    rule, options = langevin.predictor_corrector, {"corrections": 2, "snr": snr}
    x = predicted(made, t, s)
    for index in (1, 2):
        g, z = score(made, x, s), noise(index)
        length = np.sqrt((g**2).sum(axis=(1, 2, 3), keepdims=True))
        size = 2 * ratio * (snr * np.sqrt(9) / length) ** 2
        x = x + size * g + np.sqrt(2 * size) * z
    np.testing.assert_allclose(end(rule, made, t, s, **options), x, rtol=1e-8)


def test_annealed_moves_and_the_way_to_the_next_level(x64):
    """Algorithm 1, Song and Ermon 2019, in x / alpha, of noise sigma / alpha."""
    made, t, s, step = schedule.linear(), 400, 300, 0.3
    alpha, sigma = LINEAR.alphas[t], LINEAR.sigmas[t]
    size, scaled = step * (sigma / alpha) ** 2, X / alpha
    for index in (0, 1):
        # The score of x / alpha is alpha times that of x.
        slope = alpha * score(made, alpha * scaled, t)
        scaled = scaled + size / 2 * slope + np.sqrt(size) * noise(index)
    truth = LINEAR.alphas[s] * scaled
    found = end(langevin.langevin, made, t, s, moves=2, step_size=step)
    np.testing.assert_allclose(found, truth, rtol=1e-8)


def test_pure_noise_goes_on_as_noise(x64):
    """There x / alpha is endless: the next level's noise is as much noise."""
    before, after = (
        end(langevin.langevin, schedule.jsd(100), 100, s, moves=1) for s in (100, 99)
    )
    np.testing.assert_allclose(after, before * np.sqrt(0.99), rtol=1e-12)
