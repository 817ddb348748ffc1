"""The Gaussian algebra against DDPM in its authors' terms, at every step of T = 1000.

A sum of terms that cancel is held to a relative error of its terms, not of itself: no
arithmetic could do better with the same inputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracles import SCHEDULES, T, betas_of, draw, oracle, wide

from diffusion_jax import gaussian

TIMES = np.arange(1, T + 1)
BOUND = {"float32": 1e-6, "float64": 1e-10}
# 1 - e^D comes from the difference of two log-SNRs, rounded to 24 bits each.
VARIANCE_BOUND = {"float32": 1e-4, "float64": 1e-10}
# e^D has the absolute error of that difference: a few units in the last place of the
# log-SNR, 1e-6 where it stays above -16. These two end at -20.
STEP_BOUND = {"const": 2e-6, "warmup10": 2e-6, "warmup50": 1.5e-6}

X0, EPS = np.clip(draw(0, T, 2, 3), -1, 1), draw(1, T, 2, 3)


def within(actual, expected, bound, scale, what):
    """Every error is at most bound times the size of what was computed."""
    error = np.abs(np.asarray(actual, np.float64) - expected)
    allowed = bound * np.broadcast_to(scale, error.shape)
    np.testing.assert_array_less(error, allowed, err_msg=what)


@jax.jit
def _equations(made, x0, eps, keys):
    t = jnp.arange(1, T + 1)
    level, *_ = pair = made(t), made(t - 1)
    fields = (jnp.full_like(x0, value) for value in (-3.0, 0.3, 0.2))
    pred = gaussian.Prediction(x0, x0, *fields)
    given = jnp.linspace(0.1, 1.0, T).reshape(-1, 1, 1)
    drawn = [
        gaussian.p_sample(keys, pred, eps, *pair, variance=variance)
        for variance in (0.0, 1.0, *gaussian.VARIANCES, given)
    ]
    return {
        "x_t": gaussian.q_sample(x0, eps, level),
        "posterior": gaussian.q_posterior(x0, eps, *pair),
        "drawn": drawn,
    }


@functools.cache
def computed(name, precision):
    """What the equations give for a schedule, in a precision that is set."""
    keys = jax.random.split(jax.random.key(0), T)
    got = _equations(SCHEDULES[name](), X0, EPS, keys)
    assert got["x_t"].dtype == precision
    return got


def test_a_noising_and_a_reverse_step_of_every_schedule(precision):
    """Eqs. 4 and 7, of EPS as x_t: any will do; and noise of the variance asked for."""
    single, bound = precision == "float32", BOUND[precision]
    for name in SCHEDULES:
        truth, got = oracle(name), computed(name, precision)
        terms = wide(truth.alphas[1:]) * abs(X0) + wide(truth.sigmas[1:]) * abs(EPS)
        within(got["x_t"], truth.q_sample(X0, EPS, TIMES), bound, terms, name)
        c0, ct = truth.coefficients(TIMES)
        expected, (mean, variance) = (
            truth.posterior_mean(X0, EPS, TIMES),
            got["posterior"],
        )
        # c0 carries the error of 1 - e^D: 1e-4 of a number as small as beta.
        close = STEP_BOUND.get(name, bound) if single else bound
        extra = VARIANCE_BOUND[precision] / close if single else 0
        terms = wide(c0) * abs(X0) * (1 + extra) + wide(ct) * abs(EPS)
        within(mean, expected, close, terms, name)
        # At t = 1 the posterior is x0 itself: ct is 0.
        np.testing.assert_array_equal(mean[0], X0[0].astype(precision))
        small, large = (truth.variance(kind, TIMES) for kind in ("small", "large"))
        close = {"rtol": VARIANCE_BOUND[precision]}
        np.testing.assert_allclose(variance, wide(small), **close)
        # Without noise, with unit noise, and with each variance.
        mean, unit, *noisy = map(np.asarray, got["drawn"])
        terms = wide(c0 * (101 if single else 1)) * abs(X0) + wide(ct) * abs(EPS)
        within(mean, expected, bound * (2 if single else 1), terms, name)
        z = np.asarray(unit - mean, np.float64)
        assert 0.9 < z[1:].std() < 1.1
        variances = {
            "small": small,
            "large": large,
            "learned": np.full(T, np.exp(-3)),
            "range": large**0.3 * small**0.7,
            "analytic": small + 0.2 * c0**2,
            "given": np.linspace(0.1, 1, T),
        }
        for x_s, variance in zip(noisy, variances.values(), strict=True):
            scale = wide(np.sqrt(variance))
            # Half of the variance's bound, beside the rounding of the sum itself.
            terms = scale * abs(z) + 1e-2 * (1 + abs(EPS))
            within(x_s - mean, scale * z, VARIANCE_BOUND[precision], terms, name)
            assert np.all(np.any(x_s[1:] != mean[1:], axis=(1, 2)))
            # The step to data adds none.
            np.testing.assert_array_equal(x_s[0], mean[0])


def test_equation_2_of_the_paper_a_step_of_the_forward_process(x64):
    """sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, at every step of a schedule."""
    keys = jax.random.split(jax.random.key(5), T)
    z = np.asarray(gaussian.normal(keys, X0.shape))
    for name in ("linear", "cosine", "jsd"):
        made, beta = SCHEDULES[name](), wide(betas_of(name))
        got = gaussian.q_step(keys, jnp.asarray(X0), made(TIMES - 1), made(TIMES))
        expected = np.sqrt(1 - beta) * X0 + np.sqrt(beta) * z
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9)


def test_pure_noise_says_nothing_of_x0(precision):
    """For the predictions that do not name it; the others are finite there."""
    made, x = SCHEDULES["jsd"](), jnp.asarray(EPS[:1])
    for kind in gaussian.KINDS:
        x0 = gaussian.predict(kind, 0.5 * x, x, made(T), made(T - 1)).x0
        unsaid = kind in ("eps", "score")
        assert np.all(np.isnan(x0) if unsaid else np.isfinite(x0)), kind


def test_noise_of_an_example_is_that_of_its_key(x64):
    """In both styles of keys, and of the type that is asked for."""
    for seed in (jax.random.key, jax.random.PRNGKey):
        one, many = seed(0), jax.random.split(seed(0), 5)
        assert gaussian.normal(one, (5, 2)).shape == (5, 2)
        whole = gaussian.normal(many, (5, 2))
        np.testing.assert_array_equal(whole[3:], gaussian.normal(many[3:], (2, 2)))
        assert len(np.unique(whole)) == 10
    assert whole.dtype == jnp.float64
    assert gaussian.normal(one, (2,), jnp.float32).dtype == jnp.float32
