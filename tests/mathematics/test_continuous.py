"""Continuous schedules against closed forms, and the way between two kinds of time."""

import jax
import jax.numpy as jnp
import numpy as np
from continuous_oracles import LEVELS
from oracles import SCHEDULES, NumpyDDPM

from diffusion_jax import continuous, schedule

BOUND = {"float32": 1e-6, "float64": 1e-12}
TIMES = np.linspace(0, 1, 33)


def test_levels_are_the_closed_forms_in_real_time_and_in_steps(precision):
    bound, steps = BOUND[precision], np.arange(21)
    for name, truth in LEVELS.items():
        # Their exponents go to 10: as many units of rounding.
        close = {"rtol": 10 * bound, "err_msg": name}
        chain = continuous.discretize(truth.schedule, 20)
        for level, t in ((truth.schedule(TIMES), TIMES), (chain(steps), steps / 20)):
            np.testing.assert_allclose(level.alpha, truth.alpha(t), **close)
            np.testing.assert_allclose(level.sigma, truth.sigma(t), **close)
            with np.errstate(divide="ignore"):
                logsnr = 2 * np.log(truth.alpha(t) / truth.sigma(t))
            np.testing.assert_allclose(level.logsnr, logsnr, atol=5 * bound, **close)
            assert level.log_alpha.dtype == level.logsnr.dtype == precision
            assert np.all(np.isfinite(level.log_alpha))
        # Tables of double precision, whatever the caller computes in.
        assert schedule.tables(chain)[0].dtype == np.float64
        # A clean chain ends in data, and is no other before.
        cleaned = continuous.discretize(truth.schedule, 20, clean=True)(steps)
        assert (cleaned.log_alpha[0], cleaned.logsnr[0]) == (0, np.inf), name
        for one, other in zip(cleaned, level, strict=True):
            np.testing.assert_array_equal(one[1:], other[1:])


def test_options_are_used(x64):
    ve = continuous.ve(sigma_min=0.5, sigma_max=8.0)
    np.testing.assert_allclose(ve(0.5).sigma, 2)
    for make in (continuous.vp, continuous.sub_vp):
        level = make(beta_min=2.0, beta_max=6.0)(0.5)
        np.testing.assert_allclose(level.log_alpha, -0.5 * (2 * 0.5 + 2 * 0.25))
    cosine = continuous.cosine(logsnr_min=-3.0, logsnr_max=-1.0)
    np.testing.assert_allclose(cosine(np.array([0.0, 1.0])).logsnr, [-1, -3])


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


def test_last_time_and_its_unit():
    def facts(made):
        return continuous.last_time(made), continuous.counts_steps(made)

    lin = schedule.linear(70)
    whole = [lin, continuous.interpolate(lin)]
    whole += [continuous.shifted(made, -1.0) for made in whole]
    for made in (*whole, continuous.discretize(continuous.ve(), 70)):
        assert facts(made) == (70, True)
    others = [truth.schedule for truth in LEVELS.values()]
    for made in (*others, schedule.Timed(lambda t: None)):
        assert facts(made) == (1.0, False)


def test_time_of_a_discrete_level_is_the_nearest_step(precision):
    """From 1: that of data, at infinity, is never the nearest."""
    inverse = jax.jit(lambda made, logsnr: continuous.time_of(made, logsnr))
    t = np.arange(1, 1001)
    for name, make in SCHEDULES.items():
        found = inverse(make(), make()(t).logsnr)
        np.testing.assert_array_equal(found, t, err_msg=name)
    logsnr = schedule.linear()(t).logsnr
    for share, step in ((0.45, 1), (0.55, 2)):
        between = logsnr[:-1] + share * jnp.diff(logsnr)
        np.testing.assert_array_equal(
            inverse(schedule.linear(), between), t[:-1] + step - 1
        )


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
        # Beyond the ends: of them. Of a discrete schedule 1, the last with noise.
        ends = continuous.time_of(made, jnp.array([-300.0, 300.0]))
        np.testing.assert_allclose(ends, [last, 0], rtol=1e-6, atol=1e-6 * last)
    assert continuous.time_of(made, made(t[2]).logsnr).shape == ()
    far = continuous.time_of(schedule.linear(9), jnp.array([-300.0, 300.0]))
    np.testing.assert_array_equal(far, [9, 1])


def test_a_shift_moves_the_log_snr_of_every_step(precision):
    t, bound = np.arange(51), {"float32": 3e-6, "float64": 1e-10}[precision]
    for name, nats in (("linear", -2.7726), ("jsd", 1.5)):
        truth = NumpyDDPM.named(name, 50)
        moved = continuous.shifted(SCHEDULES[name](50), nats)
        level = moved(t)
        with np.errstate(divide="ignore"):
            odds = truth.noise / truth.alphas_bar * np.exp(-nats)
            alpha, sigma = 1 / np.sqrt(1 + odds), 1 / np.sqrt(1 + 1 / odds)
        np.testing.assert_allclose(level.alpha, alpha, rtol=bound, atol=1e-15)
        np.testing.assert_allclose(level.sigma, sigma, rtol=bound)
        assert (level.log_alpha[0], level.logsnr[0]) == (0, np.inf)
        # And it can be interpolated, as any that preserves variance.
        real = continuous.interpolate(moved)(t.astype(float))
        np.testing.assert_allclose(real.sigma, sigma, rtol=20 * bound)


def test_shifts_of_shifts_and_of_interpolated_steps(x64):
    lin = schedule.linear(30)
    real = continuous.interpolate(lin)
    moved = continuous.shifted(continuous.shifted(real, -3.0), 1.0)
    t = np.array([0.5, 7.25, 30.0])
    np.testing.assert_allclose(moved(t).logsnr, real(t).logsnr - 2, rtol=1e-12)
    np.testing.assert_allclose(continuous.time_of(moved, moved(t).logsnr), t)
    total = continuous.discretize(continuous.shifted(continuous.vp(), -3.0), 10)
    np.testing.assert_allclose(total(7).logsnr, continuous.vp()(0.7).logsnr - 3)


def test_tables_of_traced_parameters(precision):
    """In the caller's precision; those that are known are double inside jit too."""
    t, bound = np.arange(11), BOUND[precision]

    def chains(made, lin, nats):
        real = continuous.shifted(continuous.interpolate(lin), nats)
        plain = [continuous.discretize(known, 10) for known in (made, real)]
        clean = continuous.discretize(made, 10, clean=True)
        return [*plain, clean, continuous.shifted(lin, nats)]

    @jax.jit
    def traced(*given):
        known = continuous.discretize(continuous.vp(), 10)
        assert schedule.tables(known)[1].dtype == np.float64
        found = chains(*given)
        assert all(schedule.tables(chain)[0].dtype == precision for chain in found)
        return [tuple(chain(t)) for chain in found]

    for made in (continuous.vp(), continuous.ve(), continuous.cosine()):
        given = made, schedule.linear(10), -1.5
        for found, known in zip(traced(*given), chains(*given), strict=True):
            np.testing.assert_allclose(found, known(t), rtol=30 * bound, atol=bound)
