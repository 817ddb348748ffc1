"""Precision, recall, density and coverage against loops, trees and known sets."""

import math

import numpy as np
import pytest
from hypothesis import given
from random_features import features, quick, rotation, seeds

from diffusion_jax.evaluation import metrics


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


def test_manifold_of_known_sets():
    x = features(count=64, dimension=5)
    assert metrics.precision_recall(x, x, batch=10) == (1, 1, pytest.approx(4 / 3), 1)
    assert metrics.precision_recall(x, x + 100) == (0, 0, 0, 0)
    # Samples of one of two clusters: faithful, and half of the data is missed.
    halves = np.r_[x, x + 100]
    got = metrics.precision_recall(halves, x[::-1])
    assert (got.precision, got.recall, got.coverage) == (1, 0.5, 0.5)
    got = metrics.precision_recall(x, halves)
    assert (got.precision, got.recall, got.coverage) == (0.5, 1, 1)


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


@quick
@given(seeds)
def test_manifold_forgets_order_and_turns(seed):
    rng = np.random.default_rng(seed)
    real, fake = rng.normal(size=(20, 3)), rng.normal(size=(15, 3)) + 0.5
    turn = rotation(rng, 3)
    got = metrics.precision_recall(real, fake, batch=8)
    again = metrics.precision_recall(
        rng.permutation(real @ turn) + 5, rng.permutation(fake @ turn) + 5
    )
    np.testing.assert_allclose(again, got, rtol=1e-12)
    swapped = metrics.precision_recall(fake, real)
    assert swapped[:2] == got[1::-1]


# What is refused.

X = np.zeros((4, 3))
REFUSED = [
    (lambda: metrics.precision_recall(X, X, k=4), "4"),
    (lambda: metrics.precision_recall(X, X, k=0), "0 and"),
    (lambda: metrics.precision_recall(X, X, batch=0), "and 0"),
    (lambda: metrics.precision_recall(X[:, :0], X[:, :0]), "[4, 0]"),
]


def test_bad_input_is_refused_with_advice(refuses):
    for call, got in REFUSED:
        with refuses(got):
            call()
