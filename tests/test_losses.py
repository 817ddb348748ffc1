"""The terms of the bound against the paper's formulas, and against integrals."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SCHEDULES, NumpyDDPM, T, bits_per_dim, decoder_nll, normal_kl

from diffusion_jax import gaussian, losses, schedule

TIMES = np.arange(1, T + 1)
BINS = np.linspace(-1, 1, 256)
LN2 = np.log(2)


@cache
def oracle(name):
    return NumpyDDPM.named(name)


def wide(a):
    return np.reshape(a, (-1, 1, 1))


def pixels(seed, *shape):
    """Data on the grid of 256 values, as float32 has them."""
    numbers = np.random.default_rng(seed).integers(0, 256, shape) / 127.5 - 1
    return numbers.astype(np.float32).astype(np.float64)


def noise(seed, *shape):
    numbers = np.random.default_rng(seed).normal(size=shape)
    return numbers.astype(np.float32).astype(np.float64)


X0, EPS = pixels(0, T, 4, 4), noise(1, T, 4, 4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_simple_in_every_space(name, x64):
    """An error d in eps is sigma/alpha d in x0, d/alpha in v, c0 sigma/alpha d in mean.

    (The mean's two ways of depending on eps cancel: x_t is given, only x0 moves.)
    """
    truth, made, t = oracle(name), SCHEDULES[name](), TIMES[:-1]
    level, prev_level = made(t), made(t - 1)
    x0, eps, off = X0[t], EPS[t], noise(2, len(t), 4, 4)
    x_t = truth.q_sample(x0, eps, t)
    pred = gaussian.predict("eps", jnp.asarray(eps + off), x_t, level)
    alpha, sigma = truth.alphas[t], truth.sigmas[t]
    c0, _ = truth.coefficients(t)
    growth = {"eps": 1, "x0": sigma / alpha, "v": 1 / alpha, "mean": c0 * sigma / alpha}
    growth |= {"score": 1 / sigma, "velocity": 1 + sigma / alpha}
    # (x0 - c_skip x) / c_out, where x is given.
    growth["edm"] = growth["x0"] / (0.5 * sigma / np.sqrt(sigma**2 + 0.25 * alpha**2))
    square = np.square(off).mean(axis=(1, 2))
    for space in gaussian.KINDS:
        got = losses.simple(pred, x0, eps, level, prev_level, space=space)
        np.testing.assert_allclose(got, growth[space] ** 2 * square, rtol=1e-8)
    default = losses.simple(pred, x0, eps, level)
    np.testing.assert_allclose(default, square, rtol=1e-12)


def test_simple_is_zero_for_the_truth():
    lin = schedule.linear()
    x0, eps = jnp.asarray(X0, jnp.float32), jnp.asarray(EPS, jnp.float32)
    pred = gaussian.Prediction(x0, eps)
    for space in gaussian.KINDS:
        got = losses.simple(pred, x0, eps, lin(TIMES), lin(TIMES - 1), space=space)
        np.testing.assert_array_equal(got, np.zeros(T))


def test_normal_kl_is_its_integral(x64):
    rng = np.random.default_rng(0)
    mean1, log1, mean2, log2 = rng.normal(size=(4, 30)) * [[1], [2], [1], [2]]
    z = np.linspace(-12, 12, 20_001)[:, None]
    x = mean1 + np.exp(log1 / 2) * z
    log_p = -0.5 * (z**2 + log1)
    log_q = -0.5 * ((x - mean2) ** 2 * np.exp(-log2) + log2)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    integral = np.trapezoid(density * (log_p - log_q), z, axis=0)
    got = losses.normal_kl(mean1, log1, mean2, log2)
    np.testing.assert_allclose(got, integral, rtol=1e-9)
    np.testing.assert_allclose(got, normal_kl(mean1, log1, mean2, log2), rtol=1e-9)
    assert np.all(losses.normal_kl(mean1, log1, mean1, log1) == 0)


def test_normal_kl_keeps_its_digits_where_variances_are_close():
    """1/4 r^2 for a small log ratio r, far below the rounding of r itself in r - 1."""
    ratio = np.float32(1e-3)
    got = losses.normal_kl(jnp.zeros(1), jnp.array([ratio]), jnp.zeros(1), jnp.zeros(1))
    exact = 0.5 * (np.expm1(np.float64(ratio)) - np.float64(ratio))
    np.testing.assert_allclose(got, exact, rtol=1e-3)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mean", [-1.2, -0.5, 0.1, 1.0])
@pytest.mark.parametrize("log_variance", [-12.0, -6.0, 0.0])
def test_decoder_probabilities_sum_to_one(mean, log_variance, exact, precision):
    nats = losses.decoder(
        jnp.asarray(BINS), jnp.full(256, mean), jnp.full(256, log_variance), exact=exact
    )
    total = np.exp(-np.asarray(nats, np.float64)).sum()
    # In float32 both bins at each of 255 edges round it, by 2^-24 each; in float64 only
    # the floor of 1e-12 in 254 bins is left where one or two bins hold everything.
    bound = {"float32": 5e-6, "float64": 1e-9}[precision]
    assert abs(total - 1) < bound


@pytest.mark.parametrize("exact", [False, True])
def test_decoder_of_every_bin(exact, x64):
    x0, mean = (a.ravel() for a in np.meshgrid(BINS, np.linspace(-1.1, 1.1, 23)))
    for log_variance in (-12.0, -9.8, -5.0, 0.0):
        got = losses.decoder(
            jnp.asarray(x0), jnp.asarray(mean), jnp.asarray(log_variance), exact=exact
        )
        expected = decoder_nll(x0, mean, np.asarray(log_variance), exact=exact)
        # At the floor a probability is a difference of numbers near 1.
        np.testing.assert_allclose(
            np.exp(-got), np.exp(-expected), rtol=1e-9, atol=1e-15
        )
        assert np.max(got) <= -np.log(1e-12) + 1e-9


@pytest.mark.parametrize("exact", [False, True])
def test_decoder_keeps_small_probabilities(exact):
    """On both sides of the mean, in float32: 1 - p has no room for a p of 1e-8."""
    x0 = BINS.astype(np.float32)[40:-40].astype(np.float64)
    got = losses.decoder(
        jnp.asarray(x0), jnp.zeros(()), jnp.full((), -4.0), exact=exact
    )
    expected = decoder_nll(-abs(x0), np.zeros(()), np.full((), -4.0), exact=exact)
    assert expected.max() > 16
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_decoder_has_finite_gradients_for_any_learned_variance():
    """A learned log-variance has no range; an early step may go far."""
    grad = jax.grad(lambda *args: losses.decoder(*args).sum(), (1, 2))
    for log_variance in (-100.0, -60.0, 60.0):
        inputs = (jnp.zeros(3), jnp.array([-0.3, 0.0, 0.3]), jnp.full(3, log_variance))
        for leaf in grad(*inputs):
            assert np.all(np.isfinite(leaf)), log_variance


@jax.jit
def _terms(made, pred, x0, x_t):
    t = jnp.arange(1, T + 1)
    return [
        losses.vlb(pred, x0, x_t, made, t, variance=variance)
        for variance in gaussian.VARIANCES
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_vlb_at_every_step(name, precision):
    """KL for t > 1, the decoder at t = 1, for every reverse variance.

    In float32 a KL is proportional to c0^2 / variance, which has 1 - e^D once on
    balance: the 1e-4 of `reverse_variance`, and once more for the ratio of variances.
    Where the logs of the variances differ by r = 0.1, a KL has r / 2 of their error.
    """
    truth, made = oracle(name), SCHEDULES[name]()
    x_t = truth.q_sample(X0, EPS, TIMES).astype(np.float32).astype(np.float64)
    error = 0.3 * wide(truth.sigmas[1:]) * noise(3, T, 4, 4)
    guess = np.clip(X0 + error, -1, 1).astype(np.float32).astype(np.float64)
    log_variance = truth.log_variance("large", TIMES)
    learned = wide(log_variance) + 0.1 * noise(4, T, 4, 4)
    learned = learned.astype(np.float32).astype(np.float64)
    share = (0.5 + 0.2 * noise(5, T, 4, 4)).astype(np.float32).astype(np.float64)
    known = np.square(noise(6, T, 4, 4)).astype(np.float32).astype(np.float64)
    pred = gaussian.Prediction(guess, guess, learned, share, known)
    got = _terms(made, pred, X0, x_t)
    small, _ = ends = [wide(truth.log_variance(k, TIMES)) for k in ("small", "large")]
    # The large end of the range is beta_1 at t = 1, in the official code too.
    mixed = share * wide(np.log(truth.beta(TIMES))) + (1 - share) * small
    c0, _ = truth.coefficients(TIMES)
    best = np.log(wide(truth.variance("small", TIMES)) + wide(c0) ** 2 * known)
    model = dict(zip(gaussian.VARIANCES, [*ends, learned, mixed, best], strict=True))
    relative = {"float32": 2e-4, "float64": 1e-9}[precision]
    for (kind, variance), terms in zip(model.items(), got, strict=True):
        rounded = 1e-11 if kind in ("small", "large") else 1e-5
        atol = {"float32": rounded, "float64": 1e-14}[precision]
        expected = truth.bound_term(X0, x_t, guess, TIMES, variance)
        np.testing.assert_allclose(terms, expected, rtol=relative, atol=atol)


@pytest.mark.parametrize("name", ["linear", "cosine", "quad"])
def test_vlb_telescopes_into_snr(name, precision):
    """With the small variance L_{t-1} is (SNR_s - SNR_t) / 2 times the squared error.

    A constant error adds up to (SNR_1 - SNR_T) / 2: Eq. 13 of Kingma et al. 2021.
    """
    truth, made = oracle(name), SCHEDULES[name]()
    x0 = np.zeros([T, 1, 1])
    pred = gaussian.Prediction(jnp.full([T, 1, 1], 0.5), jnp.zeros([T, 1, 1]))
    t = jnp.arange(1, T + 1)
    terms = losses.vlb(pred, jnp.asarray(x0), EPS[:, :1, :1], made, t, variance="small")
    snr = truth.alphas_bar[1:] / truth.noise[1:]
    expected = (snr[0] - snr[-1]) / 2 * 0.25 / LN2
    total = np.asarray(terms, np.float64)[1:].sum()
    bound = {"float32": 1e-6, "float64": 1e-11}[precision]
    np.testing.assert_allclose(total, expected, rtol=bound)


def test_vlb_of_the_best_guess_is_the_cost_of_its_variance(x64):
    """Where x0 is known, only a variance that is not the posterior's costs anything."""
    truth, lin = oracle("linear"), schedule.linear()
    pred = gaussian.Prediction(X0, EPS)
    small, large = (
        losses.vlb(pred, X0, EPS, lin, jnp.arange(1, T + 1), variance=kind)
        for kind in ("small", "large")
    )
    np.testing.assert_allclose(small[1:], 0, atol=1e-14)
    ratio = truth.variance("small", TIMES[1:]) / truth.variance("large", TIMES[1:])
    cost = 0.5 * (ratio - 1 - np.log(ratio)) / LN2
    np.testing.assert_allclose(large[1:], cost, rtol=1e-8, atol=1e-14)
    # At t = 1 both decode with the posterior variance of t = 2.
    np.testing.assert_array_equal(small[0], large[0])
    nats = decoder_nll(X0[:1], X0[:1], np.asarray(-9.81673))
    np.testing.assert_allclose(small[0], bits_per_dim(nats)[0], rtol=1e-5)


def test_vlb_where_all_is_noise_is_finite():
    """Steps long after alpha_bar has gone below e^-80 cost next to nothing, not nan."""
    made = schedule.const(beta=0.2)
    x0, x_t = (jnp.asarray(a, jnp.float32) for a in (X0, EPS))
    pred = gaussian.Prediction(jnp.zeros_like(x0), x_t)
    for variance in ("small", "large"):
        terms = losses.vlb(pred, x0, x_t, made, jnp.arange(1, T + 1), variance=variance)
        assert np.all(np.isfinite(terms))


def test_vlb_has_finite_gradients_at_every_step(x64):
    """Down to t = 1 and with respect to the schedule too, as a learned one needs."""
    lin, t = schedule.linear(10), np.arange(1, 11)
    x0, x_t = jnp.asarray(X0[:10]), jnp.asarray(EPS[:10])

    def total(made, guess, variance):
        pred = gaussian.Prediction(guess, guess, guess, guess, guess**2)
        return losses.vlb(pred, x0, x_t, made, t, variance=variance).sum()

    made = jax.tree.map(jnp.asarray, lin)
    for variance in gaussian.VARIANCES:
        grad = jax.jit(jax.grad(total, (0, 1)), static_argnums=2)
        grads = grad(made, 0.9 * x0, variance)
        for leaf in jax.tree.leaves(grads):
            assert np.all(np.isfinite(leaf)), variance


def exploding(sigma):
    """The chain of alpha = 1 with noise of these standard deviations, [T]."""
    logsnr = np.concatenate([[np.inf], -2 * np.log(sigma)])
    return schedule.from_tables(np.zeros(len(logsnr)), logsnr)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_vlb_of_an_exploding_chain(variance, x64):
    """q(x_s | x_t, x0) where alpha = 1: x_s is x0 and x_t, each by its precision."""
    sigma = np.geomspace(0.01, 50, 40)
    t = np.arange(1, 41)
    x0, eps, guess = pixels(7, 40, 4, 4), noise(8, 40, 4, 4), 0.5 * noise(9, 40, 4, 4)
    x_t = x0 + wide(sigma) * eps
    pred = gaussian.Prediction(jnp.asarray(guess), (x_t - guess) / wide(sigma))
    got = losses.vlb(
        pred, jnp.asarray(x0), x_t, exploding(sigma), jnp.asarray(t), variance=variance
    )
    before, after = sigma[:-1] ** 2, sigma[1:] ** 2
    small = before * (after - before) / after
    chosen = small if variance == "small" else after - before
    off = wide(1 - before / after) * (x0 - guess)[1:]
    nats = normal_kl(off, wide(np.log(small)), 0 * off, wide(np.log(chosen)))
    np.testing.assert_allclose(got[1:], bits_per_dim(nats), rtol=1e-9)
    nats = decoder_nll(x0[:1], guess[:1], np.log(small[0]))
    np.testing.assert_allclose(got[:1], bits_per_dim(nats), rtol=1e-9)


def test_prior(precision):
    bound = {"float32": 1e-5, "float64": 1e-8}[precision]
    for name in ("linear", "cosine", "quad", "jsd"):
        truth, made = oracle(name), SCHEDULES[name]()
        got = losses.prior(jnp.asarray(X0[:20]), made(T))
        np.testing.assert_allclose(
            got, truth.prior(X0[:20]), rtol=bound, atol=1e-9 * bound
        )


def test_prior_of_the_paper():
    """8.7e-6 bits/dim where E[x^2] = 0.3, as on CIFAR-10."""
    x0 = jnp.full([2, 4, 4, 3], 0.3**0.5)
    got = losses.prior(x0, schedule.linear()(1000))
    assert got.shape == (2,)
    np.testing.assert_allclose(got, 8.7e-6, atol=0.05e-6)


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda pred, x: losses.simple(pred, x, x, None, space="noise"), "'noise'"),
        (
            lambda pred, x: losses.simple(
                pred, x, x, schedule.linear()(5), space="mean"
            ),
            "prev_level=None",
        ),
        (
            lambda pred, x: losses.vlb(
                pred, x, x, schedule.linear(), jnp.array([5]), variance="tiny"
            ),
            "'tiny'",
        ),
        (
            lambda pred, x: losses.vlb(
                pred, x, x, schedule.linear(), jnp.array([5]), variance="learned"
            ),
            "none",
        ),
    ],
)
def test_bad_input_is_refused(call, got, refuses):
    x = jnp.zeros([1, 2])
    with refuses(got):
        call(gaussian.Prediction(x, x), x)
