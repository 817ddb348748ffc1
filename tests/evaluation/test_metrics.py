"""Scores of samples against closed forms, and against the same in loops."""

import math

import numpy as np
import pytest
import scipy.special
from random_features import features
from sklearn.metrics.pairwise import polynomial_kernel

from diffusion_jax.evaluation import metrics, moments

# The Inception score.


@pytest.mark.parametrize("classes", [2, 10, 1008])
def test_inception_score_of_certain_classes_is_their_number(classes):
    certain = 1e4 * np.eye(classes)[np.arange(4 * classes) % classes]
    mean, std = metrics.inception_score(certain.astype(np.float32), splits=4)
    assert mean == pytest.approx(classes, rel=1e-12)
    assert std < 1e-9


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_inception_score_is_that_of_loops(splits):
    """As the original code has it: slices, a mean of divergences, an exponential."""
    logits = (3 * np.random.default_rng(0).normal(size=(103, 7))).astype(np.float32)
    probs, scores = scipy.special.softmax(logits.astype(np.float64), axis=1), []
    for i in range(splits):
        part = probs[i * len(probs) // splits : (i + 1) * len(probs) // splits]
        log = np.log(part) - np.log(part.mean(axis=0))
        scores.append(
            math.exp(np.mean([p @ q for p, q in zip(part, log, strict=True)]))
        )
    got = metrics.inception_score(logits, splits=splits)
    np.testing.assert_allclose(got, (np.mean(scores), np.std(scores)), rtol=1e-12)


def test_inception_score_of_a_sorted_file_needs_the_shuffle():
    certain = 1e4 * np.eye(10)[np.arange(1000) // 100]
    assert metrics.inception_score(certain)[0] == pytest.approx(1)
    scores = [metrics.inception_score(certain, seed=seed) for seed in (1, 1, 2)]
    assert 8.5 < scores[0][0] < 10
    assert scores[0] == scores[1] != scores[2]


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


# Precision, recall, density and coverage.


def naive_manifold(real, fake, k):
    def in_balls(points, centres):  # of the centres [B], each of the points [A]
        radii = [sorted(math.dist(c, p) for p in centres)[k] for c in centres]
        pairs = list(zip(centres, radii, strict=True))
        return np.array([[math.dist(p, c) <= r for c, r in pairs] for p in points])

    of_fake, of_real = in_balls(fake, real), in_balls(real, fake)
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


def test_manifold_of_clusters_far_apart():
    """Where |x|^2 + |y|^2 - 2 x . y has no digit of a distance left."""
    rng, centres = np.random.default_rng(0), np.repeat([[0.0] * 3, [1e5] * 3], 50, 0)
    for width in (1.0, 1e-3, 1e-5):
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


# What is refused.

X, THREE, EYE = np.zeros((4, 3)), moments.init(3), np.eye(2)
WRONG = [[0, 0], [1, np.nan], [np.inf, 0]]
MORE = "1000. Extract more features, or pass subset_size=3"
REFUSED = [
    (metrics.inception_score, (X,), {}, "10"),
    (metrics.kid, (X, X[:3]), {}, MORE),
    (metrics.kid, (X, X), {"subset_size": 1}, "1"),
    (metrics.kid, (X, X), {"subset_size": 2, "subsets": 0}, "0"),
    (metrics.kid, (X, X[:, :2]), {}, "[4, 2]"),
    (metrics.precision_recall, (X, X), {"k": 4}, "4"),
    (metrics.precision_recall, (X, X), {"batch": 0}, "and 0"),
    (metrics.precision_recall, (X[:, :0], X[:, :0]), {}, "[4, 0]"),
    (metrics.frechet_distance, (X[0, :2], EYE, X[0], EYE), {}, "[3] and [2, 2]"),
    (metrics.frechet_distance, (X[0, :2], EYE, X[0], np.eye(3)), {}, "2 and 3"),
    (
        metrics.frechet_distance,
        (X[0, :2], EYE, [0, 0], [[1, 1], [0, 1]]),
        {},
        "1 apart",
    ),
    (metrics.frechet_distance, (X[0, :2], EYE, [0, 0], [[1, 2], [2, 1]]), {}, "-1"),
    (metrics.frechet_distance, (X[0, :2], EYE, [0, np.inf], EYE), {}, "some that are"),
    (moments.init, (0,), {}, "0"),
    (moments.update, (THREE, np.zeros((2, 3, 1))), {}, "[2, 3"),
    (moments.update, (moments.init(2), X), {}, "[4, 3]"),
    (
        moments.update,
        (moments.init(2), WRONG),
        {},
        "2 rows that are not, the first at 1",
    ),
    (moments.merge, (THREE, moments.init(2)), {}, "3 and 2"),
    (moments.finish, (moments.update(THREE, X[:1]),), {}, "1"),
]


def test_bad_input_is_refused_with_advice(refuses):
    for function, arguments, options, got in REFUSED:
        with refuses(got):
            function(*arguments, **options)


def test_the_nearest_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    points, among = rng.normal(100, 1, (7, 3)), rng.normal(100, 1, (50, 3))
    among[40:] = among[:10]  # of equals the first
    expected = np.square(points[:, None] - among).sum(-1).argmin(1)
    for batch in (8, 1024):
        found = metrics.nearest(points, among, batch=batch)
        np.testing.assert_array_equal(found, expected)
