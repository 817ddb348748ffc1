"""Mean and covariance in one pass against NumPy, and the files that keep them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import features, streamed

from diffusion_jax.evaluation import moments


def relative(got, true):
    """Largest error over the largest true number."""
    return np.abs(np.asarray(got) - true).max() / np.abs(true).max()


def test_one_pass_is_the_covariance():
    """To a bound that plain sums and float32, what comes to mind first, are beyond."""
    for shift in (0.0, 1e4):
        x = features(shift=shift)
        exact = x.astype(np.float64)
        truth = np.cov(exact, rowvar=False)
        for size in (1, 7, 128, 1000):
            mean, cov = moments.finish(streamed(x, size))
            assert relative(mean, exact.mean(axis=0)) < 1e-14, (shift, size)
            assert relative(cov, truth) < 1e-12, (shift, size)
            np.testing.assert_array_equal(cov, cov.T)
    for dtype, shift, least in ((np.float64, 1e4, 1e-10), (np.float32, 1.0, 1e-7)):
        x = features(shift=shift)
        truth, x = np.cov(x.astype(np.float64), rowvar=False), x.astype(dtype)
        total, squares = x.sum(axis=0), x.T @ x
        plain = (squares - np.outer(total, total) / len(x)) / (len(x) - 1)
        assert relative(plain, truth) > least


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 50), max_size=4),
    st.permutations(range(5)),
)
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


def test_what_is_given_is_left_alone():
    x = features(count=10).astype(np.float64)
    kept, stats = x.copy(), moments.init(12)
    moments.merge(stats, moments.update(stats, x))
    np.testing.assert_array_equal(x, kept)
    assert stats.number == 0
    assert not stats.scatter.any()


# Files.


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


def test_other_files_are_refused(tmp_path, refuses):
    path = moments.save(streamed(features(dimension=3), 100), tmp_path / "x.npz")
    whole = path.read_bytes()
    at = whole.index(b"\x93NUMPY", whole.index(b"mu.npy")) + 130
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with refuses("Bad CRC-32"):
        moments.load_reference(path)
    np.savez(path, pool_3=np.zeros((5, 3)))
    with refuses("no mu and no sigma"):
        moments.load_reference(path)
    np.savez(path, mu=np.zeros(2), sigma=np.eye(3))
    with refuses("[2] and [3, 3]"):
        moments.load_reference(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        moments.load_reference(tmp_path / "missing.npz")


def test_a_variance_below_zero_by_rounding_is_accepted():
    # Of a feature that is constant, as others compute it.
    _, matrix = moments.as_moments(np.zeros(2), np.diag([2.0, -2e-15]), "of others")
    assert matrix[0, 0] == 2
