"""What a network puts out, kind by kind, on every sort of schedule."""

import jax
import jax.numpy as jnp
import numpy as np
from oracles import draw, said, wide

from diffusion_jax import continuous, gaussian, schedule

TIMES = np.unique(np.geomspace(1, 1000, 40).astype(int))
N = len(TIMES)
X0, EPS = np.clip(draw(0, N, 2, 3), -1, 1), draw(1, N, 2, 3)


def levels(name):
    """Levels at N times and just before each."""
    if name in ("linear", "cosine"):
        made = getattr(schedule, name)()
        return made(TIMES), made(TIMES - 1)
    made = getattr(continuous, name)()
    return made(TIMES / 1000), made((TIMES - 0.5) / 1000)


def scales(level):
    """NumPy alpha and sigma, [N, 1, 1]."""
    return (wide(np.asarray(a, np.float64)) for a in (level.alpha, level.sigma))


@jax.jit
def _through(level, prev_level, x0, eps):
    x_t, pair = gaussian.q_sample(x0, eps, level), (level, prev_level)

    def targets(x0, eps):
        return {kind: gaussian.target(kind, x0, eps, *pair) for kind in gaussian.KINDS}

    said = targets(x0, eps)
    seen = {k: gaussian.predict(k, out, x_t, *pair)[:2] for k, out in said.items()}
    return {kind: (said[kind], targets(*ends)) for kind, ends in seen.items()}


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
            error = np.abs(np.float64(output) - truth)
            assert np.all(error <= 2 * allowed(kind, 1.0, 1.0)), (name, kind)
            x0, eps = (1 + np.asarray(g) for g in grown[kind])
            for other, found in again.items():
                error = np.abs(np.float64(found) - np.float64(got[other][0]))
                assert np.all(error <= allowed(other, x0, eps)), (name, kind, other)


def test_without_noise(x64):
    """At sigma = 0 x0 is there for all; eps where the output still says it."""
    level = schedule.linear()(0)
    x_t = gaussian.q_sample(X0, EPS, level)
    unsaid = {"x0": np.full_like(EPS, np.nan), "score": np.zeros_like(EPS)}
    for kind in set(gaussian.KINDS) - {"mean"}:
        output = gaussian.target(kind, X0, EPS, level)
        if kind == "score":
            assert not np.any(np.isfinite(output))
            output = 0 * x_t + 0.5
        pred = gaussian.predict(kind, output, x_t, level)
        close = {"rtol": 1e-14, "err_msg": kind}
        np.testing.assert_allclose(pred.x0, X0, **close)
        np.testing.assert_allclose(pred.eps, unsaid.get(kind, EPS), **close)


def test_edm_is_table_1_whatever_the_data(x64):
    """Of Karras et al. 2022, with another deviation of the data than 0.5."""
    for name, sigma_data in (("ve", 1.0), ("vp", 0.1)):
        level, _ = levels(name)
        alpha, sigma = scales(level)
        s, options = sigma / alpha, {"sigma_data": sigma_data}
        total = np.sqrt(s**2 + sigma_data**2)
        x0 = (sigma_data / total) ** 2 * X0 + s * sigma_data / total * EPS
        pred = gaussian.predict("edm", EPS, alpha * X0, level, **options)
        np.testing.assert_allclose(pred.x0, x0, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(pred.eps, (X0 - x0) / s, rtol=1e-9, atol=1e-9)
        again = gaussian.target("edm", pred.x0, pred.eps, level, **options)
        np.testing.assert_allclose(again, EPS, rtol=1e-8, atol=1e-9)
