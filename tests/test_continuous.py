"""Continuous schedules against closed forms, and the way between two kinds of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from continuous_oracles import (
    LEFT,
    LEVELS,
    SDES,
    exact_denoiser,
    exact_flow,
    gaussian_image,
)
from jax.tree_util import Partial
from oracles import SCHEDULES, NumpyDDPM, betas_of

from diffusion_jax import continuous, gaussian, grids, samplers, schedule, sde

BOUND = {"float32": 1e-6, "float64": 1e-12}
TIMES = np.linspace(0, 1, 33)


@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_the_closed_forms(name, precision):
    truth, bound = LEVELS[name], BOUND[precision]
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


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("total", [1, 10, 1000])
def test_discretised_levels_are_those_at_shares_of_the_chain(name, total, precision):
    truth = LEVELS[name]
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
        (continuous.cosine(), 1.0, False),
        (continuous.flow(), 1.0, False),
        (continuous.shifted(continuous.vp(), -1.0), 1.0, False),
        (continuous.shifted(lin, -1.0), 70, True),
        (continuous.shifted(continuous.interpolate(lin), -1.0), 70, True),
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


@pytest.mark.parametrize("name", [*LEVELS, *SCHEDULES])
def test_time_of_a_real_level(name, precision):
    if name in LEVELS:
        made, last = LEVELS[name].schedule, 1.0
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
        (lambda: continuous.cosine(logsnr_min=5.0, logsnr_max=5.0), "5.0"),
        (lambda: continuous.cosine(logsnr_max=np.nan), "nan"),
        (lambda: continuous.flow(alpha_min=0.0), "0.0"),
        (lambda: continuous.flow(alpha_min=1.0), "1.0"),
        (lambda: continuous.cosine()(1.01), "1.01"),
        (lambda: continuous.shifted(continuous.ve(), 1.0), "off by"),
        (lambda: continuous.shifted(continuous.sub_vp(), 1.0), "off by"),
        (lambda: continuous.shifted(continuous.flow(), 1.0), "off by"),
        (
            lambda: continuous.shifted(continuous.discretize(continuous.ve(), 9), 1.0),
            "off by",
        ),
        (lambda: continuous.shifted(continuous.vp(), np.inf), "inf"),
        (lambda: continuous.shifted(continuous.vp(), [1.0, 2.0]), "[1.0, 2.0]"),
        (lambda: continuous.shifted(continuous.vp(), -1.0)(1.5), "1.5"),
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


@pytest.mark.parametrize("name", ["cosine", "flow", "shifted"])
def test_coefficients_are_those_of_the_closed_forms(name, precision):
    truth = LEVELS[name]
    # Rounded as the caller's are, and up to the very end.
    times = np.asarray(jnp.asarray([1e-3, 0.1, 0.4999, 0.5, 0.9, 1.0]), np.float64)
    f, g = sde.coefficients(truth.schedule, times)
    bound = {"float32": 3e-6, "float64": 1e-11}[precision]
    np.testing.assert_allclose(f, truth.drift(times), rtol=bound)
    variance = np.square(np.asarray(g, np.float64))
    np.testing.assert_allclose(variance, truth.squared_diffusion(times), rtol=bound)


def test_the_cosine_ends_where_it_should(precision):
    close = {"rtol": 4e-7 if precision == "float32" else 1e-14}
    for low, high in ((-15.0, 15.0), (-5.0, 20.0), (-3.0, -1.0)):
        made = continuous.cosine(logsnr_min=low, logsnr_max=high)
        ends = made(np.array([0.0, 1.0])).logsnr
        np.testing.assert_allclose(ends, [high, low], **close)


@pytest.mark.parametrize("t", [1e-3, 0.4, 0.9, 1.0])
def test_the_field_of_the_flow_is_noise_less_data(t):
    """d x_t / dt = eps - x0 on the line between them (Liu et al. 2022), in float32 to
    1e-3 of its size even where log alpha is steep."""
    made = continuous.flow()
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 256, 2, 2, 1))
    level = made(t)
    x = gaussian.q_sample(jnp.asarray(x0, jnp.float32), jnp.asarray(eps), level)

    def denoise(x, t):
        return gaussian.Prediction(jnp.asarray(x0, x.dtype), jnp.asarray(eps, x.dtype))

    found = sde.flow(denoise, made)(x, t)
    assert found.dtype == np.float32
    expected = eps - (1 - LEFT) * x0
    error = np.abs(found - expected)
    assert np.sqrt(np.mean(error**2)) < 1e-3 * np.std(expected)
    assert error.max() < 3e-3 * np.std(expected)
    # Beside the paper's own line.
    np.testing.assert_allclose(level.alpha, 1 - t, atol=1.01e-4)
    np.testing.assert_allclose(level.sigma, t, rtol=1e-6)


def test_the_flow_moves_gaussian_data_along_their_quantiles(x64):
    data, made = gaussian_image(), continuous.flow()
    field = sde.flow(exact_denoiser(data, made), made)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 1)))
    h = 1e-5
    at = lambda t: (float(made(t).alpha), float(made(t).sigma))  # noqa: E731
    moved = [exact_flow(data, x, at(0.6), at(0.6 + d)) for d in (h, -h)]
    rate = (moved[0] - moved[1]) / (2 * h)
    np.testing.assert_allclose(field(x, 0.6), rate, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "nats"), [("linear", -2.7726), ("jsd", 1.5)])
def test_a_shift_moves_the_log_snr_of_every_step(name, nats, precision):
    made, t = SCHEDULES[name](50), np.arange(51)
    moved = continuous.shifted(made, nats)
    assert schedule.is_discrete(moved)
    assert schedule.num_steps(moved) == 50
    level = moved(t)
    truth = NumpyDDPM.named(name, 50)
    with np.errstate(divide="ignore"):
        odds = truth.noise / truth.alphas_bar * np.exp(-nats)
        expected = 1 / np.sqrt(1 + odds), 1 / np.sqrt(1 + 1 / odds)
    bound = {"float32": 3e-6, "float64": 1e-10}[precision]
    np.testing.assert_allclose(level.alpha, expected[0], rtol=bound, atol=1e-15)
    np.testing.assert_allclose(level.sigma, expected[1], rtol=bound)
    assert (level.alpha[0], level.sigma[0], level.logsnr[0]) == (1, 0, np.inf)
    np.testing.assert_array_equal(continuous.time_of(moved, level.logsnr[1:]), t[1:])
    # And it can be interpolated, as any that preserves variance.
    real = continuous.interpolate(moved)(t.astype(float))
    np.testing.assert_allclose(real.sigma, expected[1], rtol=20 * bound)
    back = continuous.shifted(moved, -nats)(t)
    np.testing.assert_allclose(back.sigma, truth.sigmas, rtol=10 * bound)


def test_shifts_of_shifts_and_of_interpolated_steps(x64):
    lin = schedule.linear(30)
    real = continuous.interpolate(lin)
    moved = continuous.shifted(continuous.shifted(real, -3.0), 1.0)
    t = np.array([0.5, 7.25, 30.0])
    np.testing.assert_allclose(moved(t).logsnr, real(t).logsnr - 2, rtol=1e-12)
    np.testing.assert_allclose(continuous.time_of(moved, moved(t).logsnr), t)
    passed = jax.jit(lambda made, t: made(t).logsnr)(moved, t)
    np.testing.assert_allclose(passed, moved(t).logsnr, rtol=1e-12)
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


@pytest.mark.parametrize("name", LEVELS)
def test_a_clean_chain_ends_in_data(name, precision):
    made = continuous.discretize(LEVELS[name].schedule, 20, clean=True)
    level, rest = made(0), continuous.discretize(LEVELS[name].schedule, 20)
    assert (level.alpha, level.sigma, level.logsnr) == (1, 0, np.inf)
    assert schedule.num_steps(made) == 20
    t = np.arange(1, 21)
    np.testing.assert_array_equal(made(t).logsnr, rest(t).logsnr)
    np.testing.assert_array_equal(made(t).log_alpha, rest(t).log_alpha)


@pytest.mark.parametrize("clean", [False, True])
def test_tables_of_traced_parameters(clean, precision):
    t, bound = np.arange(11), BOUND[precision]

    @jax.jit
    def traced(made):
        found = continuous.discretize(made, 10, clean=clean)
        assert schedule.num_steps(found) == 10
        assert schedule.tables(found)[0].dtype == precision
        return tuple(found(t))

    for made in (continuous.vp(), continuous.ve(), continuous.cosine()):
        known = continuous.discretize(made, 10, clean=clean)(t)
        np.testing.assert_allclose(traced(made), known, rtol=30 * bound, atol=bound)


def test_known_tables_are_double_inside_jit():
    @jax.jit
    def inside(t):
        made = continuous.discretize(continuous.vp(), 10)
        assert schedule.tables(made)[1].dtype == np.float64
        return made(t).alpha

    np.testing.assert_allclose(inside(3), continuous.vp()(0.3).alpha, rtol=1e-6)


def test_gradients_of_traced_tables(x64):
    """log alpha of vp is linear in its parameters: -t^2 / 4 and t^2 / 4 - t / 2."""

    def total(low, high):
        made = continuous.vp()
        made = Partial(made.func, low, high)
        table = schedule.tables(continuous.discretize(made, 10, clean=True))
        return table[0].sum()

    t = np.arange(11) / 10
    grads = jax.jit(jax.grad(total, (0, 1)))(0.1, 20.0)
    expected = np.sum(t**2 / 4 - t / 2), np.sum(-(t**2) / 4)
    np.testing.assert_allclose(grads, expected, rtol=1e-12)


@pytest.mark.parametrize("make", [samplers.ddpm, samplers.ddim])
def test_a_draw_under_jit_with_traced_parameters(make, x64):
    """What the schedule made outside draws; and the draw has a gradient in them."""

    def draw(made):
        chain = continuous.discretize(made, 5, clean=True)
        denoise = gaussian.denoiser(lambda x, t: jnp.tanh(x), chain, "x0", time_shift=0)
        grid = grids.uniform(chain)
        return samplers.sample(jax.random.key(0), make(denoise, chain), grid, (2, 3))

    made, h = continuous.vp(), 1e-5
    run = jax.jit(draw)
    np.testing.assert_allclose(run(made), draw(made), rtol=1e-9)

    def total(high):
        return run(Partial(made.func, 0.1, high)).sum()

    slope = jax.grad(total)(20.0)
    ends = [total(20.0 + d) for d in (h, -h)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-5)
