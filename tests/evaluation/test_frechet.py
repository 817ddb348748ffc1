"""The Frechet distance against closed forms, and against other formulas."""

import numpy as np
import pytest
import scipy.linalg
from random_features import covariance, features, rotation, streamed

from diffusion_jax.evaluation import metrics, moments


@pytest.mark.parametrize("dimension", [1, 2, 40])
def test_frechet_of_gaussians_with_common_axes(dimension):
    """Turned alike, the distance is that of the axes: |dm|^2 + sum (s1 - s2)^2."""
    rng = np.random.default_rng(dimension)
    turn, dm = rotation(rng, dimension), rng.normal(size=dimension)
    s1, s2 = np.exp(rng.normal(size=(2, dimension)) * 2)
    got = metrics.frechet_distance(
        dm, (turn * s1**2) @ turn.T, 0 * dm, (turn * s2**2) @ turn.T
    )
    assert got == pytest.approx(dm @ dm + np.sum((s1 - s2) ** 2), rel=1e-12)


@pytest.mark.parametrize("dimension", [3, 30, 120])
def test_frechet_is_that_of_other_formulas(dimension):
    rng = np.random.default_rng(dimension)
    a, b = covariance(rng, dimension), covariance(rng, dimension)
    m1, m2 = rng.normal(size=(2, dimension))
    base = np.sum((m1 - m2) ** 2) + np.trace(a + b)
    got = metrics.frechet_distance(m1, a, m2, b)
    root = np.trace(scipy.linalg.sqrtm(a @ b).real)
    assert got == pytest.approx(base - 2 * root, rel=1e-6)
    # eigvalsh of the product, which is not symmetric, reads half of it.
    wrong = np.sqrt(np.linalg.eigvalsh(a @ b).clip(0)).sum()
    assert abs(got - (base - 2 * wrong)) > 1e-3 * got


def test_frechet_of_singular_covariances():
    """Rank one: tr (a a^T b b^T)^(1/2) = |a . b|; without a common axis, 0."""
    rng = np.random.default_rng(0)
    zero, flat = np.zeros(60), np.zeros((60, 60))
    a, b = rng.normal(size=(2, 60))
    got = metrics.frechet_distance(zero, np.outer(a, a), zero, np.outer(b, b))
    assert got == pytest.approx(a @ a + b @ b - 2 * abs(a @ b), rel=1e-12)
    left, right = np.zeros((2, 60, 60))
    left[:30, :30], right[30:, 30:] = covariance(rng, 30), covariance(rng, 30, 20)
    turn = rotation(rng, 60)
    got = metrics.frechet_distance(
        zero, turn @ left @ turn.T, zero, turn @ right @ turn.T
    )
    assert got == pytest.approx(np.trace(left + right), rel=1e-12)
    assert metrics.frechet_distance(a, flat, b, left) == pytest.approx(
        np.sum((a - b) ** 2) + np.trace(left), rel=1e-12
    )


@pytest.mark.parametrize("count", [2, 50, 1000])
def test_frechet_of_features_with_themselves_is_zero(count):
    """Also of fewer features than dimensions."""
    x = features(count=count, dimension=200, shift=3.0)
    mean, cov = moments.finish(streamed(x, 64))
    itself = metrics.frechet_distance(mean, cov, mean, cov)
    assert 0 <= itself < 1e-11 * np.trace(cov)


def test_frechet_of_statistics_summed_in_float32():
    """They are a little off symmetry; which half is read must not matter."""
    rng = np.random.default_rng(0)
    a, b = covariance(rng, 30), covariance(rng, 30)
    off = np.triu(rng.normal(size=(30, 30)), 1) * 1e-6
    zero = np.zeros(30)
    got = metrics.frechet_distance(zero, a + off, zero, b)
    assert got == metrics.frechet_distance(zero, a + off.T, zero, b)
    assert got == pytest.approx(metrics.frechet_distance(zero, a, zero, b), rel=1e-5)
