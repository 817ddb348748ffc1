"""Scores of samples against closed forms, and against the same in loops."""

import math

import numpy as np
import pytest
import scipy.special
from random_features import covariance, features
from sklearn.metrics.pairwise import polynomial_kernel

from diffusion_jax.evaluation import metrics

# The Inception score.


@pytest.mark.parametrize("classes", [2, 10, 1008])
def test_inception_score_of_certain_classes_is_their_number(classes):
    certain = np.eye(classes)[np.arange(4 * classes) % classes]
    mean, std = metrics.inception_score(certain, splits=4, from_logits=False)
    assert mean == pytest.approx(classes, rel=1e-12)
    assert std < 1e-9
    logits = 1e4 * certain.astype(np.float32)
    assert metrics.inception_score(logits, splits=4)[0] == pytest.approx(classes)


def naive_inception_score(logits, splits):
    """As the original code has it: slices, a mean of divergences, an exponential."""
    probs = scipy.special.softmax(logits.astype(np.float64), axis=1)
    scores = []
    for i in range(splits):
        part = probs[i * len(probs) // splits : (i + 1) * len(probs) // splits]
        marginal = part.mean(axis=0)
        total = 0.0
        for row in part:
            for p, q in zip(row, marginal, strict=True):
                total += p * (math.log(p) - math.log(q))
        scores.append(math.exp(total / len(part)))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_inception_score_is_that_of_loops(splits):
    logits = (3 * np.random.default_rng(0).normal(size=(103, 7))).astype(np.float32)
    got = metrics.inception_score(logits, splits=splits)
    np.testing.assert_allclose(got, naive_inception_score(logits, splits), rtol=1e-12)


def test_inception_score_of_a_sorted_file_needs_the_shuffle():
    certain = np.eye(10)[np.arange(1000) // 100]
    options = {"from_logits": False, "splits": 10}
    assert metrics.inception_score(certain, **options)[0] == pytest.approx(1)
    shuffled = metrics.inception_score(certain, seed=1, **options)
    assert 8.5 < shuffled[0] < 10
    assert shuffled == metrics.inception_score(certain, seed=1, **options)
    assert shuffled != metrics.inception_score(certain, seed=2, **options)


# The kernel distance.


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


# Precision, recall, density and coverage.


def naive_manifold(real, fake, k):
    def ball(points, i):
        return sorted(math.dist(points[i], p) for p in points)[k]

    def inside(points, radii, p):
        return [math.dist(p, q) <= r for q, r in zip(points, radii, strict=True)]

    real_radii = [ball(real, i) for i in range(len(real))]
    fake_radii = [ball(fake, i) for i in range(len(fake))]
    of_fake = np.array([inside(real, real_radii, p) for p in fake])
    of_real = np.array([inside(fake, fake_radii, p) for p in real])
    return (
        of_fake.any(axis=1).mean(),
        of_real.any(axis=1).mean(),
        of_fake.sum() / (k * len(fake)),
        of_fake.any(axis=0).mean(),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("batch", [1, 7, 1024])
def test_manifold_is_that_of_loops(k, batch):
    real, fake = features(0, 40, 3, shift=50.0), features(1, 31, 3, shift=50.3)
    got = metrics.precision_recall(real, fake, k=k, batch=batch)
    np.testing.assert_allclose(got, naive_manifold(real, fake, k), rtol=1e-12)


@pytest.mark.parametrize("width", [1.0, 1e-3, 1e-5])
def test_manifold_of_clusters_far_apart(width):
    """Where |x|^2 + |y|^2 - 2 x . y has no digit of a distance left."""
    rng, centres = np.random.default_rng(0), np.repeat([[0.0] * 3, [1e5] * 3], 50, 0)
    real, fake = (centres + width * rng.normal(size=(100, 3)) for _ in range(2))
    got = metrics.precision_recall(real, fake)
    np.testing.assert_allclose(got, naive_manifold(real, fake, 3), rtol=1e-12)


@pytest.mark.parametrize("batch", [3, 1024])
def test_copies_are_in_each_others_balls(batch):
    """Balls of radius 0, and points on rims, whatever rounding does to distances."""
    x = features(count=20, dimension=300, shift=30.0)
    copies = np.tile(x, (4, 1))
    got = metrics.precision_recall(copies, x, batch=batch)
    assert got == (1, 1, pytest.approx(4 / 3), 1)
    # A collapsed sampler has one ball of radius 0, with one datum in it.
    got = metrics.precision_recall(x, np.tile(x[:1], (20, 1)), batch=batch)
    assert (got.precision, got.recall) == (1, 1 / 20)
    whole = np.random.default_rng(0).integers(0, 4, (60, 3)).astype(np.float64)
    got = metrics.precision_recall(whole[:30], whole[30:], batch=batch)
    np.testing.assert_allclose(got, naive_manifold(whole[:30], whole[30:], 3))


@pytest.mark.parametrize(("count", "other", "k"), [(30, 30, 3), (40, 15, 5)])
def test_density_and_coverage_of_equal_distributions(count, other, k):
    """Of any continuous one: the order of all is random, so E density is 1 and

        E coverage = 1 - prod_i (N - i) / (N + M - i),  i = 1..k

    as the real ball is empty if the k nearest of the N + M - 1 others are all real.
    """
    rng = np.random.default_rng(count)
    rows = []
    for _ in range(300):
        real, fake = rng.normal(size=(count, 6)), rng.normal(size=(other, 6))
        rows.append(metrics.precision_recall(real, fake, k=k)[2:])
    i = np.arange(1, k + 1)
    true = [1, 1 - np.prod((count - i) / (count + other - i))]
    error = np.std(rows, axis=0) / 300**0.5
    assert np.all(np.abs(np.mean(rows, axis=0) - true) < 4 * error)
    assert np.all(error < 0.02)


# What is refused.

X, OF_PROBABILITIES = np.zeros((4, 3)), {"splits": 1, "from_logits": False}
REFUSED = [
    (lambda: metrics.inception_score(X), "10"),
    (lambda: metrics.inception_score(X, splits=0), "0"),
    (lambda: metrics.inception_score(X - 1, **OF_PROBABILITIES), "a least one of -1"),
    (lambda: metrics.inception_score(X, **OF_PROBABILITIES), "from 0 to 0"),
    (
        lambda: metrics.kid(X, X[:3]),
        "1000. Extract more features, or pass subset_size=3",
    ),
    (lambda: metrics.kid(X, X, subset_size=1), "1"),
    (lambda: metrics.kid(X, X, subset_size=2, subsets=0), "0"),
    (lambda: metrics.kid(X, X[:, :2]), "[4, 2]"),
    (lambda: metrics.precision_recall(X, X, k=4), "4"),
    (lambda: metrics.precision_recall(X, X, k=0), "0 and"),
    (lambda: metrics.precision_recall(X, X, batch=0), "and 0"),
    (lambda: metrics.precision_recall(X[:, :0], X[:, :0]), "[4, 0]"),
]


def test_bad_input_is_refused_with_advice(refuses):
    for call, got in REFUSED:
        with refuses(got):
            call()


def test_the_nearest_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    points, among = rng.normal(100, 1, (7, 3)), rng.normal(100, 1, (50, 3))
    among[40:] = among[:10]  # of equals the first
    expected = np.square(points[:, None] - among).sum(-1).argmin(1)
    for batch in (8, 1024):
        found = metrics.nearest(points, among, batch=batch)
        np.testing.assert_array_equal(found, expected)
