"""Each weighting against its paper's own, and the slope against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
from continuous_oracles import SDES
from oracles import SCHEDULES, T, oracle

from diffusion_jax import continuous, schedule, weightings

LOGSNR = np.linspace(-40, 40, 321)
SNR = np.exp(LOGSNR)
SIGMA = SNR**-0.5  # the noise on data of scale 1


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
        from_x0(np.exp(-3.0) / (1 + np.exp(-LOGSNR - 3.0))),
    ),
    "edm": (weightings.edm(), from_x0((SIGMA**2 + 0.5**2) / (SIGMA * 0.5) ** 2)),
    "edm-1": (weightings.edm(sigma_data=1.0), from_x0((SIGMA**2 + 1) / SIGMA**2)),
    "x0": (weightings.x0(), from_x0(np.ones_like(SNR))),
    # SNR + 1 on the error of x0.
    "v": (weightings.v(), from_x0(SNR + 1)),
    # x_t = (1 - t) x0 + t eps, and u = eps - x0 = (x_t - x0) / t.
    "velocity": (weightings.velocity(), from_x0((1 + SIGMA) ** 2 / SIGMA**2)),
}


def test_weighting_is_the_papers(precision):
    # What float32 makes of the log-SNR itself is up to 15 ulp of its exponential.
    within = np.abs(LOGSNR) <= (15 if precision == "float32" else 40)
    rtol = {"float32": 1e-6, "float64": 1e-12}[precision]
    logsnr = jnp.asarray(LOGSNR, precision)
    for name, (weight, expected) in PAPERS.items():
        got = np.asarray(weight(logsnr))[within]
        np.testing.assert_allclose(got, expected[within], rtol=rtol, err_msg=name)


def test_weighting_is_finite_and_positive_far_out():
    logsnr = jnp.linspace(-40, 40, 1601, dtype=jnp.float32)

    @jax.jit
    def all_of(logsnr, end):
        return {
            name: (weight(logsnr), jax.vmap(jax.grad(weight))(logsnr), weight(end))
            for name, (weight, _) in PAPERS.items()
        }

    for name, (got, slope, end) in all_of(logsnr, jnp.float32(jnp.inf)).items():
        assert got.dtype == np.float32
        assert (got >= np.finfo(np.float32).tiny).all(), name
        assert (np.diff(got) <= 0).all(), name  # less noise never counts more
        assert np.isfinite([got, slope]).all(), name
        # Data without noise have a weight too, which is finite.
        assert 0 <= float(end) <= 1, name


def test_slope_of_a_chain_sums_to_its_log_snr(precision):
    t, traced = jnp.arange(1, T + 1), jax.jit(weightings.slope)
    close = {"float32": 1e-6, "float64": 1e-9}[precision]
    # A schedule that is traced is a table of float32, or of float64.
    loose = {"float32": 2e-2, "float64": 1e-9}[precision]
    for name in SCHEDULES:
        if name == "jsd":
            continue
        truth, made = oracle(name), SCHEDULES[name]()
        got = np.asarray(weightings.slope(made, t), np.float64)
        fall = -np.diff(np.log(truth.alphas_bar[1:] / truth.noise[1:]))
        np.testing.assert_allclose(got[1:] / T, fall, rtol=close, err_msg=name)
        assert got[0] == got[1]  # the first is the decoder's, and infinite
        np.testing.assert_allclose(traced(made, t), got, rtol=loose, err_msg=name)
    # A discretized VE has noise at t = 0: no step is infinite.
    made = continuous.discretize(continuous.ve(sigma_min=0.01, sigma_max=1.0), 7)
    got = weightings.slope(made, jnp.arange(1, 8))
    np.testing.assert_allclose(got, 2 * np.log(100), rtol=close)


def test_slope_of_continuous_time(x64):
    """-dlogsnr/dt = g^2 / sigma^2, and of steps, in which beta is constant,
    -log(1 - beta_t) / sigma^2."""
    t = np.linspace(0.02, 1, 50)
    for name, sde in SDES.items():
        expected = sde.squared_diffusion(t) / sde.sigma(t) ** 2
        got = weightings.slope(sde.schedule, t)
        np.testing.assert_allclose(got, expected, rtol=1e-9, err_msg=name)
    truth, t = oracle("linear"), np.array([1, 2, 10, 500, 1000])
    got = weightings.slope(continuous.interpolate(schedule.linear()), t - 1e-6)
    expected = -np.log1p(-truth.betas[t]) / truth.noise[t]
    np.testing.assert_allclose(got / T, expected, rtol=1e-5)
