"""What a network puts out, kind by kind, on every sort of schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracles import draw, said, wide

from diffusion_jax import continuous, gaussian, schedule
from diffusion_jax.schedule import NoiseLevel

TIMES = np.unique(np.geomspace(1, 1000, 40).astype(int))
N = len(TIMES)
X0, EPS = np.clip(draw(0, N, 2, 3), -1, 1), draw(1, N, 2, 3)


def levels(name):
    """Levels at N times and just before each."""
    if name in ("linear", "cosine"):
        made = getattr(schedule, name)()
        return made(TIMES), made(TIMES - 1)
    made = {"vp": continuous.vp, "ve": continuous.ve}[name]()
    return made(TIMES / 1000), made((TIMES - 0.5) / 1000)


def scales(level):
    """NumPy alpha and sigma, [N, 1, 1]."""
    return (wide(np.asarray(a, np.float64)) for a in (level.alpha, level.sigma))


@jax.jit
def _through(level, prev_level, x0, eps):
    x_t, out = gaussian.q_sample(x0, eps, level), {}
    for kind in gaussian.KINDS:
        output = gaussian.target(kind, x0, eps, level, prev_level)
        pred = gaussian.predict(kind, output, x_t, level, prev_level)
        again = {
            other: gaussian.target(other, pred.x0, pred.eps, level, prev_level)
            for other in gaussian.KINDS
        }
        out[kind] = output, again
    return out


def test_every_kind_reads_into_every_other(precision):
    """All pairs, to 1e-15 in float64 and 2e-7 in float32 of what rounding may do.

    `grown` is how much a rounding error of size 1 in output or x_t grows on the way
    into x0 and eps: a property of the kind.
    """
    bound = {"float32": 2e-7, "float64": 1e-15}[precision]
    size = 1 + np.abs(X0).max() + np.abs(EPS).max()
    for name in ("linear", "cosine", "vp", "ve"):
        level, prev_level = levels(name)
        got = _through(level, prev_level, jnp.asarray(X0), jnp.asarray(EPS))
        alpha, sigma = scales(level)
        alpha_s, _ = scales(prev_level)
        gap = wide(np.asarray(level.logsnr - prev_level.logsnr, np.float64))
        c0, ct = alpha_s * -np.expm1(gap), alpha_s / alpha * np.exp(gap)
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

        def allowed(other, x0, eps, alpha=alpha, sigma=sigma, c0=c0, ct=ct):
            scale = {
                "eps": eps,
                "score": eps / sigma,
                "x0": x0,
                "v": alpha * eps + sigma * x0,
                "mean": c0 * x0 + ct * (alpha * x0 + sigma * eps),
                "edm": eps + 2 * x0,
                "velocity": eps + x0,
            }
            return bound * size * scale[other]

        for kind, (output, again) in got.items():
            truth = said(kind, X0, EPS, alpha, sigma, c0, ct)
            error = np.abs(np.asarray(output, np.float64) - truth)
            assert np.all(error <= 2 * allowed(kind, 1.0, 1.0)), (name, kind)
            x0, eps = (1 + np.asarray(g) for g in grown[kind])
            for other, found in again.items():
                direct = np.asarray(got[other][0], np.float64)
                error = np.abs(np.asarray(found, np.float64) - direct)
                assert np.all(error <= allowed(other, x0, eps)), (name, kind, other)


def test_without_noise(x64):
    """At sigma = 0 x0 is there for all; eps where the output still says it."""
    level = schedule.linear()(0)
    x_t = gaussian.q_sample(X0, EPS, level)
    for kind in gaussian.KINDS:
        if kind == "mean":
            continue
        output = gaussian.target(kind, X0, EPS, level)
        assert np.all(np.isfinite(output)) == (kind != "score")
        if kind == "score":
            output = 0 * x_t + 0.5
        pred = gaussian.predict(kind, output, x_t, level)
        np.testing.assert_allclose(pred.x0, X0, rtol=1e-14, err_msg=kind)
        if kind == "x0":
            assert np.all(np.isnan(pred.eps))
        else:
            expected = 0 if kind == "score" else EPS
            np.testing.assert_allclose(pred.eps, expected, rtol=1e-14, err_msg=kind)


def karras(x, s, sigma_data):
    """Table 1 of Karras et al. 2022, in NumPy float64."""
    skip = sigma_data**2 / (s**2 + sigma_data**2)
    out = s * sigma_data / np.sqrt(sigma_data**2 + s**2)
    return skip * x, out


def test_edm_is_table_1(precision):
    """For s from 1e-4 to 1e4, where x is x_t / alpha whatever alpha is."""
    s = np.logspace(-4, 4, 33)
    bound = {"float32": 1e-5, "float64": 1e-12}[precision]
    x, output = draw(0, 33, 5) * (1 + s[:, None]), draw(1, 33, 5)

    @functools.partial(jax.jit, static_argnums=2)
    def both(x_t, level, sigma_data):
        options = {"sigma_data": sigma_data}
        pred = gaussian.predict("edm", jnp.asarray(output), x_t, level, **options)
        return pred, gaussian.target("edm", pred.x0, pred.eps, level, **options)

    cases = [(a, b) for a in (0.0, -3.0, -30.0) for b in (0.5, 1.0, 0.1)]
    for log_alpha, sigma_data in cases:
        level = NoiseLevel(jnp.full(33, log_alpha), -2 * jnp.log(s))
        pred, again = both(np.exp(log_alpha) * x, level, sigma_data)
        kept, out = karras(x, s[:, None], sigma_data)
        allowed = bound * (np.abs(kept) + out * np.abs(output))
        assert np.all(np.abs(pred.x0 - (kept + out * output)) <= allowed)
        # eps = (x - x0) / s cancels at small s in float32; in float64 it is a truth.
        eps = (x - kept - out * output) / s[:, None]
        allowed = bound * (1 + np.abs(x) + np.abs(output)) * 10
        if precision == "float64":
            allowed = allowed + 1e-15 * np.abs(x) / s[:, None]
        assert np.all(np.abs(pred.eps - eps) <= allowed)
        np.testing.assert_allclose(again, output, rtol=30 * bound, atol=100 * bound)
