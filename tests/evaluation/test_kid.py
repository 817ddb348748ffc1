"""The kernel distance against loops, another kernel, and its mean for Gaussians."""

import itertools

import numpy as np
import pytest
from random_features import covariance, features
from sklearn.metrics.pairwise import polynomial_kernel

from diffusion_jax.evaluation import metrics


def test_kid_of_all_the_features_is_that_of_loops():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 9, 5))
    y = 1.5 * y + 0.5

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 5 + 1) ** 3

    pairs = list(itertools.permutations(range(9), 2))
    true = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / len(pairs)
    true -= 2 * sum(k(a, b) for a in x for b in y) / 81
    mean, std = metrics.kid(x, y, subsets=5, subset_size=9)
    assert mean == pytest.approx(true, rel=1e-12)
    assert std < 1e-12


def test_kid_of_subsets_is_that_of_another_kernel():
    x, y = features(0, 300, 16), features(1, 400, 16, shift=0.3)
    rng, values = np.random.default_rng(7), []
    for _ in range(10):
        a = x[rng.choice(300, 50, replace=False)].astype(np.float64)
        b = y[rng.choice(400, 50, replace=False)].astype(np.float64)
        both = polynomial_kernel(np.r_[a, b], degree=3, gamma=1 / 16, coef0=1)
        aa, bb, ab = both[:50, :50], both[50:, 50:], both[:50, 50:]
        off = ~np.eye(50, dtype=bool)
        values.append(aa[off].mean() + bb[off].mean() - 2 * ab.mean())
    got = metrics.kid(x, y, subsets=10, subset_size=50, seed=7)
    np.testing.assert_allclose(got, [np.mean(values), np.std(values)], rtol=1e-10)


def third_moment(mean, cov):
    """E x_i x_j x_k of a Gaussian."""
    lone = np.einsum("i,j,k->ijk", mean, mean, mean)
    return lone + sum(
        np.einsum(f"{a}{b},{c}->ijk", cov, mean) for a, b, c in ("ijk", "ikj", "jki")
    )


@pytest.mark.parametrize("size", [2, 5, 40])
@pytest.mark.parametrize("apart", [False, True])
def test_kid_is_unbiased(size, apart):
    """For Gaussians, (1 + u)^3 is averaged term by term; equal ones are 0 apart.

    3 |dm|^2 / D + 3 |d E x x^T|^2 / D^2 + |d E x x x|^2 / D^3
    """
    rng = np.random.default_rng(size)
    m1, c1 = np.array([0.3, -0.2, 0.1]), 0.3 * np.eye(3)
    m2, c2 = (
        (np.array([0.0, 0.2, 0.5]), 0.2 * covariance(rng, 3)) if apart else (m1, c1)
    )
    true = np.sum((m1 - m2) ** 2)
    second = [c + np.outer(m, m) for m, c in ((m1, c1), (m2, c2))]
    true += np.sum((second[0] - second[1]) ** 2) / 3
    true += np.sum((third_moment(m1, c1) - third_moment(m2, c2)) ** 2) / 27
    draws = 1500
    x = rng.multivariate_normal(m1, c1, size=(draws, size))
    y = rng.multivariate_normal(m2, c2, size=(draws, size))
    values = [
        metrics.kid(a, b, subsets=1, subset_size=size)[0]
        for a, b in zip(x, y, strict=True)
    ]
    error = np.std(values) / draws**0.5
    assert abs(np.mean(values) - true) < 4 * error
    # With the diagonal, the estimate is at least this much above.
    bias = (np.mean((np.sum(x * x, axis=2) / 3 + 1) ** 3) - 1) / size
    assert not apart or true > 10 * error
    assert bias > 6 * error


def test_kid_is_drawn_from_its_seed():
    x, y = features(0, 200), features(1, 200)
    options = {"subsets": 4, "subset_size": 20}
    assert metrics.kid(x, y, **options) == metrics.kid(x, y, **options, seed=0)
    assert metrics.kid(x, y, **options) != metrics.kid(x, y, **options, seed=1)


# What is refused.

X = np.zeros((4, 3))
REFUSED = [
    (
        lambda: metrics.kid(X, X[:3]),
        "1000. Extract more features, or pass subset_size=3",
    ),
    (lambda: metrics.kid(X, X, subset_size=1), "1"),
    (lambda: metrics.kid(X, X, subset_size=2, subsets=0), "0"),
    (lambda: metrics.kid(X, X[:, :2]), "[4, 2]"),
]


def test_bad_input_is_refused_with_advice(refuses):
    for call, got in REFUSED:
        with refuses(got):
            call()
