"""Continuous schedules against closed forms, and the way between two kinds of time."""

import jax
import jax.numpy as jnp
import numpy as np
from continuous_oracles import LEVELS
from oracles import SCHEDULES, NumpyDDPM

from diffusion_jax import continuous, schedule

BOUND = {"float32": 1e-6, "float64": 1e-12}
TIMES = np.linspace(0, 1, 33)


def test_levels_are_the_closed_forms(precision):
    bound = BOUND[precision]
    for name, truth in LEVELS.items():
        level = truth.schedule(TIMES)
        # Their exponents go to 10: as many units of rounding.
        close = {"rtol": 10 * bound, "err_msg": name}
        np.testing.assert_allclose(level.alpha, truth.alpha(TIMES), **close)
        np.testing.assert_allclose(level.sigma, truth.sigma(TIMES), **close)
        with np.errstate(divide="ignore"):
            logsnr = 2 * np.log(truth.alpha(TIMES) / truth.sigma(TIMES))
        np.testing.assert_allclose(level.logsnr, logsnr, atol=5 * bound, **close)
        assert level.log_alpha.dtype == level.logsnr.dtype == precision
        assert np.all(np.isfinite(level.log_alpha))


def test_options_are_used(x64):
    level = continuous.ve(sigma_min=0.5, sigma_max=8.0)(np.array([0, 0.5, 1]))
    np.testing.assert_allclose(level.sigma, [0.5, 2, 8])
    for make in (continuous.vp, continuous.sub_vp):
        level = make(beta_min=2.0, beta_max=6.0)(0.5)
        np.testing.assert_allclose(level.log_alpha, -0.5 * (2 * 0.5 + 2 * 0.25))
    for low, high in ((-5.0, 20.0), (-3.0, -1.0)):
        made = continuous.cosine(logsnr_min=low, logsnr_max=high)
        ends = made(np.array([0.0, 1.0])).logsnr
        np.testing.assert_allclose(ends, [high, low], rtol=1e-14)


def test_interpolation_meets_the_tables_at_whole_times(precision):
    """As an argument of one compiled program."""
    t, bound, traces = np.arange(101), BOUND[precision], []

    @jax.jit
    def sigma(made, t):
        traces.append(1)
        return continuous.interpolate(made)(t).sigma

    for name, make in SCHEDULES.items():
        truth, made = NumpyDDPM.named(name, 100), make(100)
        level = made(t)
        known = continuous.interpolate(made)(t.astype(float))
        close = {"rtol": 20 * bound, "err_msg": name}
        np.testing.assert_allclose(known.alpha, truth.alphas, atol=1e-16, **close)
        np.testing.assert_allclose(known.sigma, truth.sigmas, **close)
        snr = {**close, "atol": 20 * bound}
        np.testing.assert_allclose(known.logsnr, level.logsnr, **snr)
        between = t + 0.25 * (t < 100)
        again, expected = sigma(made, between), continuous.interpolate(made)(between)
        np.testing.assert_allclose(again, expected.sigma, rtol=1e-4, err_msg=name)
    assert len(traces) == 1


def test_discretised_levels_are_those_at_shares_of_the_chain(precision):
    bound = BOUND[precision]
    for name, truth in LEVELS.items():
        made, t = continuous.discretize(truth.schedule, 20), np.arange(21)
        level = made(t)
        close = {"rtol": 10 * bound, "err_msg": name}
        np.testing.assert_allclose(level.alpha, truth.alpha(t / 20), **close)
        np.testing.assert_allclose(level.sigma, truth.sigma(t / 20), **close)
        # Tables of double precision, whatever the caller computes in.
        assert schedule.tables(made)[0].dtype == np.float64
        # A clean chain ends in data, and is no other before.
        cleaned = continuous.discretize(truth.schedule, 20, clean=True)(t)
        ends = cleaned.alpha[0], cleaned.sigma[0], cleaned.logsnr[0]
        assert ends == (1, 0, np.inf), name
        for one, other in zip(cleaned, level, strict=True):
            np.testing.assert_array_equal(one[1:], other[1:])


def test_last_time_and_its_unit():
    lin = schedule.linear(70)
    real = continuous.interpolate(lin)
    shifted = [continuous.shifted(made, -1.0) for made in (lin, real)]
    whole = lin, real, *shifted, continuous.discretize(continuous.ve(), 70)
    others = continuous.shifted(continuous.vp(), -1.0), schedule.Timed(lambda t: None)
    for made in whole:
        assert (continuous.last_time(made), continuous.counts_steps(made)) == (70, True)
    for made in (*(truth.schedule for truth in LEVELS.values()), *others):
        found = continuous.last_time(made), continuous.counts_steps(made)
        assert found == (1.0, False)


def test_time_of_a_discrete_level_is_its_step(precision):
    """From 1: that of data, at infinity, is never the nearest."""
    inverse = jax.jit(lambda made, t: continuous.time_of(made, made(t).logsnr))
    t = np.arange(1, 1001)
    for name, make in SCHEDULES.items():
        np.testing.assert_array_equal(inverse(make(), t), t, err_msg=name)


def test_time_of_a_level_between_two_is_the_nearest(x64):
    made = schedule.linear(50)
    logsnr = np.asarray(made(np.arange(1, 51)).logsnr)
    gap = -np.diff(logsnr)
    for share, step in ((0.45, 0), (0.55, 1)):
        found = continuous.time_of(made, logsnr[:-1] - share * gap)
        np.testing.assert_array_equal(found, np.arange(1, 50) + step)


def test_time_of_a_real_level(precision):
    bound = {"float32": 3e-5, "float64": 1e-6}[precision]
    made_of = {name: truth.schedule for name, truth in LEVELS.items()}
    for name in ("cosine", "jsd", "linear"):
        made_of[f"{name} chain"] = continuous.interpolate(SCHEDULES[name](50))
    for name, made in made_of.items():
        last = continuous.last_time(made)
        t = np.array([0.004, 0.02, 0.21, 0.333, 0.5, 0.97, 1.0]) * last
        found = continuous.time_of(made, made(t).logsnr)
        np.testing.assert_allclose(found, t, rtol=bound, err_msg=name)
    assert continuous.time_of(made, made(t[2]).logsnr).shape == ()


def test_levels_beyond_the_ends_are_at_the_ends():
    lin = schedule.linear(9)
    for made in (continuous.vp(), continuous.ve(), lin, continuous.interpolate(lin)):
        low, high = np.asarray(continuous.time_of(made, jnp.array([-300.0, 300.0])))
        np.testing.assert_allclose(low, continuous.last_time(made), rtol=1e-6)
        # Of a discrete schedule: 1, the last with noise.
        np.testing.assert_allclose(high, 1 if made is lin else 0, atol=1e-6)


def test_a_shift_moves_the_log_snr_of_every_step(precision):
    t, bound = np.arange(51), {"float32": 3e-6, "float64": 1e-10}[precision]
    for name, nats in (("linear", -2.7726), ("jsd", 1.5)):
        truth, made = NumpyDDPM.named(name, 50), SCHEDULES[name](50)
        moved = continuous.shifted(made, nats)
        assert schedule.num_steps(moved) == 50
        level = moved(t)
        with np.errstate(divide="ignore"):
            odds = truth.noise / truth.alphas_bar * np.exp(-nats)
            expected = 1 / np.sqrt(1 + odds), 1 / np.sqrt(1 + 1 / odds)
        np.testing.assert_allclose(level.alpha, expected[0], rtol=bound, atol=1e-15)
        np.testing.assert_allclose(level.sigma, expected[1], rtol=bound)
        assert (level.alpha[0], level.sigma[0], level.logsnr[0]) == (1, 0, np.inf)
        # And it can be interpolated, as any that preserves variance.
        real = continuous.interpolate(moved)(t.astype(float))
        np.testing.assert_allclose(real.sigma, expected[1], rtol=20 * bound)


def test_shifts_of_shifts_and_of_interpolated_steps(x64):
    lin = schedule.linear(30)
    real = continuous.interpolate(lin)
    moved = continuous.shifted(continuous.shifted(real, -3.0), 1.0)
    t = np.array([0.5, 7.25, 30.0])
    np.testing.assert_allclose(moved(t).logsnr, real(t).logsnr - 2, rtol=1e-12)
    np.testing.assert_allclose(continuous.time_of(moved, moved(t).logsnr), t)
    total = continuous.discretize(continuous.shifted(continuous.vp(), -3.0), 10)
    np.testing.assert_allclose(total(7).logsnr, continuous.vp()(0.7).logsnr - 3)


def test_a_shift_may_be_traced(x64):
    """By how much, and what: then the tables are traced too."""
    lin = schedule.linear(30)
    expected = continuous.shifted(lin, -1.5)(11)
    for made in (lin, continuous.interpolate(lin)):

        def level(nats, made=made):
            t = 11 if schedule.is_discrete(made) else 11.0
            return tuple(continuous.shifted(made, nats)(t))

        np.testing.assert_allclose(jax.jit(level)(-1.5), expected, rtol=1e-12)
        slope = jax.grad(lambda nats: level(nats)[0])(-1.5)
        np.testing.assert_allclose(slope, 0.5 * expected.sigma**2, rtol=1e-9)
    inside = jax.jit(lambda made: tuple(continuous.shifted(made, -1.5)(11)))
    np.testing.assert_allclose(inside(lin), expected, rtol=1e-12)


def test_tables_of_traced_parameters(precision):
    """In the caller's precision; those that are known are double inside jit too."""
    t, bound = np.arange(11), BOUND[precision]

    @jax.jit
    def traced(made):
        known = continuous.discretize(continuous.vp(), 10)
        assert schedule.tables(known)[1].dtype == np.float64
        both = [continuous.discretize(made, 10, clean=clean) for clean in (False, True)]
        for found in both:
            assert schedule.num_steps(found) == 10
            assert schedule.tables(found)[0].dtype == precision
        return known(3).alpha, [tuple(found(t)) for found in both]

    for made in (continuous.vp(), continuous.ve(), continuous.cosine()):
        alpha, both = traced(made)
        np.testing.assert_allclose(alpha, continuous.vp()(0.3).alpha, rtol=1e-6)
        for clean, found in zip((False, True), both, strict=True):
            known = continuous.discretize(made, 10, clean=clean)(t)
            np.testing.assert_allclose(found, known, rtol=30 * bound, atol=bound)
