"""Continuous time against the closed forms of Song et al. 2021 and Gaussian data."""

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
import scipy.stats
from continuous_oracles import LEVELS, SDES
from oracles import SCHEDULES, betas_of

from diffusion_jax import continuous, schedule, sde

TIMES = np.array([1e-5, 1e-3, 0.1, 0.25, 0.4999, 0.5, 0.75, 0.9, 1.0])
DATA = mixtures.one()


def test_coefficients_are_those_of_the_papers(precision):
    # The times themselves are rounded in float32.
    times = np.asarray(jnp.asarray(TIMES), np.float64)
    for name, truth in LEVELS.items():
        f, g = sde.coefficients(truth.schedule, times)
        close = {"float32": 2e-5, "float64": 1e-11}[precision]
        variance = np.square(np.asarray(g, np.float64))
        named = {"err_msg": name, "atol": 0}
        expected = truth.squared_diffusion(times)
        np.testing.assert_allclose(f, truth.drift(times), rtol=close, **named)
        np.testing.assert_allclose(variance, expected, rtol=10 * close, **named)
        if name not in SDES and precision == "float32":
            late = times >= 1e-3
            np.testing.assert_allclose(f[late], truth.drift(times[late]), rtol=3e-6)
            np.testing.assert_allclose(variance[late], expected[late], rtol=3e-6)


def test_an_interpolated_schedule_has_the_betas_of_its_steps(precision):
    """log alpha falls by -log(1 - beta) / 2 in a step: f is that, anywhere in it."""
    t = np.arange(1, 49) + 0.3
    coefficients = jax.jit(sde.coefficients)
    for name in SCHEDULES:
        made = continuous.interpolate(SCHEDULES[name](50))
        betas = betas_of("linear" if name == "from_betas" else name, 50)[1:-1]
        f, g = coefficients(made, t)
        # From the inside of the step whatever precision the times have.
        np.testing.assert_allclose(f, 0.5 * np.log1p(-betas), rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(g**2, -np.log1p(-betas), rtol=1e-4, err_msg=name)


def _affine(field, t):
    """Slope [4, 4] and offset [4] of a field that is affine in x."""
    at = lambda x: np.asarray(field(jnp.asarray(x.reshape(-1, 2, 2, 1)), t))  # noqa: E731
    offset, *ends = at(np.eye(5, 4, -1)).reshape(5, 4)
    return (np.array(ends) - offset).T, offset


@pytest.mark.parametrize("name", [*SDES, "flow", "linear"])
def test_both_equations_move_the_exact_marginals(name, x64):
    """For x' = A x + b and noise g: m' = A m + b and C' = A C + C A' (+ g^2 I back in
    time, for the reverse equation). Fokker-Planck's, for Gaussian data."""
    steps = continuous.interpolate(schedule.linear(10))
    made = steps if name == "linear" else LEVELS[name].schedule
    denoise, h = DATA.denoiser(made), 1e-6
    fields = [jax.jit(make(denoise, made)) for make in (sde.flow, sde.reverse_drift)]

    def marginal(time):
        level = made(time)
        alpha, sigma = np.asarray(level.alpha), np.asarray(level.sigma)
        return alpha * DATA.mean, alpha**2 * DATA.cov + sigma**2 * np.eye(4)

    for t in (0.15, 0.5, 0.85):
        t = 10 * t + 0.2 if name == "linear" else t
        mean, cov = marginal(t)
        ends = zip(marginal(t + h), marginal(t - h), strict=True)
        rates = [(a - b) / (2 * h) for a, b in ends]
        g = float(sde.coefficients(made, t).diffusion)
        for field, noise in zip(fields, (0.0, g**2), strict=True):
            slope, offset = _affine(field, t)
            close = {"rtol": 1e-6, "atol": 1e-6 * (1 + g**2)}
            np.testing.assert_allclose(slope @ mean + offset, rates[0], **close)
            moved = slope @ cov + cov @ slope.T - noise * np.eye(4)
            np.testing.assert_allclose(moved, rates[1], **close)
        # And the score is the gradient of the log density.
        x = np.eye(4)
        score = sde.score(denoise(jnp.asarray(x.reshape(4, 2, 2, 1)), t), made(t))
        expected = np.linalg.solve(cov, (mean - x).T).T
        np.testing.assert_allclose(score.reshape(4, 4), expected, rtol=1e-9, atol=1e-12)


def test_prior_is_a_normal_density(precision):
    unit = np.random.default_rng(0).normal(size=(3, 2, 2, 1))
    rtol = {"float32": 1e-5, "float64": 1e-10}[precision]
    for name, std in (("vp", 1.0), ("sub_vp", 1.0), ("ve", 50.0)):
        level, x = SDES[name].schedule(1.0), unit * std
        expected = scipy.stats.norm.logpdf(x, 0, std).sum(axis=(1, 2, 3))
        found = sde.prior_logp(jnp.asarray(x, float), level)
        np.testing.assert_allclose(found, expected, rtol=rtol, err_msg=name)
