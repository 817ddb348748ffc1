"""Time grids on every schedule: whole where they must be, and as spaced as said."""

import jax
import numpy as np
import pytest
from continuous_oracles import SDES
from oracles import SCHEDULES

from diffusion_jax import continuous, grids, schedule

MAKERS = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "logsnr": grids.logsnr,
    "karras": grids.karras,
}
LIN = schedule.linear()
REAL = {
    **{name: sde.schedule for name, sde in SDES.items()},
    "interpolated": continuous.interpolate(LIN),
}


def hold(times, steps, first, *, whole):
    assert times.shape == (steps + 1,)
    assert times[0] == pytest.approx(first, rel=1e-6)
    assert times[-1] == 0
    assert np.all(np.diff(times) < 0)
    assert np.issubdtype(times.dtype, np.integer) is whole


def test_every_number_of_steps_of_a_discrete_schedule():
    for name in ("linear", "jsd"):
        for total in (2, 6):
            made = SCHEDULES[name](total)
            for grid, maker in MAKERS.items():
                for steps in range(1, total + 1):
                    times = maker(made, steps)
                    # A grid in log-SNR skips what is beyond 200 times the signal.
                    first = times[0] if grid in ("logsnr", "karras") else total
                    hold(times, steps, first, whole=True)
                    assert steps <= first <= total, (name, grid)
                np.testing.assert_array_equal(times, np.arange(total, -1, -1))


def test_any_number_of_steps_of_a_continuous_schedule():
    for made in REAL.values():
        for grid in MAKERS.values():
            for steps in (1, 57):
                # ve ends at 50 times the signal, vp at 152.
                hold(grid(made, steps), steps, continuous.last_time(made), whole=False)


def test_uniform_grid_is_within_half_a_step_of_even():
    for total in (1, 7, 100):
        made = schedule.linear(total)
        for steps in range(1, total + 1):
            grid = grids.uniform(made, steps)
            gaps = -np.diff(grid)
            assert gaps.max() - gaps.min() <= 2
            assert np.all(abs(grid - np.linspace(total, 0, steps + 1)) <= 0.5)
        np.testing.assert_array_equal(grids.uniform(made), np.arange(total, -1, -1))


def test_quadratic_grid_follows_its_square():
    grid = grids.quadratic(LIN, 20)[::-1]
    np.testing.assert_allclose(grid, 1000 * (np.arange(21) / 20) ** 2, atol=0.5)
    real = grids.quadratic(continuous.vp(), 20)[::-1]
    np.testing.assert_allclose(real, (np.arange(21) / 20) ** 2, rtol=1e-12)


def _logsnr(made, t):
    with jax.enable_x64(True):
        return np.asarray(made(t).logsnr, np.float64)


def test_steps_are_even_in_what_the_grid_is_named_for():
    for made in REAL.values():
        even = np.diff(_logsnr(made, grids.logsnr(made, 25)[:-1]))
        np.testing.assert_allclose(even, even.mean(), rtol=1e-5)
        for rho in (7.0, 3.0):
            ratio = np.exp(-0.5 * _logsnr(made, grids.karras(made, 25, rho=rho)[:-1]))
            even = np.diff(ratio ** (1 / rho))
            np.testing.assert_allclose(even, even.mean(), rtol=1e-5)


def test_rounding_takes_the_nearest_level_where_they_are_apart():
    """The whole time next to the one that an interpolated schedule has there."""
    for name in ("linear", "quad", "cosine", "jsd"):
        made = SCHEDULES[name]()
        real = continuous.interpolate(made)
        for grid in (grids.logsnr, grids.karras):
            whole = grid(made, 12)
            exact = grid(real, 12, ends=(float(whole[0]), 1.0))
            apart = np.abs(np.diff(exact))[:-1].min() > 1
            assert np.abs(whole - exact).max() < (1 if apart else 3), name


def test_ends_are_the_first_time_and_the_last_above_zero():
    for grid in (grids.logsnr, grids.karras):
        times = grid(LIN, 10, ends=(700, 20))
        assert (times[0], times[-2], times[-1]) == (700, 20, 0)
        times = grid(continuous.vp(), 10, ends=(0.8, 0.01))
        np.testing.assert_allclose(times[[0, -2, -1]], [0.8, 0.01, 0])
        times = grid(continuous.vp(), 1, ends=(0.8, 0.01))
        np.testing.assert_allclose(times, [0.8, 0])
        assert grid(LIN, 10)[-2] == 1
        np.testing.assert_allclose(grid(continuous.vp(), 10)[-2], 1e-3)


def test_the_first_time_is_one_at_which_steps_do_something():
    """Beyond 200 times the signal there is nothing to be seen of the data."""
    for name, least in (("jsd", 1), ("cosine", 100)):
        made = SCHEDULES[name]()
        first = grids.logsnr(made, 20)[0]
        ratio = np.exp(-0.5 * _logsnr(made, np.array([first - 1, first, 1000])))
        assert first < 1000
        assert ratio[0] < 210
        assert least < ratio[1] < 400
        assert ratio[2] > 400
        assert grids.uniform(made, 20)[0] == 1000


def test_a_grid_is_the_same_under_jit_and_in_any_precision():
    for made in (LIN, continuous.vp()):
        for grid in MAKERS.values():
            expected, seen = grid(made, 15), []
            jax.jit(lambda x, g=grid, m=made, s=seen: s.append(g(m, 15)) or x)(1.0)
            np.testing.assert_array_equal(seen[0], expected)
            with jax.enable_x64(True):
                np.testing.assert_array_equal(grid(made, 15), expected)


TEN = schedule.linear(10)


REFUSED = [
    *((lambda make=make: make(TEN, 11), "11") for make in MAKERS.values()),
    *((lambda make=make: make(TEN, 0), "0") for make in MAKERS.values()),
    (lambda: grids.uniform(continuous.vp(), -1), "-1"),
    (lambda: grids.uniform(continuous.vp()), "_vp"),
    (lambda: grids.logsnr(TEN, 4, ends=(3, 5)), "(3, 5)"),
    (lambda: grids.logsnr(TEN, 4, ends=(3, 1)), "(3, 1)"),
    (lambda: grids.logsnr(TEN, 4, ends=(11, 5)), "(11, 5)"),
    (lambda: grids.karras(continuous.vp(), 4, ends=(1.0, 0.0)), "(1.0, 0.0)"),
]


def test_bad_input_is_refused(refuses):
    for call, got in REFUSED:
        with refuses(got):
            call()
