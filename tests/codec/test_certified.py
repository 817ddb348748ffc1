"""Arithmetic that is the same everywhere: rounded x0, noise, normal probabilities."""

import hashlib
import math
import shutil

import numpy as np

from diffusion_jax.codec import certified, noise, normal
from diffusion_jax.codec.certified import NONE, ONE, Listed


def edges(rng, count):
    """Values of x0 that lie around edges, as far apart as matters."""
    edge = (rng.integers(-4095, 4095, count) + 0.5) / ONE
    return edge + rng.uniform(-1, 1, count) * 2.0 ** rng.integers(-45, -30, count)


def test_machines_that_differ_by_less_than_the_margin_agree():
    rng, margin = np.random.default_rng(0), 2.0**-34
    starts = 64 * np.array([3, 0, 1])
    x0 = edges(rng, 3 * 64).reshape(3, 64)
    grid, near = certified.predict(lambda x, t: x0, x0, 1)
    known = certified.listed(grid, near, starts)
    assert 100 < len(known.place) < 180
    for other in rng.uniform(-margin, margin, (20, 3, 64)):
        theirs, _ = certified.predict(lambda x, t, d=other: x0 + d, x0, 1)
        assert (theirs != grid).any()
        np.testing.assert_array_equal(certified.settled(theirs, starts, known), grid)
    # Each image can be looked up by itself, from a list of many more.
    for i in range(3):
        more = certified.joined([known, Listed(np.array([64 * 9]), np.array([7]))])
        alone = certified.settled(theirs[i : i + 1], starts[i : i + 1], more)
        np.testing.assert_array_equal(alone, grid[i : i + 1])


def test_what_no_two_machines_with_one_network_could_list_is_refused(refuses):
    grid, entry = np.zeros([1, 4], int), Listed(np.array([2]), np.array([2]))
    with refuses("2"):
        certified.settled(grid, np.array([0]), entry)
    assert certified.settled(grid, np.array([3]), entry) is not grid
    assert certified.settled(grid, np.array([0]), NONE) is grid


def test_networks_that_give_other_than_float64_are_refused(refuses):
    for wrong, got in (
        (np.zeros([2, 3], np.float32), "float32"),
        (np.zeros([3]), "(3,)"),
        (np.full([2, 3], np.nan), "a network that says otherwise"),
    ):
        with refuses(got):
            certified.predict(lambda x, t, w=wrong: w, np.zeros([2, 3]), 1)


def test_each_row_of_noise_is_to_be_had_alone():
    whole = noise.rows(7, 3, 2, 0, 40, 21)
    assert (whole.shape, whole.dtype) == ((40, 21), np.int32)
    np.testing.assert_array_equal(noise.rows(7, 3, 2, 13, 5, 21), whole[13:18])
    # Far along too, and apart from what other seeds, steps and chunks have.
    far = noise.rows(7, 3, 2, 2**55, 2, 21)
    np.testing.assert_array_equal(noise.rows(7, 3, 2, 2**55 + 1, 1, 21), far[1:])
    others = [(8, 3, 2), (7, 2, 2), (7, 3, 3), (7, 2, 3)]
    drawn = [whole, far, *(noise.rows(*other, 0, 40, 21) for other in others)]
    assert len({one[0].tobytes() for one in drawn}) == len(drawn)


def test_noise_is_that_of_every_machine():
    drawn = noise.rows(2**64 - 1, 2**32 - 1, 5, 100, 300, 50).astype("<i4")
    assert drawn[0, :3].tolist() == [-264656, -220698, 271576]
    assert drawn[-1, -3:].tolist() == [-290992, 21037, -2048073]
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "218bf277159ff81a"


def test_noise_is_normal():
    drawn = noise.rows(1, 1, 1, 0, 2000, 500) / noise.ONE
    assert abs(drawn.mean()) < 4e-3
    for power, true in ((2, 1.0), (3, 0.0), (4, 3.0)):
        assert abs((drawn**power).mean() - true) < 4e-2
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 4e-3
    assert abs((drawn[:, 1:] * drawn[:, :-1]).mean()) < 4e-3


def cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def test_the_table_of_noise_is_the_inverse_of_the_distribution_function():
    # The exact value is between half a unit below and half a unit above.
    upper = normal.load("normal_quantile").tolist()
    assert len(upper) == 2**15
    for i, found in enumerate(upper, 2**15):
        low, high = (cdf((found + half) / 2**20) for half in (-0.5, 0.5))
        assert low < (i + 0.5) / 2**16 < high
    variance = np.square(np.array(upper) / 2**20).mean()
    assert abs(variance - 1) < 2e-4


def test_normal_probabilities_are_near_never_fall_and_end_exactly():
    points = normal.load("normal_cdf").tolist()
    assert len(points) == 4097
    for i, found in enumerate(points):
        assert abs(found - cdf(i / 256 - 8) * 2**30) < 0.5
    x = np.arange(-9 << 20, 9 << 20, 977)
    found = normal.cdf_fixed(x)
    assert found.dtype == np.int64
    assert (np.diff(found) >= 0).all()
    true = np.array([cdf(v) for v in (x / 2**20).tolist()])
    assert np.abs(found / normal.ONE - true).max() < 5e-7
    ends = np.array([-(2**62), -8 << 20, 0, 8 << 20, 2**62])
    assert normal.cdf_fixed(ends).tolist() == [0, 0, 2**29, 2**30, 2**30]
    fine = np.arange(-5000, 5000)  # of one cell and its neighbours, each value
    assert (np.diff(normal.cdf_fixed(fine)) >= 0).all()


def test_a_damaged_table_is_refused(tmp_path, monkeypatch, refuses):
    name = "normal_cdf"
    shutil.copy(normal.resources.files("diffusion_jax.codec") / f"{name}.npy", tmp_path)
    table = np.load(tmp_path / f"{name}.npy")
    table[7] += 1
    np.save(tmp_path / f"{name}.npy", table)
    monkeypatch.setattr(normal.resources, "files", lambda package: tmp_path)
    with refuses(normal.digest(table)[:12]):
        normal.load.__wrapped__(name)
