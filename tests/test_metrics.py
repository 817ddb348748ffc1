"""Metrics against closed forms, and against the same in naive loops or other tools."""

import itertools
import math
import os

import numpy as np
import pytest
import scipy.linalg
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from diffusion_jax.evaluation import metrics, moments

seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=25, deadline=None)


def relative(got, true):
    """Largest error over the largest true number."""
    return np.abs(np.asarray(got) - true).max() / np.abs(true).max()


def streamed(x, size, mask=None):
    stats = moments.init(x.shape[1])
    for i in range(0, len(x), size):
        part = None if mask is None else mask[i : i + size]
        stats = moments.update(stats, x[i : i + size], part)
    return stats


def features(seed=0, count=1000, dimension=12, shift=0.0):
    """Correlated float32 features whose mean is `shift` of their deviations from 0."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dimension, dimension)) / dimension**0.5
    return (rng.normal(size=(count, dimension)) @ mix + shift).astype(np.float32)


def covariance(rng, dimension, rank=None):
    root = rng.normal(size=(dimension, rank or dimension))
    return root @ root.T / root.shape[1]


def rotation(rng, dimension):
    return np.linalg.qr(rng.normal(size=(dimension, dimension)))[0]


# Statistics.


@pytest.mark.parametrize("size", [1, 7, 128, 1000])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_one_pass_is_the_covariance(size, shift):
    x = features(shift=shift)
    mean, cov = moments.finish(streamed(x, size))
    exact = x.astype(np.float64)
    assert relative(mean, exact.mean(axis=0)) < 1e-14
    assert relative(cov, np.cov(exact, rowvar=False)) < 1e-12
    np.testing.assert_array_equal(cov, cov.T)


def test_plain_sums_and_float32_would_not_do():
    """The bound above tells good arithmetic from the two that come to mind first."""
    x = features(shift=1e4)
    truth = np.cov(x.astype(np.float64), rowvar=False)
    for dtype, shift, least in ((np.float64, 1e4, 1e-10), (np.float32, 1.0, 1e-7)):
        x = features(shift=shift)
        truth = np.cov(x.astype(np.float64), rowvar=False)
        x = x.astype(dtype)
        total, squares = x.sum(axis=0), x.T @ x
        plain = (squares - np.outer(total, total) / len(x)) / (len(x) - 1)
        assert relative(plain, truth) > least
        assert relative(moments.finish(streamed(x, 64))[1], truth) < 1e-12


@quick
@given(seeds, st.lists(st.integers(0, 50), max_size=4), st.permutations(range(5)))
def test_merged_in_any_parts_and_order_is_one_shot(seed, cuts, order):
    x = features(seed, 50, 4, shift=100.0)
    parts = np.split(x, sorted([*cuts, *[0] * (4 - len(cuts))]))
    merged = moments.init(4)
    for i in order:
        merged = moments.merge(merged, moments.update(moments.init(4), parts[i]))
    once = moments.update(moments.init(4), x)
    assert merged.number == once.number == 50
    for got, true in zip(moments.finish(merged), moments.finish(once), strict=True):
        assert relative(got, true) < 1e-12


def test_padding_of_the_last_batch_does_not_count():
    x = features(count=10)
    padded = np.full((16, 12), np.nan, np.float32)
    padded[:10] = x
    mask = np.arange(16) < 10
    stats = streamed(padded, 8, mask)
    for got, true in zip(stats, streamed(x, 8), strict=True):
        np.testing.assert_array_equal(got, true)
    none = moments.update(stats, padded[10:], mask[10:])
    np.testing.assert_array_equal(none.scatter, stats.scatter)
    # Counted as zeros, they would have been seen.
    zeros = moments.finish(streamed(np.nan_to_num(padded), 8))[1]
    assert relative(zeros, moments.finish(stats)[1]) > 0.1


def test_what_is_given_is_left_alone():
    x = features(count=10).astype(np.float64)
    kept, stats = x.copy(), moments.init(12)
    moments.merge(stats, moments.update(stats, x))
    np.testing.assert_array_equal(x, kept)
    assert stats.number == 0
    assert not stats.scatter.any()


@pytest.mark.parametrize("done", [0, 1, 64])
def test_statistics_continue_from_a_file_to_the_bit(tmp_path, done):
    x = features(count=128)
    path = moments.save(
        streamed(x[:done], 16) if done else moments.init(12),
        tmp_path / "new" / "stats.npz",
    )
    assert [p.name for p in path.parent.iterdir()] == ["stats.npz"]
    resumed = moments.load(path)
    assert isinstance(resumed.number, int)
    whole = moments.init(12)
    for i in (*range(0, done, 16), *range(done, 128, 16)):
        stop = min(i + 16, done if i < done else 128)
        whole = moments.update(whole, x[i:stop])
        if i >= done:
            resumed = moments.update(resumed, x[i:stop])
    for got, true in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(got, true)


def test_reference_statistics_are_read_ours_and_others(tmp_path):
    stats = streamed(features(), 100)
    mean, cov = moments.finish(stats)
    ours = moments.load_reference(moments.save(stats, tmp_path / "ours.npz"))
    np.testing.assert_array_equal(ours[0], mean)
    np.testing.assert_array_equal(ours[1], cov)
    np.savez(tmp_path / "other.npz", mu=mean.astype(np.float32), sigma=cov)
    other = moments.load_reference(tmp_path / "other.npz")
    assert other[0].dtype == other[1].dtype == np.float64
    np.testing.assert_array_equal(other[1], cov)


class Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def test_a_pickle_is_never_opened(tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    bad = np.array([Canary()], dtype=object)
    np.savez("bad.npz", mu=bad, sigma=bad)
    with refuses("Object arrays cannot be loaded"):
        moments.load_reference("bad.npz")
    np.savez("beside.npz", mu=np.zeros(2), sigma=np.eye(2), other=bad)
    moments.load_reference("beside.npz")
    assert not (tmp_path / "canary").exists()


def test_a_flipped_bit_is_refused_or_harmless(tmp_path):
    stats = streamed(features(dimension=3), 100)
    path = moments.save(stats, tmp_path / "x.npz")
    whole = path.read_bytes()
    refused = 0
    for i in range(0, 8 * len(whole), 17):
        damaged = bytearray(whole)
        damaged[i // 8] ^= 1 << i % 8
        path.write_bytes(damaged)
        try:
            loaded = moments.load(path)
        except ValueError as error:
            refused += "must be an .npz file" in str(error)
        else:
            assert all(map(np.array_equal, loaded, stats))
    assert refused > 200


def test_cut_and_other_files_are_refused(tmp_path, refuses):
    path = moments.save(streamed(features(dimension=3), 100), tmp_path / "x.npz")
    path.write_bytes(path.read_bytes()[:600])
    with refuses("File is not a zip file"):
        moments.load(path)
    path.write_bytes(b"")
    with refuses("No data"):
        moments.load(path)
    np.save(tmp_path / "x.npy", np.zeros(3))
    with refuses("a single array"):
        moments.load(tmp_path / "x.npy")
    np.savez(path, pool_3=np.zeros((5, 3)))
    with refuses("no mu and no sigma"):
        moments.load_reference(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        moments.load(tmp_path / "missing.npz")


# Frechet distance.


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


def test_frechet_of_any_gaussians_in_the_plane():
    """For 2 x 2, tr P^(1/2) = sqrt(tr P + 2 sqrt(det P))."""
    rng = np.random.default_rng(0)
    zero = np.zeros(2)
    for _ in range(20):
        a, b = covariance(rng, 2), covariance(rng, 2)
        root = math.sqrt(
            np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b))
        )
        true = np.trace(a) + np.trace(b) - 2 * root
        assert metrics.frechet_distance(zero, a, zero, b) == pytest.approx(
            true, rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize("dimension", [3, 30, 120])
def test_frechet_is_that_of_other_formulas(dimension):
    rng = np.random.default_rng(dimension)
    a, b = covariance(rng, dimension), covariance(rng, dimension)
    m1, m2 = rng.normal(size=(2, dimension))
    base = np.sum((m1 - m2) ** 2) + np.trace(a + b)
    got = metrics.frechet_distance(m1, a, m2, b)
    values = np.linalg.eigvals(a @ b).astype(complex)
    assert got == pytest.approx(base - 2 * np.sqrt(values).real.sum(), rel=1e-6)
    root = np.trace(scipy.linalg.sqrtm(a @ b).real)
    assert got == pytest.approx(base - 2 * root, rel=1e-6)
    # eigvalsh of the product, which is not symmetric, reads half of it.
    wrong = np.sqrt(np.linalg.eigvalsh(a @ b).clip(0)).sum()
    assert abs(got - (base - 2 * wrong)) > 1e-3 * got


def test_frechet_of_singular_covariances():
    """Rank one: tr (a a^T b b^T)^(1/2) = |a . b|; without a common axis, 0."""
    rng = np.random.default_rng(0)
    zero = np.zeros(200)
    a, b = rng.normal(size=(2, 200))
    got = metrics.frechet_distance(zero, np.outer(a, a), zero, np.outer(b, b))
    assert got == pytest.approx(a @ a + b @ b - 2 * abs(a @ b), rel=1e-12)
    left, right = np.zeros((2, 200, 200))
    left[:90, :90], right[90:, 90:] = covariance(rng, 90), covariance(rng, 110, 20)
    turn = rotation(rng, 200)
    got = metrics.frechet_distance(
        zero, turn @ left @ turn.T, zero, turn @ right @ turn.T
    )
    assert got == pytest.approx(np.trace(left + right), rel=1e-12)
    flat = np.zeros((200, 200))
    assert metrics.frechet_distance(a, flat, a, flat) == 0
    assert metrics.frechet_distance(a, flat, b, left) == pytest.approx(
        np.sum((a - b) ** 2) + np.trace(left), rel=1e-12
    )


def symmetric_form(a, b):
    """What is left of tr a + tr b by the eigenvalues of a^(1/2) b a^(1/2)."""
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    return np.trace(a) + np.trace(b) - 2 * overlap


@pytest.mark.parametrize("count", [2, 50, 200, 1000])
def test_frechet_of_features_with_themselves_is_zero(count):
    """Also of fewer features than dimensions."""
    x = features(count=count, dimension=200, shift=3.0)
    mean, cov = moments.finish(streamed(x, 64))
    itself = metrics.frechet_distance(mean, cov, mean, cov)
    assert 0 <= itself < 1e-11 * np.trace(cov)
    again = streamed(x[::-1], 37)
    assert metrics.frechet_distance(mean, cov, *moments.finish(again)) < 1e-6
    if count == 50:  # the bound that the eigenvalues, rounded before the root, miss
        assert abs(symmetric_form(cov, cov)) > 1e-6


def test_frechet_is_never_below_zero():
    """Rounding alone would put some of these there."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        gaussian = (rng.normal(size=8), covariance(rng, 8))
        assert 0 <= metrics.frechet_distance(*gaussian, *gaussian) < 1e-13


@quick
@given(seeds, st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_frechet_is_the_square_of_a_distance(seed, dimension, rank1, rank2):
    rng = np.random.default_rng(seed)
    turn = rotation(rng, dimension)
    gaussians = [
        (rng.normal(size=dimension), covariance(rng, dimension, rank))
        for rank in (rank1, rank2, dimension)
    ]
    a, b, c = gaussians
    ab = metrics.frechet_distance(*a, *b)
    assert ab >= np.sum((a[0] - b[0]) ** 2) * (1 - 1e-12)
    assert metrics.frechet_distance(*b, *a) == pytest.approx(ab, rel=1e-6, abs=1e-9)
    turned = [(turn @ mean + 1, turn @ cov @ turn.T) for mean, cov in (a, b)]
    assert metrics.frechet_distance(*turned[0], *turned[1]) == pytest.approx(
        ab, rel=1e-6, abs=1e-6
    )
    larger = [(3 * mean, 9 * cov) for mean, cov in (a, b)]
    assert metrics.frechet_distance(*larger[0], *larger[1]) == pytest.approx(
        9 * ab, rel=1e-6, abs=1e-6
    )
    legs = metrics.frechet_distance(*a, *c) ** 0.5
    legs += metrics.frechet_distance(*c, *b) ** 0.5
    assert ab**0.5 <= legs + 1e-6


def test_frechet_of_statistics_summed_in_float32():
    """They are a little off symmetry; which half is read must not matter."""
    rng = np.random.default_rng(0)
    a, b = covariance(rng, 30), covariance(rng, 30)
    off = np.triu(rng.normal(size=(30, 30)), 1) * 1e-6
    zero = np.zeros(30)
    got = metrics.frechet_distance(zero, a + off, zero, b)
    assert got == metrics.frechet_distance(zero, a + off.T, zero, b)
    assert got == pytest.approx(metrics.frechet_distance(zero, a, zero, b), rel=1e-5)


# Inception score.


@pytest.mark.parametrize("classes", [2, 10, 1008])
def test_inception_score_of_certain_classes_is_their_number(classes):
    certain = np.eye(classes)[np.arange(4 * classes) % classes]
    mean, std = metrics.inception_score(certain, splits=4, from_logits=False)
    assert mean == pytest.approx(classes, rel=1e-12)
    assert std < 1e-9
    logits = 1e4 * certain.astype(np.float32)
    assert metrics.inception_score(logits, splits=4)[0] == pytest.approx(classes)


def test_inception_score_of_equal_predictions_is_one():
    logits = np.tile(np.random.default_rng(0).normal(size=20), (30, 1))
    mean, std = metrics.inception_score(logits)
    assert mean == pytest.approx(1, abs=1e-13)
    assert std < 1e-13


def test_inception_score_of_two_classes_with_doubt():
    """Half the samples (p, 1 - p), half the other way: exp(log 2 - H(p))."""
    p = 0.9
    rows = np.array([[p, 1 - p], [1 - p, p]] * 50)
    true = 2 * p**p * (1 - p) ** (1 - p)
    mean, _ = metrics.inception_score(rows, from_logits=False)
    assert mean == pytest.approx(true, rel=1e-12)
    mean, _ = metrics.inception_score(np.log(rows) + 1e3)
    assert mean == pytest.approx(true, rel=1e-12)


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


# Kernel distance.


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


# Precision and recall.


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


def test_manifold_is_that_of_a_neighbour_tree():
    real, fake = features(0, 600, 4), features(1, 500, 4, shift=0.4)
    trees = [NearestNeighbors().fit(x.astype(np.float64)) for x in (real, fake)]
    radii = [tree.kneighbors(n_neighbors=3)[0][:, -1] for tree in trees]
    distance = trees[1].kneighbors(real, n_neighbors=500)
    table = np.empty((600, 500))
    np.put_along_axis(table, distance[1], distance[0], axis=1)
    of_real = table <= radii[0][:, None]
    got = metrics.precision_recall(real, fake, batch=128)
    assert got.precision == of_real.any(axis=0).mean()
    assert got.coverage == of_real.any(axis=1).mean()
    assert got.density == pytest.approx(of_real.sum() / 1500, rel=1e-12)
    assert got.recall == (table <= radii[1]).any(axis=1).mean()


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
GAUSSIAN = (np.zeros(2), np.eye(2))
BAD_CALLS = {
    "no features": (lambda: moments.init(0), "0"),
    "a vector": (lambda: moments.update(moments.init(3), np.zeros(3)), "[3]"),
    "a scalar": (lambda: moments.update(moments.init(3), 0.0), "[]"),
    "images": (lambda: moments.update(moments.init(3), np.zeros((2, 3, 1))), "[2, 3"),
    "another extractor": (lambda: moments.update(moments.init(2), X), "[4, 3]"),
    "not finite": (
        lambda: moments.update(moments.init(2), [[0, 0], [1, np.nan], [np.inf, 0]]),
        "2 rows that are not, the first at 1",
    ),
    "a mask of numbers": (
        lambda: moments.update(moments.init(3), X, np.ones(4)),
        "float64",
    ),
    "a short mask": (
        lambda: moments.update(moments.init(3), X, np.ones(3, bool)),
        "bool of shape (3,)",
    ),
    "others' statistics": (
        lambda: moments.merge(moments.init(3), moments.init(2)),
        "3 and 2",
    ),
    "one feature": (
        lambda: moments.finish(moments.update(moments.init(3), X[:1])),
        "1",
    ),
    "a mean of another length": (
        lambda: metrics.frechet_distance(*GAUSSIAN, np.zeros(3), np.eye(2)),
        "[3] and [2, 2]",
    ),
    "two extractors": (
        lambda: metrics.frechet_distance(*GAUSSIAN, np.zeros(3), np.eye(3)),
        "2 and 3",
    ),
    "a matrix that is not symmetric": (
        lambda: metrics.frechet_distance(*GAUSSIAN, GAUSSIAN[0], [[1, 1], [0, 1]]),
        "1 apart",
    ),
    "no covariance": (
        lambda: metrics.frechet_distance(*GAUSSIAN, GAUSSIAN[0], [[1, 2], [2, 1]]),
        "-1",
    ),
    "infinite moments": (
        lambda: metrics.frechet_distance(*GAUSSIAN, [0, np.inf], np.eye(2)),
        "some that are not",
    ),
    "more splits than samples": (lambda: metrics.inception_score(X), "10"),
    "no split": (lambda: metrics.inception_score(X, splits=0), "0"),
    "logits as probabilities": (
        lambda: metrics.inception_score(X - 1, splits=1, from_logits=False),
        "a least one of -1",
    ),
    "probabilities that do not sum to 1": (
        lambda: metrics.inception_score(X, splits=1, from_logits=False),
        "from 0 to 0",
    ),
    "a subset too large": (
        lambda: metrics.kid(X, X[:3]),
        "1000. Extract more features, or pass subset_size=3",
    ),
    "a subset of one": (lambda: metrics.kid(X, X, subset_size=1), "1"),
    "no subset": (lambda: metrics.kid(X, X, subset_size=2, subsets=0), "0"),
    "features of two sizes": (lambda: metrics.kid(X, X[:, :2]), "[4, 2]"),
    "k of all": (lambda: metrics.precision_recall(X, X, k=4), "4"),
    "k of none": (lambda: metrics.precision_recall(X, X, k=0), "0 and"),
    "no block": (lambda: metrics.precision_recall(X, X, batch=0), "and 0"),
    "rows without numbers": (
        lambda: metrics.precision_recall(X[:, :0], X[:, :0]),
        "[4, 0]",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_refused_with_advice(case, refuses):
    call, got = BAD_CALLS[case]
    with refuses(got):
        call()


@pytest.mark.parametrize(
    ("arrays", "got"),
    [
        ({"number": -1, "mu": np.zeros(2), "scatter": np.eye(2)}, "int64"),
        ({"number": 2.5, "mu": np.zeros(2), "scatter": np.eye(2)}, "float64"),
        ({"number": 2, "mu": np.zeros(2), "scatter": np.eye(3)}, "[2] and [3, 3]"),
        ({"number": 2, "mu": np.zeros(2), "sigma": np.eye(2)}, "no scatter"),
    ],
)
def test_a_file_of_other_things_is_refused(tmp_path, refuses, arrays, got):
    np.savez(tmp_path / "x.npz", **arrays)
    with refuses(got):
        moments.load(tmp_path / "x.npz")
