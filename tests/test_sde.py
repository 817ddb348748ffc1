"""Continuous time against the closed forms of Song et al. 2021 and Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from continuous_oracles import SDES, exact_denoiser, gaussian_image
from oracles import SCHEDULES, betas_of

from diffusion_jax import continuous, gaussian, schedule, sde

TIMES = np.array([1e-5, 1e-3, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
DATA = gaussian_image()
BOUND = {"float32": 2e-5, "float64": 1e-11}


@pytest.mark.parametrize("name", SDES)
def test_coefficients_are_those_of_the_paper(name, precision):
    truth = SDES[name]
    # The times themselves are rounded in float32.
    times = np.asarray(jnp.asarray(TIMES), np.float64)
    f, g = sde.coefficients(truth.schedule, times)
    bound = BOUND[precision]
    np.testing.assert_allclose(f, truth.drift(times), rtol=bound, atol=0)
    np.testing.assert_allclose(
        np.square(np.asarray(g, np.float64)),
        truth.squared_diffusion(times),
        rtol=10 * bound,
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_interpolated_schedule_has_the_betas_of_its_steps(name, precision):
    """log alpha falls by -log(1 - beta) / 2 in a step: f is that, anywhere in it."""
    made = continuous.interpolate(SCHEDULES[name](50))
    betas = betas_of("linear" if name == "from_betas" else name, 50)[1:-1]
    t = np.arange(1, 49) + 0.3
    f, g = sde.coefficients(made, t)
    # From the inside of the step whatever precision the times have.
    np.testing.assert_allclose(f, 0.5 * np.log1p(-betas), rtol=1e-6)
    np.testing.assert_allclose(np.square(g), -np.log1p(-betas), rtol=1e-4)
    alone = sde.coefficients(made, 7.3)
    np.testing.assert_allclose(alone.drift, f[6], rtol=1e-6)
    assert alone.drift.shape == ()


def test_forward_moments_obey_the_equation(x64):
    """d mean / dt = f mean and d var / dt = 2 f var + g^2, for every schedule."""
    h = 1e-6
    for name, made in {
        **{name: truth.schedule for name, truth in SDES.items()},
        "linear": continuous.interpolate(schedule.linear(20)),
    }.items():
        t = np.array([0.21, 0.56, 0.87]) * continuous.last_time(made)
        f, g = sde.coefficients(made, t)
        up, at, down = made(t + h), made(t), made(t - h)
        mean_rate = (up.alpha - down.alpha) / (2 * h)
        variance_rate = (up.sigma**2 - down.sigma**2) / (2 * h)
        np.testing.assert_allclose(mean_rate, f * at.alpha, rtol=1e-6, atol=1e-9)
        expected = 2 * f * at.sigma**2 + g**2
        np.testing.assert_allclose(variance_rate, expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", SDES)
def test_score_is_the_gradient_of_the_log_density(name, x64):
    truth, t = SDES[name], 0.4
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 2, 2, 1)))
    alpha, sigma = (float(f(np.float64(t))) for f in (truth.alpha, truth.sigma))
    cov = alpha**2 * DATA.cov + sigma**2 * np.eye(4)
    off = np.asarray(x).reshape(5, 4) - alpha * DATA.mean.ravel()
    expected = -np.linalg.solve(cov, off.T).T
    pred = exact_denoiser(DATA, truth.schedule)(x, jnp.asarray(t))
    found = sde.score(pred, truth.schedule(t)).reshape(5, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def _affine(field, t):
    """Slope [4, 4] and offset [4] of a field that is affine in x."""
    at = lambda x: np.asarray(field(jnp.asarray(x.reshape(-1, 2, 2, 1)), t))  # noqa: E731
    offset = at(np.zeros([1, 4])).reshape(4)
    slope = at(np.eye(4)).reshape(4, 4) - offset
    return slope.T, offset


@pytest.mark.parametrize("name", [*SDES, "linear"])
@pytest.mark.parametrize("t", [0.15, 0.5, 0.85])
def test_both_equations_move_the_exact_marginals(name, t, x64):
    """For x' = A x + b and noise g: m' = A m + b and C' = A C + C A' (+ g^2 I back in
    time, for the reverse equation). Fokker-Planck's, for Gaussian data."""
    if name == "linear":
        made = continuous.interpolate(schedule.linear(10))
        t = 10 * t + 0.2
    else:
        made = SDES[name].schedule
    denoise, h = exact_denoiser(DATA, made), 1e-6

    def marginal(time):
        level = made(time)
        mean = np.asarray(level.alpha * DATA.mean.ravel())
        return mean, np.asarray(level.alpha**2 * DATA.cov + level.sigma**2 * np.eye(4))

    mean, cov = marginal(t)
    rates = [
        (a - b) / (2 * h) for a, b in zip(marginal(t + h), marginal(t - h), strict=True)
    ]
    g = float(sde.coefficients(made, t).diffusion)
    for make, noise in ((sde.flow, 0.0), (sde.reverse_drift, g**2)):
        slope, offset = _affine(make(denoise, made), t)
        close = {"rtol": 1e-6, "atol": 1e-6 * (1 + g**2)}
        np.testing.assert_allclose(slope @ mean + offset, rates[0], **close)
        moved = slope @ cov + cov @ slope.T - noise * np.eye(4)
        np.testing.assert_allclose(moved, rates[1], **close)


def test_time_is_one_for_all_or_one_an_example(precision):
    made = continuous.vp()
    for make in (sde.flow, sde.reverse_drift):
        field = make(exact_denoiser(DATA, made), made)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 1)), float)
        t = jnp.array([0.1, 0.5, 0.9])
        each = np.stack([field(x[i : i + 1], t[i])[0] for i in range(3)])
        close = {"rtol": 1e-4, "atol": 1e-5} if precision == "float32" else {}
        np.testing.assert_allclose(field(x, t), each, **close)
        assert field(x, t).dtype == precision


@pytest.mark.parametrize(("name", "std"), [("vp", 1.0), ("sub_vp", 1.0), ("ve", 50.0)])
def test_prior_is_a_normal_density(name, std, precision):
    level = SDES[name].schedule(1.0)
    x = np.random.default_rng(0).normal(size=(3, 2, 2, 1)) * std
    expected = scipy.stats.norm.logpdf(x, 0, std).sum(axis=(1, 2, 3))
    found = sde.prior_logp(jnp.asarray(x, float), level)
    rtol = {"float32": 1e-5, "float64": 1e-10}[precision]
    np.testing.assert_allclose(found, expected, rtol=rtol)
    each = jax.tree.map(lambda leaf: jnp.full(3, leaf), level)
    np.testing.assert_allclose(sde.prior_logp(jnp.asarray(x, float), each), found)


def _network(x, t):
    return jnp.tanh(x) * jnp.cos(0.01 * t).reshape(-1, 1, 1, 1)


def test_a_network_of_steps_is_one_of_real_times():
    """At whole times it puts out the same eps to the bit."""
    lin = schedule.linear()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 2, 1)), jnp.float32)
    t = np.array([1, 10, 333, 999, 1000])
    whole = gaussian.denoiser(_network, lin, "eps")(x, t)
    real = gaussian.denoiser(_network, continuous.interpolate(lin), "eps")
    found = real(x, t.astype(float))
    np.testing.assert_array_equal(found.eps, whole.eps)
    np.testing.assert_allclose(found.x0, whole.x0, rtol=2e-5, atol=1e-5)
    between = real(x, t - 0.5).eps
    assert np.all(np.isfinite(between))
    assert np.abs(between - whole.eps).max() > 1e-4


def test_a_network_of_real_times_is_one_of_steps():
    vp, total = continuous.vp(), 40
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 1)), jnp.float32)
    t = np.array([1, 10, 20, 40])
    real = gaussian.denoiser(_network, vp, "v")(x, t / total)
    steps = gaussian.denoiser(
        lambda x, t: _network(x, t / total),
        continuous.discretize(vp, total),
        "v",
        time_shift=0,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        steps(x, t)[:2],
        real[:2],
    )


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda: sde.coefficients(schedule.linear(7), 3.0), "7 whole steps"),
        (lambda: sde.flow(None, schedule.linear(7)), "7 whole steps"),
        (lambda: sde.reverse_drift(None, schedule.linear(7)), "7 whole steps"),
        (lambda: sde.coefficients(continuous.vp(), 0.0), "0.0"),
        (lambda: sde.coefficients(continuous.vp(), np.array([0.5, 0])), "[0.5 0. ]"),
        (lambda: sde.coefficients(continuous.vp(), 1.5), "1.5"),
    ],
)
def test_bad_input_is_refused(call, got, refuses):
    with refuses(got):
        call()


def test_without_noise_the_diffusion_is_nan_under_jit():
    f, g = jax.jit(lambda t: sde.coefficients(continuous.vp(), t))(0.0)
    assert np.isnan(g)
    np.testing.assert_allclose(f, -0.05)
