"""What a network puts out, kind by kind, on every sort of schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import draw

from diffusion_jax import continuous, gaussian, schedule, sde
from diffusion_jax.schedule import NoiseLevel

TIMES = np.array([1, 2, 30, 400, 900, 999, 1000])
N = len(TIMES)
X0, EPS = np.clip(draw(0, N, 2, 3), -1, 1), draw(1, N, 2, 3)


def levels(name):
    """Levels at N times and just before each."""
    if name in ("linear", "cosine"):
        made = getattr(schedule, name)()
        return made(TIMES), made(TIMES - 1)
    made = {"vp": continuous.vp, "ve": continuous.ve}[name]()
    return made(TIMES / 1000), made((TIMES - 0.5) / 1000)


def wide(level):
    """NumPy alpha and sigma, [N, 1, 1]."""
    return (
        np.asarray(a, np.float64).reshape(-1, 1, 1) for a in (level.alpha, level.sigma)
    )


@jax.jit
def _through(level, prev_level, x0, eps):
    x_t = gaussian.q_sample(x0, eps, level)
    out = {}
    for kind in gaussian.KINDS:
        said = gaussian.target(kind, x0, eps, level, prev_level)
        pred = gaussian.predict(kind, said, x_t, level, prev_level)
        for other in gaussian.KINDS:
            direct = gaussian.target(other, x0, eps, level, prev_level)
            again = gaussian.target(other, pred.x0, pred.eps, level, prev_level)
            out[kind, other] = again, direct
    return out


@pytest.mark.parametrize("name", ["linear", "cosine", "vp", "ve"])
def test_round_trips(name, precision):
    """All pairs, to 1e-15 in float64 and 2e-7 in float32 of what rounding may do.

    `grown` is how much a rounding error of size 1 in output or x_t grows on the way
    into x0 and eps: a property of the kind.
    """
    level, prev_level = levels(name)
    got = _through(level, prev_level, jnp.asarray(X0), jnp.asarray(EPS))
    alpha, sigma = wide(level)
    alpha_s, _ = wide(prev_level)
    gap = np.asarray(level.logsnr - prev_level.logsnr, np.float64).reshape(-1, 1, 1)
    c0 = alpha_s * -np.expm1(gap)
    ct = alpha_s / alpha * np.exp(gap)
    both = alpha + sigma
    grown = {
        "eps": (both / alpha, 1),
        "score": (both / alpha, 1),
        "x0": (1, both / sigma),
        "v": (both, both),
        "mean": (both / c0, alpha * both / c0 / sigma),
        "edm": (4 * both, 4 * both),
        "velocity": (both, both),
    }
    bound = {"float32": 2e-7, "float64": 1e-15}[precision]
    size = 1 + np.abs(X0).max() + np.abs(EPS).max()
    for (kind, other), (again, direct) in got.items():
        x0, eps = (1 + np.asarray(g) for g in grown[kind])
        scale = {
            "eps": eps,
            "score": eps / sigma,
            "x0": x0,
            "v": alpha * eps + sigma * x0,
            "mean": c0 * x0 + ct * (alpha * x0 + sigma * eps),
            "edm": eps + 2 * x0,
            "velocity": eps + x0,
        }[other]
        error = np.abs(np.asarray(again, np.float64) - np.asarray(direct, np.float64))
        allowed = bound * size * np.broadcast_to(scale, error.shape)
        assert np.all(error <= allowed), (kind, other, (error / allowed).max())


@pytest.mark.parametrize("kind", [kind for kind in gaussian.KINDS if kind != "mean"])
def test_without_noise(kind, x64):
    """At sigma = 0 x0 is there for all; eps where the output still says it."""
    level = schedule.linear()(0)
    x_t = gaussian.q_sample(X0, EPS, level)
    said = gaussian.target(kind, X0, EPS, level)
    assert np.all(np.isfinite(said)) == (kind != "score")
    pred = gaussian.predict(kind, jnp.nan_to_num(said), x_t, level)
    if kind != "score":
        np.testing.assert_allclose(pred.x0, X0, rtol=1e-14)
    if kind == "x0":
        assert np.all(np.isnan(pred.eps))
    elif kind == "score":
        silent = gaussian.predict(kind, 0 * x_t + 0.5, x_t, level)
        np.testing.assert_allclose(silent.x0, X0, rtol=1e-14)
        assert np.all(silent.eps == 0)
    else:
        np.testing.assert_allclose(pred.eps, EPS, rtol=1e-14)


def karras(x, s, sigma_data):
    """Table 1 of Karras et al. 2022, in NumPy float64."""
    skip = sigma_data**2 / (s**2 + sigma_data**2)
    out = s * sigma_data / np.sqrt(sigma_data**2 + s**2)
    return skip * x, out


@pytest.mark.parametrize("log_alpha", [0.0, -3.0, -30.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.1])
def test_edm_is_table_1(log_alpha, sigma_data, precision):
    """For s from 1e-4 to 1e4, where x is x_t / alpha whatever alpha is."""
    s = np.logspace(-4, 4, 33)
    level = NoiseLevel(jnp.full(33, log_alpha), -2 * jnp.log(s))
    x, output = draw(0, 33, 5) * (1 + s[:, None]), draw(1, 33, 5)
    x_t = np.exp(log_alpha) * x
    pred = gaussian.predict(
        "edm", jnp.asarray(output), jnp.asarray(x_t), level, sigma_data=sigma_data
    )
    kept, out = karras(x, s[:, None], sigma_data)
    bound = {"float32": 1e-5, "float64": 1e-12}[precision]
    allowed = bound * (np.abs(kept) + out * np.abs(output))
    assert np.all(np.abs(pred.x0 - (kept + out * output)) <= allowed)
    # eps = (x - x0) / s cancels at small s in float32; in float64 it is a truth.
    eps = (x - kept - out * output) / s[:, None]
    allowed = bound * (1 + np.abs(x) + np.abs(output)) * 10
    if precision == "float64":
        allowed = allowed + 1e-15 * np.abs(x) / s[:, None]
    assert np.all(np.abs(pred.eps - eps) <= allowed)
    again = gaussian.target("edm", pred.x0, pred.eps, level, sigma_data=sigma_data)
    np.testing.assert_allclose(again, output, rtol=30 * bound, atol=100 * bound)


@pytest.mark.parametrize("name", ["linear", "vp", "ve"])
def test_edm_targets_have_unit_variance(name, x64):
    """For data of standard deviation sigma_data: a line in x0 and eps, exactly."""
    level, _ = levels(name)
    one, none = jnp.ones([N, 1]), jnp.zeros([N, 1])
    of_x0 = gaussian.target("edm", 0.3 * one, none, level, sigma_data=0.3)
    of_eps = gaussian.target("edm", none, one, level, sigma_data=0.3)
    np.testing.assert_allclose(of_x0**2 + of_eps**2, 1, rtol=1e-14)
    # And the input of the network too.
    seen = []

    def network(x, t):
        seen.append(x)
        return x

    made = {"linear": schedule.linear, "vp": continuous.vp, "ve": continuous.ve}[name]()
    t = TIMES if name == "linear" else TIMES / 1000
    denoise = gaussian.denoiser(network, made, "edm", sigma_data=0.3)
    for x0, eps in ((0.3 * one, none), (none, one)):
        denoise(gaussian.q_sample(x0, eps, level), t)
    np.testing.assert_allclose(seen[0] ** 2 + seen[1] ** 2, 1, rtol=1e-14)


def test_edm_is_v_turned_round_for_unit_data(x64):
    """Where alpha^2 + sigma^2 = 1 and sigma_data = 1, F is -v (Salimans and Ho)."""
    level, _ = levels("linear")
    v = gaussian.target("v", X0, EPS, level)
    edm = gaussian.target("edm", X0, EPS, level, sigma_data=1.0)
    np.testing.assert_allclose(edm, -v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "vp", "ve"])
def test_score_is_that_of_sde(name, x64):
    level, _ = levels(name)
    score = gaussian.target("score", X0, EPS, level)
    given = sde.score(gaussian.Prediction(X0, jnp.asarray(EPS)), level)
    np.testing.assert_allclose(score, given, rtol=1e-14)
    x_t = gaussian.q_sample(X0, EPS, level)

    def logp(x):
        """Of q(x_t | x0), whose gradient is the score where x0 is known."""
        off = x - level.like(x).alpha * X0
        return -0.5 * (off**2 / level.like(x).sigma ** 2).sum()

    np.testing.assert_allclose(score, jax.grad(logp)(x_t), rtol=1e-9, atol=1e-9)


def test_velocity_is_that_of_the_straight_path(x64):
    """d x_t / dt where alpha = 1 - t and sigma = t."""

    def straight(t):
        return NoiseLevel(jnp.log1p(-t), 2 * (jnp.log1p(-t) - jnp.log(t)))

    t = jnp.linspace(0.05, 0.95, N)
    _, slope = jax.jvp(
        lambda t: gaussian.q_sample(X0, EPS, straight(t)), (t,), (jnp.ones(N),)
    )
    velocity = gaussian.target("velocity", X0, EPS, straight(t))
    np.testing.assert_allclose(velocity, slope, rtol=1e-12, atol=1e-12)
    # One step of Euler's method along it is exact.
    x_t, level = gaussian.q_sample(X0, EPS, straight(t)), straight(t)
    pred = gaussian.predict("velocity", velocity, x_t, level)
    expected = x_t - t[:, None, None] * velocity
    np.testing.assert_allclose(pred.x0, expected, rtol=1e-12, atol=1e-12)
