"""Each weighting against its paper's own loss, and the slope against the integral."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from continuous_oracles import SDES
from oracles import SCHEDULES, T, draw, oracle

from diffusion_jax import continuous, gaussian, schedule, weightings

LOGSNR = np.linspace(-15, 15, 121)
SNR = np.exp(LOGSNR)
SIGMA = SNR**-0.5  # the noise on data of scale 1
RTOL = {"float32": 1e-6, "float64": 1e-12}


def from_x0(weight):
    """The weight on the squared error of eps of one on the squared error of x0."""
    return weight / SNR


PAPERS = {
    "simple": (weightings.simple(), np.ones_like(SNR)),
    "min_snr": (weightings.min_snr(), from_x0(np.minimum(SNR, 5.0))),
    "min_snr-1": (weightings.min_snr(gamma=1.0), from_x0(np.minimum(SNR, 1.0))),
    "p2": (weightings.p2(), 1 / (1 + SNR)),
    "p2-half": (weightings.p2(gamma=0.5, k=0.3), 1 / np.sqrt(0.3 + SNR)),
    # On the error of x0, as SiD2 writes it.
    "sigmoid": (
        weightings.sigmoid(bias=-3.0),
        from_x0(np.exp(-3.0) / (1 + np.exp(-(LOGSNR + 3.0)))),
    ),
    "edm": (
        weightings.edm(),
        from_x0((SIGMA**2 + 0.5**2) / (SIGMA * 0.5) ** 2),
    ),
    "edm-1": (weightings.edm(sigma_data=1.0), from_x0((SIGMA**2 + 1) / SIGMA**2)),
    "x0": (weightings.x0(), from_x0(np.ones_like(SNR))),
    # SNR + 1 on the error of x0.
    "v": (weightings.v(), from_x0(SNR + 1)),
    # x_t = (1 - t) x0 + t eps, and u = eps - x0 = (x_t - x0) / t.
    "velocity": (weightings.velocity(), from_x0((1 + SIGMA) ** 2 / SIGMA**2)),
}
papers = pytest.mark.parametrize("name", PAPERS)


@papers
def test_weighting_is_the_papers(name, precision):
    weight, expected = PAPERS[name]
    logsnr = jnp.asarray(LOGSNR, precision)
    # What float32 makes of the log-SNR itself is up to 15 ulp of its exponential.
    np.testing.assert_allclose(weight(logsnr), expected, rtol=RTOL[precision])


@papers
def test_weighting_is_finite_and_positive_far_out(name):
    weight = PAPERS[name][0]
    logsnr = jnp.linspace(-40, 40, 1601, dtype=jnp.float32)
    got = np.asarray(jax.jit(weight)(logsnr))
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert (got >= np.finfo(np.float32).tiny).all()
    assert (np.diff(got) <= 0).all()  # less noise never counts more
    assert np.isfinite(jax.vmap(jax.grad(weight))(logsnr)).all()
    # Data without noise have a weight too, which is finite.
    assert 0 <= float(weight(jnp.float32(jnp.inf))) <= 1


@pytest.mark.parametrize(
    ("name", "power", "factor"),
    [
        ("min_snr", -1, 5.0),
        ("p2", -1, 1.0),
        ("p2-half", -0.5, 1.0),
        ("sigmoid", -1, np.exp(-3.0)),
        ("edm", 0, 1.0),
        ("v", 0, 1.0),
        ("velocity", 0, 1.0),
    ],
)
def test_where_there_is_little_noise(name, power, factor, x64):
    logsnr = jnp.array([30.0, 40.0])
    expected = factor * np.exp(power * logsnr)
    np.testing.assert_allclose(PAPERS[name][0](logsnr), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "power", "factor"),
    [
        ("min_snr", 0, 1.0),
        ("p2", 0, 1.0),
        ("p2-half", 0, 0.3**-0.5),
        ("sigmoid", 0, 1.0),
        ("edm", -1, 4.0),
        ("v", -1, 1.0),
        ("velocity", -1, 1.0),
    ],
)
def test_where_there_is_little_signal(name, power, factor, x64):
    logsnr = jnp.array([-30.0, -40.0])
    expected = factor * np.exp(power * logsnr)
    np.testing.assert_allclose(PAPERS[name][0](logsnr), expected, rtol=1e-6)


def levels(kind):
    """Variance preserving, variance exploding, and a straight line to the noise."""
    logsnr = np.linspace(-12, 12, 25)
    noise = np.exp(-0.5 * logsnr)
    log_alpha = {
        "vp": -0.5 * np.log1p(noise**2),
        "ve": np.zeros_like(logsnr),
        "flow": -np.log1p(noise),
    }[kind]
    return schedule.NoiseLevel(jnp.asarray(log_alpha), jnp.asarray(logsnr))


def squares(a):
    return np.square(np.asarray(a)).sum(axis=(1, 2))


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
def test_errors_of_real_predictions(kind, x64):
    """The network is off in eps: what is it off by in the other coordinates?"""
    level, (x0, eps, off) = levels(kind), draw(0, 3, 25, 2, 2)
    x_t = gaussian.q_sample(x0, eps, level)
    pred = gaussian.predict("eps", eps + off, x_t, level)

    def weight(made):
        return made(level.logsnr) * squares(off)

    rtol = 1e-6  # the errors are differences: 1e-16 e^12 of the terms is lost
    x0_error = squares(pred.x0 - x0)
    np.testing.assert_allclose(x0_error, weight(weightings.x0()), rtol=rtol)
    velocity = (pred.eps - pred.x0) - (eps - x0)
    np.testing.assert_allclose(
        squares(velocity), weight(weightings.velocity()), rtol=rtol
    )
    v_error = squares(
        gaussian.target("v", pred.x0, pred.eps, level)
        - gaussian.target("v", x0, eps, level)
    )
    v_weight = weight(weightings.v())
    if kind != "vp":
        v_weight = v_weight**2 / squares(off) * np.asarray(level.alpha) ** 2
    np.testing.assert_allclose(v_error, v_weight, rtol=rtol)


def test_edm_is_the_plain_error_of_its_network(x64):
    """F in D = c_skip y + c_out F (Eq. 7, Karras et al.): the weight is 1 / c_out^2."""
    level, sd = levels("ve"), 0.5
    sigma = np.asarray(level.sigma)[:, None, None]
    c_out = sigma * sd / np.sqrt(sigma**2 + sd**2)
    x0, eps, off = draw(1, 3, 25, 2, 2)
    y = gaussian.q_sample(x0, eps, level)
    denoised = gaussian.predict("eps", eps + off, y, level).x0
    plain = squares((denoised - x0) / c_out)
    weight = weightings.edm(sigma_data=sd)(level.logsnr)
    np.testing.assert_allclose(weight * squares(off), plain, rtol=1e-6)


@pytest.mark.parametrize("name", SDES)
def test_slope_of_continuous_time(name, x64):
    """-dlogsnr/dt = g^2 / sigma^2."""
    sde, t = SDES[name], np.linspace(0.02, 1, 50)
    expected = sde.squared_diffusion(t) / sde.sigma(t) ** 2
    got = weightings.slope(sde.schedule, t)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "jsd"])
def test_slope_of_a_chain_sums_to_its_log_snr(name, precision):
    truth, made = oracle(name), SCHEDULES[name]()
    got = np.asarray(weightings.slope(made, jnp.arange(1, T + 1)), np.float64)
    logsnr = np.log(truth.alphas_bar[1:] / truth.noise[1:])
    rtol = {"float32": 1e-6, "float64": 1e-9}[precision]
    np.testing.assert_allclose(got[1:] / T, -np.diff(logsnr), rtol=rtol)
    assert got[0] == got[1]  # the first is the decoder's, and infinite
    # A schedule that is traced is a table of float32, or of float64.
    traced = jax.jit(weightings.slope)(made, jnp.arange(1, T + 1))
    rtol = {"float32": 2e-2, "float64": 1e-9}[precision]
    np.testing.assert_allclose(traced, got, rtol=rtol)


def test_slope_of_an_interpolated_chain(x64):
    """beta is constant within a step: -dlogsnr/dt = -log(1 - beta_t) / sigma^2."""
    truth, made = oracle("linear"), continuous.interpolate(schedule.linear())
    t = np.array([1, 2, 10, 500, 1000])
    got = weightings.slope(made, t - 1e-6)
    expected = -np.log1p(-truth.betas[t]) / truth.noise[t]
    np.testing.assert_allclose(got / T, expected, rtol=1e-5)
    middle = weightings.slope(made, t - 0.5)
    np.testing.assert_allclose(
        middle[2:], weightings.slope(schedule.linear(), t[2:]), rtol=1e-2
    )


def test_slope_where_data_are_noisy(x64):
    """A discretized VE has noise at t = 0: no step is infinite."""
    sigmas = {"sigma_min": 0.01, "sigma_max": 1.0}
    made = continuous.discretize(continuous.ve(**sigmas), 7)
    got = weightings.slope(made, jnp.arange(1, 8))
    np.testing.assert_allclose(got, 2 * np.log(100), rtol=1e-9)


def test_the_bound_is_one_per_log_snr(x64):
    """E[1/2 slope |eps error|^2] over t is the KL of the chain's steps (Eq. 5).

    As T grows: the KL has e^gap - 1 in the place of the gap. The data are normal with
    standard deviation s, and the network the best one, so that its squared error of
    eps is alpha^2 s^2 / (alpha^2 s^2 + sigma^2).
    """
    num_steps, s = 20_000, 0.6
    made = continuous.discretize(continuous.vp(), num_steps)
    t = jnp.arange(2, num_steps + 1)
    level, before = made(t), made(t - 1)
    signal = level.alpha**2 * s**2
    error = signal / (signal + level.sigma**2)
    weight = weightings.simple()(level.logsnr) * 0.5 * weightings.slope(made, t)
    # KL between normals of equal variance, c0 |x0 error|^2 apart.
    x0_error = error * np.exp(-level.logsnr)
    c0 = before.alpha * -np.expm1(level.logsnr - before.logsnr)
    variance = gaussian.reverse_variance("small", level, before)
    kl = 0.5 * c0**2 * x0_error / variance
    late = np.asarray(level.logsnr) < 4  # where the steps are small
    got = float((weight * error)[late].sum() / num_steps)
    assert abs(got / float(kl[late].sum()) - 1) < 2e-3
    # And the integral in closed form: 1/2 integral of s^2 / (s^2 + e^-l) dl.
    ends = np.asarray(level.logsnr)[late][[0, -1]]
    whole = 0.5 * (np.logaddexp(2 * np.log(s) + ends, 0) @ [1, -1])
    assert abs(got / whole - 1) < 2e-3


def test_per_log_snr_does_not_depend_on_the_schedule(x64):
    """The same integral between the same ends, whatever the time between them."""
    weight, totals = weightings.sigmoid(bias=-1.0), []
    t = (np.arange(20_000) + 0.5) / 20_000
    for made in (continuous.vp(), continuous.ve(sigma_min=1e-3, sigma_max=1e3)):
        logsnr = made(t).logsnr
        inside = (logsnr > -8) & (logsnr < 8)
        terms = weight(logsnr) * 0.5 * weightings.slope(made, t)
        totals.append(float(jnp.where(inside, terms, 0).mean()))
    expected = 0.5 * (np.logaddexp(0, -1 + 8) - np.logaddexp(0, -1 - 8))
    np.testing.assert_allclose(totals, expected, rtol=2e-3)


def test_what_is_refused(refuses):
    with refuses("0"):
        weightings.min_snr(gamma=0)
    with refuses("-1"):
        weightings.p2(gamma=-1)
    with refuses("0"):
        weightings.p2(k=0)
    with refuses("-0.5"):
        weightings.edm(sigma_data=-0.5)
    with refuses("0"):
        weightings.slope(continuous.vp(), jnp.array([0.0, 0.5]))
    with refuses("0"):
        weightings.slope(schedule.linear(10), jnp.array([0, 5]))
    with refuses("11"):
        weightings.slope(schedule.linear(10), 11)
    with refuses("1"):
        weightings.slope(schedule.linear(1), 1)
    traced = jax.jit(lambda t: weightings.slope(schedule.linear(10), t))
    assert np.isnan(traced(jnp.array([-1, 0, 11]))).all()
