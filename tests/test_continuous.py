"""Continuous schedules against closed forms, and the way between two kinds of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from continuous_oracles import SDES
from oracles import SCHEDULES, NumpyDDPM, betas_of

from diffusion_jax import continuous, gaussian, schedule

BOUND = {"float32": 1e-6, "float64": 1e-12}
TIMES = np.linspace(0, 1, 33)


@pytest.mark.parametrize("name", SDES)
def test_levels_are_the_closed_forms(name, precision):
    truth, bound = SDES[name], BOUND[precision]
    level = truth.schedule(TIMES)
    # Their exponents go to 10: as many units of rounding.
    np.testing.assert_allclose(level.alpha, truth.alpha(TIMES), rtol=10 * bound)
    np.testing.assert_allclose(level.sigma, truth.sigma(TIMES), rtol=10 * bound)
    with np.errstate(divide="ignore"):
        logsnr = 2 * np.log(truth.alpha(TIMES) / truth.sigma(TIMES))
    np.testing.assert_allclose(level.logsnr, logsnr, rtol=10 * bound, atol=5 * bound)
    assert level.log_alpha.dtype == level.logsnr.dtype == precision
    assert np.all(np.isfinite(level.log_alpha))


@pytest.mark.parametrize("name", SDES)
def test_options_are_used(name, x64):
    if name == "ve":
        level = continuous.ve(sigma_min=0.5, sigma_max=8.0)(np.array([0, 0.5, 1]))
        np.testing.assert_allclose(level.sigma, [0.5, 2, 8])
    else:
        make = {"vp": continuous.vp, "sub_vp": continuous.sub_vp}[name]
        level = make(beta_min=2.0, beta_max=6.0)(0.5)
        np.testing.assert_allclose(level.log_alpha, -0.5 * (2 * 0.5 + 2 * 0.25))


@pytest.mark.parametrize("name", SCHEDULES)
def test_interpolation_meets_the_tables_at_whole_times(name, precision):
    truth = NumpyDDPM.named(name, 100)
    made = SCHEDULES[name](100)
    t = np.arange(101)
    found = continuous.interpolate(made)(t.astype(float))
    bound = BOUND[precision]
    np.testing.assert_allclose(found.alpha, truth.alphas, rtol=20 * bound, atol=1e-16)
    np.testing.assert_allclose(found.sigma, truth.sigmas, rtol=20 * bound)
    np.testing.assert_allclose(
        found.logsnr, made(t).logsnr, rtol=20 * bound, atol=20 * bound
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_beta_is_constant_within_a_step(name, x64):
    real = continuous.interpolate(SCHEDULES[name](20))
    betas = betas_of("linear" if name == "from_betas" else name, 20)[:-1]
    shares = np.array([0.1, 0.25, 0.5, 0.9])
    t = np.arange(19)[:, None] + shares[None]
    log_alpha = np.asarray(real(t).log_alpha)
    start = np.asarray(real(np.arange(19.0)).log_alpha)[:, None]
    per_time = (log_alpha - start) / shares
    expected = np.broadcast_to(0.5 * np.log1p(-betas)[:, None], per_time.shape)
    np.testing.assert_allclose(per_time, expected, rtol=1e-7, atol=1e-12)
    level = real(t)
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-12)


def test_interpolation_goes_through_jit_without_retracing():
    traces = []

    @jax.jit
    def sigma(made, t):
        traces.append(1)
        return continuous.interpolate(made)(t).sigma

    for make in SCHEDULES.values():
        made = make(30)
        expected = continuous.interpolate(made)(7.25).sigma
        np.testing.assert_allclose(sigma(made, 7.25), expected, rtol=1e-4)
    assert len(traces) == 1


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("total", [1, 10, 1000])
def test_discretised_levels_are_those_at_shares_of_the_chain(name, total, precision):
    truth = SDES[name]
    made = continuous.discretize(truth.schedule, total)
    assert schedule.is_discrete(made)
    assert schedule.num_steps(made) == total
    t = np.arange(total + 1)
    level = made(t)
    bound = BOUND[precision]
    np.testing.assert_allclose(level.alpha, truth.alpha(t / total), rtol=10 * bound)
    np.testing.assert_allclose(level.sigma, truth.sigma(t / total), rtol=10 * bound)
    # Tables of double precision, whatever the caller computes in.
    assert schedule.tables(made)[0].dtype == np.float64


def test_there_and_back(x64):
    """Interpolated, a discretised vp is close to itself: to 1 / T squared."""
    vp, errors = continuous.vp(), []
    t = np.linspace(0.013, 0.987, 50)
    for total in (100, 200):
        back = continuous.interpolate(continuous.discretize(vp, total))
        errors.append(np.abs(back(total * t).alpha - vp(t).alpha).max())
        again = continuous.discretize(vp, total)(np.arange(total + 1))
        whole = back(np.arange(total + 1.0))
        np.testing.assert_allclose(whole.log_alpha, again.log_alpha, rtol=1e-12)
    assert errors[0] < 1e-3
    assert errors[1] < 0.5 * errors[0]


def test_last_time_and_its_unit():
    lin = schedule.linear(70)
    for made, last, steps in (
        (lin, 70, True),
        (continuous.interpolate(lin), 70, True),
        (continuous.discretize(continuous.ve(), 30), 30, True),
        (continuous.vp(), 1.0, False),
        (continuous.sub_vp(), 1.0, False),
        (continuous.ve(), 1.0, False),
        (lambda t: None, 1.0, False),
    ):
        assert continuous.last_time(made) == last
        assert continuous.counts_steps(made) is steps


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [2, 30, 1000])
def test_time_of_a_discrete_level_is_its_step(name, total, precision):
    """From 1: that of data, at infinity, is never the nearest."""
    made = SCHEDULES[name](total)
    t = np.arange(1, total + 1)
    np.testing.assert_array_equal(continuous.time_of(made, made(t).logsnr), t)


def test_time_of_a_level_between_two_is_the_nearest(x64):
    made = schedule.linear(50)
    logsnr = np.asarray(made(np.arange(1, 51)).logsnr)
    gap = -np.diff(logsnr)
    for share, step in ((0.45, 0), (0.55, 1)):
        found = continuous.time_of(made, logsnr[:-1] - share * gap)
        np.testing.assert_array_equal(found, np.arange(1, 50) + step)


@pytest.mark.parametrize("name", [*SDES, *SCHEDULES])
def test_time_of_a_real_level(name, precision):
    if name in SDES:
        made, last = SDES[name].schedule, 1.0
    else:
        made, last = continuous.interpolate(SCHEDULES[name](50)), 50.0
    t = np.array([0.004, 0.02, 0.21, 0.333, 0.5, 0.97, 1.0]) * last
    found = continuous.time_of(made, made(t).logsnr)
    bound = {"float32": 3e-5, "float64": 1e-6}[precision]
    np.testing.assert_allclose(found, t, rtol=bound)
    assert continuous.time_of(made, made(t[2]).logsnr).shape == ()


@pytest.mark.parametrize("name", ["vp", "ve", "real", "linear"])
def test_levels_beyond_the_ends_are_at_the_ends(name):
    made = {
        "real": continuous.interpolate(schedule.linear(9)),
        "linear": schedule.linear(9),
    }.get(name) or SDES[name].schedule
    low, high = np.asarray(continuous.time_of(made, jnp.array([-300.0, 300.0])))
    np.testing.assert_allclose(low, continuous.last_time(made), rtol=1e-6)
    # Of a discrete schedule: 1, the last with noise.
    np.testing.assert_allclose(high, 1 if name == "linear" else 0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda: continuous.vp(beta_min=0.0), "0.0"),
        (lambda: continuous.sub_vp(beta_min=3.0, beta_max=2.0), "3.0"),
        (lambda: continuous.ve(sigma_min=0.0), "0.0"),
        (lambda: continuous.ve(sigma_min=2.0, sigma_max=1.0), "2.0"),
        (lambda: continuous.vp()(1.5), "1.5"),
        (lambda: continuous.ve()(np.array([-0.1, 0.5])), "-0.1"),
        (lambda: continuous.interpolate(schedule.linear(10))(10.5), "10.5"),
        (lambda: continuous.vp()(np.nan), "nan"),
        (lambda: continuous.interpolate(continuous.vp()), "_vp"),
        (
            lambda: continuous.interpolate(continuous.discretize(continuous.ve(), 9)),
            "off by",
        ),
        (lambda: continuous.discretize(continuous.vp(), 0), "0"),
    ],
)
def test_bad_input_is_refused(call, got, refuses):
    with refuses(got):
        call()


def test_a_network_is_fed_real_times():
    """As many as it is asked for, one less where times count steps."""
    fed = []

    def network(x, t):
        fed.append(np.asarray(t))
        return x

    x = jnp.ones([2, 3])
    lin = schedule.linear(10)
    for made, t in ((continuous.interpolate(lin), 4.5), (continuous.vp(), 0.25)):
        gaussian.denoiser(network, made, "eps")(x, t)
    np.testing.assert_array_equal(fed, [[3.5, 3.5], [0.25, 0.25]])
