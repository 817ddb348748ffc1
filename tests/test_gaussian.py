"""The Gaussian algebra against DDPM in its authors' terms, at every step of T = 1000.

A sum of terms that cancel is held to a relative error of its terms, not of itself: no
arithmetic could do better with the same inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SCHEDULES, T, draw, oracle, output_of, wide

from diffusion_jax import gaussian, schedule

TIMES = np.arange(1, T + 1)
PAIRS = [(a, b) for a in gaussian.KINDS for b in gaussian.KINDS]
BOUND = {"float32": 1e-6, "float64": 1e-10}
# 1 - e^D comes from the difference of two log-SNRs, rounded to 24 bits each.
VARIANCE_BOUND = {"float32": 1e-4, "float64": 1e-10}
# e^D has the absolute error of that difference: a few units in the last place of the
# log-SNR, 1e-6 where it stays above -16. These two end at -20.
STEP_BOUND = {"const": 2e-6, "warmup10": 2e-6, "warmup50": 1.5e-6}

named = pytest.mark.parametrize("name", SCHEDULES)

X0, EPS = np.clip(draw(0, T, 2, 3), -1, 1), draw(1, T, 2, 3)


def steps(made):
    t = jnp.arange(1, T + 1)
    return made(t), made(t - 1)


def within(actual, expected, bound, scale=1.0):
    """Every error is at most bound times the size of what was computed."""
    error = np.abs(np.asarray(actual, np.float64) - expected)
    np.testing.assert_array_less(error, bound * np.broadcast_to(scale, error.shape))


@named
def test_equation_1_q_sample(name, precision):
    truth = oracle(name)
    x_t = gaussian.q_sample(X0, EPS, SCHEDULES[name]()(TIMES))
    terms = wide(truth.alphas[1:]) * abs(X0) + wide(truth.sigmas[1:]) * abs(EPS)
    within(x_t, truth.q_sample(X0, EPS, TIMES), BOUND[precision], terms)


@jax.jit
def _posterior(made, x0, x_t):
    return gaussian.q_posterior(x0, x_t, *steps(made))


@named
def test_equation_2_q_posterior(name, precision):
    truth = oracle(name)
    x_t = EPS  # any x_t will do
    mean, variance = _posterior(SCHEDULES[name](), X0, x_t)
    c0, ct = truth.coefficients(TIMES)
    terms = wide(c0) * abs(X0) + wide(ct) * abs(x_t)
    bound = BOUND[precision]
    if precision == "float32":
        bound = STEP_BOUND.get(name, bound)
        # c0 carries the error of 1 - e^D: 1e-4 of a number as small as beta.
        terms = terms + VARIANCE_BOUND[precision] / bound * wide(c0) * abs(X0)
    # At t = 1 the posterior is x0 itself: ct is 0.
    within(mean, truth.posterior_mean(X0, x_t, TIMES), bound, terms)
    np.testing.assert_array_equal(mean[0], X0[0].astype(precision))
    expected = wide(truth.variance("small", TIMES))
    assert variance.shape == (T, 1, 1)
    np.testing.assert_allclose(variance, expected, rtol=VARIANCE_BOUND[precision])
    assert variance[0] == 0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_equation_2_over_any_jump_is_bayes_rule(name, x64):
    """q(x_s | x_t, x0) is q(x_t | x_s) q(x_s | x0), normalised: precisions add up."""
    truth, made = oracle(name), SCHEDULES[name]()
    pairs = np.sort(np.random.default_rng(0).integers(1, T + 1, [T, 2]), axis=1)
    s, t = pairs[pairs[:, 0] < pairs[:, 1]].T
    scale, noise = np.sqrt(1 - truth.beta(t, s)), truth.beta(t, s)
    x0, x_t = X0[: len(t)], EPS[: len(t)]
    variance = 1 / (1 / truth.noise[s] + scale**2 / noise)
    mean = wide(variance) * (
        wide(truth.alphas[s] / truth.noise[s]) * x0 + wide(scale / noise) * x_t
    )
    got_mean, got_variance = gaussian.q_posterior(x0, x_t, made(t), made(s))
    np.testing.assert_allclose(got_mean, mean, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(got_variance, wide(variance), rtol=1e-9)


@named
def test_equation_3_x0_from_eps(name, precision):
    truth, last = oracle(name), T - (name == "jsd")
    x_t, eps, t = draw(2, T, 2, 3)[:last], EPS[:last], TIMES[:last]
    pred = gaussian.predict("eps", eps, x_t, SCHEDULES[name]()(t))
    terms = abs(x_t) + wide(truth.sigmas[t]) * abs(eps)
    expected = truth.x0_from_eps(x_t, eps, t)
    bound = BOUND[precision] * (1.5 if precision == "float32" else 1)
    within(pred.x0, expected, bound, terms / wide(truth.alphas[t]))
    np.testing.assert_array_equal(pred.eps, eps.astype(precision))


@named
def test_equation_4_v(name, precision):
    """v is the velocity on the circle through x0 and eps: d x_t / d angle."""
    truth, level = oracle(name), SCHEDULES[name]()(TIMES)
    angle = wide(np.arctan2(truth.sigmas[1:], truth.alphas[1:]))
    x_t = np.cos(angle) * X0 + np.sin(angle) * EPS
    v = np.cos(angle) * EPS - np.sin(angle) * X0
    bound = 2 * BOUND[precision]
    within(gaussian.target("v", X0, EPS, level), v, bound, abs(X0) + abs(EPS))
    pred = gaussian.predict("v", jnp.asarray(v), jnp.asarray(x_t), level)
    within(pred.x0, X0, bound, abs(x_t) + abs(v))
    within(pred.eps, EPS, bound, abs(x_t) + abs(v))


@named
def test_equation_5_large_variance_is_beta(name, precision):
    truth = oracle(name)
    level, prev_level = steps(SCHEDULES[name]())
    large = gaussian.reverse_variance("large", level, prev_level)
    bound = VARIANCE_BOUND[precision]
    np.testing.assert_allclose(large, truth.variance("large", TIMES), rtol=bound)
    small = gaussian.reverse_variance("small", level, prev_level)
    np.testing.assert_allclose(small, truth.variance("small", TIMES), rtol=bound)


@pytest.mark.parametrize("kind", ["small", "large"])
def test_variance_of_a_jump(kind, x64):
    truth, lin = oracle("linear"), schedule.linear()
    t, s = np.arange(50, T + 1, 50), np.arange(0, T, 50)
    got = gaussian.reverse_variance(kind, lin(t), lin(s))
    np.testing.assert_allclose(got, truth.variance(kind, t, s), rtol=1e-9)


def test_constants_of_the_paper(x64):
    lin = schedule.linear()
    assert abs(gaussian.reverse_variance("small", lin(2), lin(1)) - 5.4532e-5) < 5e-10
    t = np.array([2, 3])
    large = gaussian.reverse_variance("large", lin(t), lin(t - 1))
    np.testing.assert_allclose(np.log(large), [-9.02869, -8.87501], atol=5e-6)


@jax.jit
def _readings(made, outputs, x_t):
    level, prev_level = steps(made)
    preds = {
        kind: gaussian.predict(kind, outputs[kind], x_t, level, prev_level)
        for kind in gaussian.KINDS
    }
    again = {
        (kind, other): gaussian.target(other, pred.x0, pred.eps, level, prev_level)
        for kind, pred in preds.items()
        for other in gaussian.KINDS
    }
    return preds, [again[pair] for pair in PAIRS]


@pytest.mark.parametrize("name", ["linear", "cosine", "quad", "warmup10"])
def test_every_kind_reads_into_every_other(name, precision):
    """All pairs: what one output says, said in the terms of another."""
    truth = oracle(name)
    outputs = {kind: output_of(kind, truth, X0, EPS, TIMES) for kind in gaussian.KINDS}
    x_t = truth.q_sample(X0, EPS, TIMES)
    preds, again = _readings(SCHEDULES[name](), outputs, x_t)
    alpha, sigma = wide(truth.alphas[1:]), wide(truth.sigmas[1:])
    c0, ct = (wide(c) for c in truth.coefficients(TIMES))
    # How much an error in the output, or in x_t, grows on its way into x0. These are
    # properties of the parameterisations: "mean" says next to nothing of x0 at T.
    growth = {
        "eps": 1 / alpha,
        "x0": 1.0,
        "v": 1.0,
        "mean": 1 / c0,
        "score": 1 / alpha,
        "velocity": 1.0,
        "edm": 2.0,
    }
    size = 1 + abs(X0) + abs(EPS)
    bound = {"float32": 4e-6, "float64": 1e-11}[precision]
    x0_scale = {kind: growth[kind] * size for kind in gaussian.KINDS}
    eps_scale = {
        kind: 0 * size + bound
        if kind == "eps"
        else (size + (alpha * x0_scale[kind] if kind != "v" else size)) / sigma
        for kind in gaussian.KINDS
    }
    eps_scale |= {"v": 2 * size, "score": 2 * size, "velocity": 2 * size}
    eps_scale["edm"] = 4 * size
    for kind, pred in preds.items():
        within(pred.x0, X0, bound, x0_scale[kind])
        within(pred.eps, EPS, bound, eps_scale[kind])
    for (kind, other), got in zip(PAIRS, again, strict=True):
        x0_error, eps_error = x0_scale[kind], eps_scale[kind]
        scale = (
            size
            + {
                "eps": eps_error,
                "x0": x0_error,
                "v": alpha * eps_error + sigma * x0_error,
                "mean": (c0 + ct * alpha) * x0_error + ct * sigma * eps_error,
                "score": (size + eps_error) / sigma,
                "velocity": eps_error + x0_error,
                "edm": eps_error + 2 * x0_error,
            }[other]
        )
        within(got, outputs[other], bound, scale)


@jax.jit
def _p_samples(made, x0, x_t, keys):
    level, prev_level = steps(made)
    pred = gaussian.Prediction(
        x0, x0, jnp.full_like(x0, -3.0), jnp.full_like(x0, 0.3), jnp.full_like(x0, 0.2)
    )
    given = jnp.linspace(0.1, 1.0, T).reshape(-1, 1, 1)
    variances = [0.0, 1.0, *gaussian.VARIANCES, given]
    return [
        gaussian.p_sample(keys, pred, x_t, level, prev_level, variance=variance)
        for variance in variances
    ]


@named
def test_p_sample_at_every_step(name, precision):
    """The posterior mean of the predicted x0, plus noise of the variance asked for."""
    truth, x_t = oracle(name), EPS
    keys = jax.random.split(jax.random.key(0), T)
    mean, unit, *noisy = _p_samples(SCHEDULES[name](), X0, x_t, keys)
    c0, ct = truth.coefficients(TIMES)
    terms = wide(c0 * (101 if precision == "float32" else 1)) * abs(X0)
    bound = BOUND[precision] * (2 if precision == "float32" else 1)
    terms = terms + wide(ct) * abs(x_t)
    within(mean, truth.posterior_mean(X0, x_t, TIMES), bound, terms)
    z = np.asarray(unit - mean, np.float64)
    assert 0.9 < z[1:].std() < 1.1
    expected = [
        truth.variance("small", TIMES),
        truth.variance("large", TIMES),
        np.full(T, np.exp(-3)),
        truth.variance("large", TIMES) ** 0.3 * truth.variance("small", TIMES) ** 0.7,
        truth.variance("small", TIMES) + 0.2 * c0**2,
        np.linspace(0.1, 1, T),
    ]
    for x_s, variance in zip(noisy, expected, strict=True):
        scale = wide(np.sqrt(variance))
        # Half of the variance's bound, beside the rounding of the sum itself.
        bound = VARIANCE_BOUND[precision]
        within(x_s - mean, scale * z, bound, scale * abs(z) + 1e-2 * (1 + abs(x_t)))
        assert np.all(np.any(x_s[1:] != mean[1:], axis=(1, 2)))
        # The step to data adds none.
        np.testing.assert_array_equal(x_s[0], mean[0])


@pytest.mark.parametrize("clip", [False, True])
def test_p_mean_is_the_authors(clip, x64):
    """The whole reverse step from a network's eps, with and without clipping."""
    truth, lin = oracle("linear"), schedule.linear()
    x_t = truth.q_sample(X0, draw(3, T, 2, 3), TIMES)
    denoise = gaussian.denoiser(lambda x, t: jnp.asarray(EPS), lin, "eps", clip=clip)
    pred = denoise(jnp.asarray(x_t), TIMES)
    key = jax.random.key(0)
    mean = gaussian.p_sample(key, pred, x_t, *steps(lin), variance=0.0)
    expected, x0 = truth.p_mean(x_t, EPS, TIMES, clip=clip)
    np.testing.assert_allclose(pred.x0, x0, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(mean, expected, rtol=1e-9, atol=1e-10)
    assert (abs(x0).max() > 1) != clip


def test_noise_is_standard_normal():
    keys = jax.random.split(jax.random.key(0), 20_000)
    z = np.asarray(gaussian.normal(keys, (20_000, 3)), np.float64)
    five_sigma = 5 / np.sqrt(len(z))
    np.testing.assert_allclose(z.mean(0), 0, atol=five_sigma)
    np.testing.assert_allclose(np.cov(z.T), np.eye(3), atol=np.sqrt(2) * five_sigma)


@pytest.mark.parametrize("variance", ["small", "large", 0.3])
def test_example_depends_on_its_key_alone(variance):
    lin, keys = schedule.linear(), jax.random.split(jax.random.key(1), 6)
    x_t, t = jnp.asarray(EPS[:6], jnp.float32), np.arange(100, 700, 100)
    pred = gaussian.Prediction(x_t, x_t)

    def step(rows):
        part = jax.tree.map(lambda a: a[rows], pred)
        level, prev_level = lin(t[rows]), lin(t[rows] - 1)
        return gaussian.p_sample(
            keys[rows], part, x_t[rows], level, prev_level, variance=variance
        )

    whole = step(np.arange(6))
    rows = np.array([4, 1])
    np.testing.assert_allclose(whole[rows], step(rows), rtol=1e-6, atol=1e-7)
    assert len(np.unique(gaussian.normal(keys, (6, 2, 3)))) == 36


@pytest.mark.parametrize("seed", [jax.random.key, jax.random.PRNGKey])
def test_both_styles_of_keys(seed):
    one, many = seed(0), jax.random.split(seed(0), 5)
    assert gaussian.normal(one, (5, 2)).shape == (5, 2)
    assert gaussian.normal(many, (5, 2)).shape == (5, 2)
    np.testing.assert_array_equal(
        gaussian.normal(many, (5, 2))[3:], gaussian.normal(many[3:], (2, 2))
    )


def test_dtype_of_noise(x64):
    key = jax.random.key(0)
    assert gaussian.normal(key, (2,)).dtype == jnp.float64
    assert gaussian.normal(key, (2,), jnp.float32).dtype == jnp.float32


def test_reverse_step_has_finite_gradients_down_to_data(x64):
    """With respect to the levels too, as a learned schedule needs."""
    lin, x_t, key = schedule.linear(), jnp.ones([2, 3]), jax.random.key(0)
    t = np.array([1, 2])

    def total(level, prev_level, variance):
        pred = gaussian.predict("eps", 0.5 * x_t, x_t, level)
        # No variance at all is allowed, and what is said may depend on the level.
        said = level.like(x_t).alpha * x_t
        pred = gaussian.Prediction(*pred[:2], -said, said, 0 * said)
        return gaussian.p_sample(
            key, pred, x_t, level, prev_level, variance=variance
        ).sum()

    for variance in gaussian.VARIANCES:
        grads = jax.grad(total, (0, 1))(lin(t), lin(t - 1), variance)
        for leaf in jax.tree.leaves(grads):
            assert np.all(np.isfinite(leaf)), (variance, grads)


X = jnp.ones([2, 3])
KEYS = jax.random.split(jax.random.key(0), 3)


def _level(t=500):
    return schedule.linear()(t)


def _p_sample(variance):
    pred, now, then = gaussian.Prediction(X, X), _level(), _level(499)
    return gaussian.p_sample(KEYS[0], pred, X, now, then, variance=variance)


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda: gaussian.predict("epsilon", X, X, _level()), "'epsilon'"),
        (lambda: gaussian.target("flow", X, X, _level()), "'flow'"),
        (lambda: gaussian.target("edm", X, X, _level(), sigma_data=0.0), "0.0"),
        (lambda: gaussian.predict("edm", X, X, _level(), sigma_data=-1.0), "-1.0"),
        (lambda: gaussian.predict("mean", X, X, _level()), "prev_level=None"),
        (lambda: gaussian.target("mean", X, X, _level()), "prev_level=None"),
        (lambda: gaussian.denoiser(None, _level, "noise"), "'noise'"),
        (lambda: gaussian.reverse_variance("fixed", _level(), _level(499)), "'fixed'"),
        (lambda: _p_sample("big"), "'big'"),
        (lambda: _p_sample("learned"), "none"),
        (lambda: _p_sample("range"), "none"),
        (lambda: _p_sample("analytic"), "none"),
        (lambda: gaussian.normal(KEYS[:1], (2, 3)), "1"),
        (lambda: gaussian.normal(KEYS, (2, 3)), "3"),
    ],
)
def test_bad_input_is_refused(call, got, refuses):
    with refuses(got):
        call()


def test_hints_name_what_was_meant():
    with pytest.raises(ValueError, match="Did you mean 'eps'"):
        gaussian.predict("epsilon", X, X, _level())
    with pytest.raises(ValueError) as caught:
        gaussian.reverse_variance("learned", _level(), _level(499))
    assert "Did you mean 'learned'" not in str(caught.value)


def test_no_level_is_broadcast_by_accident():
    """A batch of levels meets an image of another batch size: an error, not a guess."""
    with pytest.raises((TypeError, ValueError)):
        gaussian.q_sample(jnp.ones([3, 2]), jnp.ones([3, 2]), _level(np.array([1, 2])))
