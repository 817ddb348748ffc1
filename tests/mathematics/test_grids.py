"""Time grids on every schedule: whole where they must be, and as spaced as said."""

import itertools

import jax
import numpy as np
import pytest
from continuous_oracles import SDES
from oracles import SCHEDULES

from diffusion_jax import continuous, grids, schedule

EVEN, SPACED = (grids.uniform, grids.quadratic), (grids.logsnr, grids.karras)
LIN = schedule.linear()
REAL = {
    **{name: sde.schedule for name, sde in SDES.items()},
    "interpolated": continuous.interpolate(LIN),
}


def hold(times, steps, first, *, whole):
    assert times.shape == (steps + 1,)
    np.testing.assert_allclose(times[[0, -1]], [first, 0], rtol=1e-6)
    assert np.all(np.diff(times) < 0)
    assert np.issubdtype(times.dtype, np.integer) is whole


@pytest.mark.parametrize("grid", [*EVEN, *SPACED])
def test_any_number_of_steps_of_any_schedule(grid):
    for name, total in itertools.product(("linear", "jsd"), (2, 6)):
        made = SCHEDULES[name](total)
        for steps in range(1, total + 1):
            times = grid(made, steps)
            # A grid in log-SNR skips what is beyond 200 times the signal.
            first = times[0] if grid in SPACED else total
            hold(times, steps, first, whole=True)
            assert steps <= first <= total, name
        np.testing.assert_array_equal(times, np.arange(total, -1, -1))
    for made, steps in itertools.product(REAL.values(), (1, 57)):
        # ve ends at 50 times the signal, vp at 152.
        hold(grid(made, steps), steps, continuous.last_time(made), whole=False)


def test_uniform_and_quadratic_grids_are_within_half_a_step_of_their_formula():
    for steps in (1, 7, 20, 99):
        share = np.arange(steps, -1, -1) / steps
        np.testing.assert_allclose(grids.uniform(LIN, steps), 1000 * share, atol=0.5)
        real = grids.quadratic(continuous.vp(), steps)
        np.testing.assert_allclose(real, share**2, rtol=1e-12)
    np.testing.assert_allclose(
        grids.quadratic(LIN, 7), 1e6 / 49e3 * np.arange(7, -1, -1) ** 2, atol=0.5
    )
    np.testing.assert_array_equal(grids.uniform(LIN), np.arange(1000, -1, -1))


def _logsnr(made, t):
    with jax.enable_x64(True):
        return np.asarray(made(np.array(t)).logsnr, np.float64)


def test_steps_are_even_in_what_the_grid_is_named_for():
    for made in REAL.values():
        even = np.diff(_logsnr(made, grids.logsnr(made, 25)[:-1]))
        np.testing.assert_allclose(even, even.mean(), rtol=1e-5)
        for rho in (7.0, 3.0):
            ratio = np.exp(-0.5 * _logsnr(made, grids.karras(made, 25, rho=rho)[:-1]))
            even = np.diff(ratio ** (1 / rho))
            np.testing.assert_allclose(even, even.mean(), rtol=1e-5)


def test_ends_are_the_first_time_and_the_last_above_zero():
    for grid in SPACED:
        for made, ends, last in (
            (LIN, (700, 20), 1),
            (continuous.vp(), (0.8, 0.01), 1e-3),
        ):
            times = grid(made, 10, ends=ends)
            np.testing.assert_allclose(times[[0, -2, -1]], [*ends, 0])
            np.testing.assert_allclose(grid(made, 1, ends=ends), [ends[0], 0])
            np.testing.assert_allclose(grid(made, 10)[-2], last)


def test_the_first_time_is_one_at_which_steps_do_something():
    """Beyond 200 times the signal there is nothing to be seen of the data."""
    for name, least in (("jsd", 1), ("cosine", 100)):
        made = SCHEDULES[name]()
        first = grids.logsnr(made, 20)[0]
        before, there, last = np.exp(-0.5 * _logsnr(made, [first - 1, first, 1000]))
        assert before < 210
        assert least < there < 400 < last


def test_a_grid_is_the_same_under_jit_and_in_any_precision():
    for made, grid in itertools.product((LIN, continuous.vp()), (*EVEN, *SPACED)):
        expected, seen = grid(made, 15), []
        jax.jit(lambda x, g=grid, m=made, s=seen: s.append(g(m, 15)) or x)(1.0)
        with jax.enable_x64(True):
            seen.append(grid(made, 15))
        np.testing.assert_array_equal(seen, [expected, expected])
