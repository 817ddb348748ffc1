"""The terms of the bound against the paper's formulas, and against integrals."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from oracles import SCHEDULES, T, bits_per_dim, decoder_nll, draw, oracle, wide

from diffusion_jax import gaussian, losses, schedule

TIMES = np.arange(1, T + 1)
BINS = np.linspace(-1, 1, 256)


def single(a):
    """As float32 has it."""
    return a.astype(np.float32).astype(np.float64)


def pixels(seed, *shape):
    """Data on the grid of 256 values, as float32 has them."""
    return single(np.random.default_rng(seed).integers(0, 256, shape) / 127.5 - 1)


X0, EPS = pixels(0, T, 4, 4), draw(1, T, 4, 4)


def test_simple_in_every_space(x64):
    t = TIMES[:-1]
    x0, eps, off = X0[t], EPS[t], draw(2, len(t), 4, 4)
    square = np.square(off).mean(axis=(1, 2))

    @jax.jit
    def of(x_t, level, prev_level):
        pred = gaussian.predict("eps", jnp.asarray(eps + off), x_t, level)
        simple = partial(losses.simple, pred, x0, eps, level)
        weighted = losses.weighted(pred, eps, level, lambda logsnr: jnp.exp(-logsnr))
        spaces = [simple(prev_level, space=space) for space in gaussian.KINDS]
        return simple(), weighted, spaces

    for name in ("linear", "cosine"):
        truth, made = oracle(name), SCHEDULES[name]()
        alpha, sigma = truth.alphas[t], truth.sigmas[t]
        default, weighted, spaces = of(truth.q_sample(x0, eps, t), made(t), made(t - 1))
        np.testing.assert_allclose(default, square, rtol=1e-12)
        expected = (sigma / alpha) ** 2 * square
        np.testing.assert_allclose(weighted, expected, rtol=1e-9)
        for space, got in zip(gaussian.KINDS, spaces, strict=True):
            # An error of 1 in eps is one of -sigma / alpha in x0: x_t is given.
            scales = alpha, sigma, *truth.coefficients(t)
            growth = oracles.said(space, -sigma / alpha, 1, *scales)
            expected = growth**2 * square
            np.testing.assert_allclose(got, expected, rtol=1e-8, err_msg=space)


def test_normal_kl_keeps_its_digits_where_variances_are_close():
    """1/4 r^2 for a small log ratio r, far below the rounding of r itself in r - 1."""
    ratio = np.float32(1e-3)
    got = losses.normal_kl(jnp.zeros(1), jnp.array([ratio]), jnp.zeros(1), jnp.zeros(1))
    exact = 0.5 * (np.expm1(np.float64(ratio)) - np.float64(ratio))
    np.testing.assert_allclose(got, exact, rtol=1e-3)


def test_decoder_of_every_bin(x64):
    x0, mean = (a.ravel() for a in np.meshgrid(BINS, np.linspace(-1.1, 1.1, 23)))
    for exact, log_variance in itertools.product(
        (False, True), (-12.0, -9.8, -5.0, 0.0)
    ):
        inputs = x0, mean, np.full((), log_variance)
        got = losses.decoder(*map(jnp.asarray, inputs), exact=exact)
        expected = decoder_nll(*inputs, exact=exact)
        # At the floor a probability is a difference of numbers near 1.
        one, other = np.exp(-got), np.exp(-expected)
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-15)
        assert np.max(got) <= -np.log(1e-12) + 1e-9


def test_decoder_keeps_small_probabilities():
    """On both sides of the mean, in float32: 1 - p has no room for a p of 1e-8."""
    x0 = BINS.astype(np.float32)[40:-40].astype(np.float64)
    rest = np.zeros(()), np.full((), -4.0)
    for exact in (False, True):
        got = losses.decoder(jnp.asarray(x0), *map(jnp.asarray, rest), exact=exact)
        expected = decoder_nll(-abs(x0), *rest, exact=exact)
        assert expected.max() > 16
        np.testing.assert_allclose(got, expected, atol=2e-4)


def test_decoder_has_finite_gradients_for_any_learned_variance():
    """A learned log-variance has no range; an early step may go far."""
    grad = jax.grad(lambda *args: losses.decoder(*args).sum(), (1, 2))
    for log_variance in (-100.0, -60.0, 60.0):
        mean = jnp.array([-0.3, 0.0, 0.3])
        slopes = grad(jnp.zeros(3), mean, jnp.full(3, log_variance))
        assert np.all(np.isfinite(slopes)), log_variance


@jax.jit
def terms(made, pred, x0, x_t):
    """Of every variance, at every step, [variances, T]."""
    of = partial(losses.vlb, pred, x0, x_t, made, jnp.arange(1, made.steps + 1))
    return jnp.stack([of(variance=variance) for variance in gaussian.VARIANCES])


def test_vlb_at_every_step(precision):
    """KL for t > 1, the decoder at t = 1, for every reverse variance.

    In float32 a KL is proportional to c0^2 / variance, which has 1 - e^D once on
    balance: the 1e-4 of `reverse_variance`, and once more for the ratio of variances.
    Where the logs of the variances differ by r = 0.1, a KL has r / 2 of their error.
    """
    off, learned, share, known = (draw(seed, T, 4, 4) for seed in (3, 4, 5, 6))
    share, known = single(0.5 + 0.2 * share), single(np.square(known))
    relative = {"float32": 2e-4, "float64": 1e-9}[precision]
    for name in SCHEDULES:
        truth, made = oracle(name), SCHEDULES[name]()
        x_t = single(truth.q_sample(X0, EPS, TIMES))
        guess = single(np.clip(X0 + 0.3 * wide(truth.sigmas[1:]) * off, -1, 1))
        small, large = (wide(truth.log_variance(k, TIMES)) for k in ("small", "large"))
        log_variance = single(large + 0.1 * learned)
        pred = gaussian.Prediction(guess, guess, log_variance, share, known)
        got = terms(made, pred, X0, x_t)
        c0, _ = truth.coefficients(TIMES)
        model = {
            "small": small,
            "large": large,
            "learned": log_variance,
            # The large end is beta_1 at t = 1, in the official code too.
            "range": share * wide(np.log(truth.beta(TIMES))) + (1 - share) * small,
            "analytic": np.log(
                wide(truth.variance("small", TIMES)) + wide(c0) ** 2 * known
            ),
        }
        for kind, found in zip(gaussian.VARIANCES, got, strict=True):
            rounded = 1e-11 if kind in ("small", "large") else 1e-5
            atol = {"float32": rounded, "float64": 1e-14}[precision]
            expected = truth.bound_term(X0, x_t, guess, TIMES, model[kind])
            close = {"rtol": relative, "atol": atol, "err_msg": f"{name} {kind}"}
            np.testing.assert_allclose(found, expected, **close)


def test_vlb_is_finite_where_all_is_noise_and_so_are_its_gradients(precision):
    """Long after alpha_bar has gone below e^-80; down to t = 1; and of the schedule."""
    x0, x_t = jnp.asarray(X0), jnp.asarray(EPS)

    def totals(made, guess):
        count = made.steps
        pred = gaussian.Prediction(guess, guess, guess, guess, guess**2)
        return terms(made, pred, x0[:count], x_t[:count]).sum(axis=1)

    fixed = totals(schedule.const(beta=0.2), 0.9 * x0)[:2]
    assert np.all(np.isfinite(fixed))
    made = jax.tree.map(jnp.asarray, schedule.linear(10))
    slopes = jax.jit(jax.jacrev(totals, (0, 1)))(made, 0.9 * x0[:10])
    for leaf in jax.tree.leaves(slopes):
        assert np.all(np.isfinite(leaf))


def test_vlb_of_an_exploding_chain(x64):
    """q(x_s | x_t, x0) where alpha = 1: x_s is x0 and x_t, each by its precision."""
    sigma = np.geomspace(0.01, 50, 40)
    made = schedule.from_tables(np.zeros(41), np.append(np.inf, -2 * np.log(sigma)))
    x0, eps, guess = pixels(7, 40, 4, 4), draw(8, 40, 4, 4), 0.5 * draw(9, 40, 4, 4)
    x_t = x0 + wide(sigma) * eps
    pred = gaussian.Prediction(jnp.asarray(guess), (x_t - guess) / wide(sigma))
    before, after = sigma[:-1] ** 2, sigma[1:] ** 2
    small = before * (after - before) / after
    off = wide(1 - before / after) * (x0 - guess)[1:]
    for variance, chosen in (("small", small), ("large", after - before)):
        t, data = jnp.arange(1, 41), jnp.asarray(x0)
        got = losses.vlb(pred, data, x_t, made, t, variance=variance)
        nats = oracles.normal_kl(
            off, wide(np.log(small)), 0 * off, wide(np.log(chosen))
        )
        np.testing.assert_allclose(got[1:], bits_per_dim(nats), rtol=1e-9)
        # The decoder's variance is that of the next step, or the one asked for.
        told = losses.vlb(pred, data, x_t, made, t, decoder_variance=0.3)
        for first, width in ((got[:1], small[0]), (told[:1], 0.3)):
            nats = decoder_nll(x0[:1], guess[:1], np.log(width))
            np.testing.assert_allclose(first, bits_per_dim(nats), rtol=1e-9)


def test_prior(precision):
    """KL to N(0, max(1, sigma)^2); and the paper's number, where E[x^2] = 0.3."""
    bound = {"float32": 1e-5, "float64": 1e-8}[precision]
    truths = [
        (oracle(name).alphas[-1], oracle(name).sigmas[-1], SCHEDULES[name]()(T))
        for name in ("linear", "cosine", "quad", "jsd")
    ]
    for alpha, sigma in ((0.7, 0.3), (0.7, 0.99), (0.7, 1.01), (0.7, 4.0), (1.0, 50.0)):
        fields = np.log(alpha), 2 * np.log(alpha / sigma)
        truths.append((alpha, sigma, schedule.NoiseLevel(*map(jnp.asarray, fields))))
    for alpha, sigma, level in truths:
        std = max(1.0, sigma)
        nats = oracles.normal_kl(alpha * X0[:20], 2 * np.log(sigma), 0, 2 * np.log(std))
        got = losses.prior(jnp.asarray(X0[:20]), level)
        np.testing.assert_allclose(
            got, bits_per_dim(nats), rtol=bound, atol=1e-9 * bound
        )
    got = losses.prior(jnp.full([2, 4, 4, 3], 0.3**0.5), schedule.linear()(1000))
    np.testing.assert_allclose(got, [8.7e-6] * 2, atol=0.05e-6)
