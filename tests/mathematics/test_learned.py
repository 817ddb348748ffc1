"""The learned schedule: monotone for any weights, and trained by two objectives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from diffusion_jax import continuous, learned, schedule, sde

TIMES = np.linspace(0, 1, 1001)


def assert_same(found, expected):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def params_of(seed=0, scale=0.0):
    """Parameters off the straight line, each moved by a normal number."""
    params = learned.init(jax.random.key(seed), width=16)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: a + jnp.asarray(scale * rng.normal(size=a.shape), a.dtype), params
    )


def test_equations_of_the_paper(x64):
    params = params_of(scale=2.0)
    made = learned.schedule(params)
    softplus = lambda a: np.logaddexp(0, np.asarray(a))  # noqa: E731
    weight, steepness, offset = params.interior
    a, b, c = softplus(weight) / 16, softplus(steepness), np.asarray(offset)
    inner = scipy.special.expit(np.outer(TIMES, b) + c)
    g = TIMES + inner @ a
    share = 0.99 * (g - g[0]) / (g[-1] - g[0]) + 0.01 * TIMES
    high, span = params.ends.logsnr_max, softplus(params.ends.span)
    level = made(TIMES)
    np.testing.assert_allclose(level.logsnr, high - span * share, atol=1e-12)
    alpha = np.sqrt(scipy.special.expit(high - span * share))
    np.testing.assert_allclose(level.alpha, alpha, rtol=1e-11)
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-12)
    # And its slope, by hand.
    slope = 1 + (inner * (1 - inner)) @ (a * b)
    slope = 0.99 * slope / (g[-1] - g[0]) + 0.01
    f, diffusion = sde.coefficients(made, TIMES)
    np.testing.assert_allclose(diffusion**2, level.sigma**2 * span * slope, rtol=1e-10)
    np.testing.assert_allclose(-2 * f, diffusion**2, rtol=1e-10)


def test_it_starts_nearly_straight_from_the_ends_asked_for(precision):
    params = learned.init(jax.random.key(0), logsnr_min=-4.0, logsnr_max=9.0)
    logsnr = np.asarray(learned.schedule(params)(TIMES).logsnr)
    np.testing.assert_allclose(logsnr, 9 - 13 * TIMES, atol=0.05 * 13)
    tight = 1e-6 if precision == "float32" else 1e-14
    np.testing.assert_allclose(logsnr[[0, -1]], [9, -4], rtol=tight)
    assert all(leaf.dtype == precision for leaf in jax.tree.leaves(params))
    # A bend in each of so many equal stretches, where sigmoids are in their middle.
    inner = params.interior
    bends = -np.asarray(inner.offset) / np.logaddexp(0, np.asarray(inner.steepness))
    np.testing.assert_array_equal(np.floor(bends * len(bends)), np.arange(len(bends)))


def test_log_snr_falls_whatever_the_weights(precision):
    logsnr = jax.jit(lambda params: learned.schedule(params)(TIMES).logsnr)
    for scale, seed in itertools.product((1.0, 10.0, 1e3, 1e6), range(20)):
        params = params_of(seed, scale)
        # The ends are free as well, but numbers: a million nats has no digit left.
        ends = jax.tree.map(lambda a: jnp.clip(a, -30, 30), params.ends)
        params = params._replace(ends=ends)
        found = np.asarray(logsnr(params), np.float64)
        span = np.logaddexp(0, np.float64(ends.span))
        close = {"rtol": 1e-6, "atol": 1e-6 * span}
        np.testing.assert_allclose(found[0], ends.logsnr_max, **close)
        np.testing.assert_allclose(found[-1], ends.logsnr_max - span, **close)
        # Where all of it is less than the rounding of its start it cannot fall.
        strict = span > 1e-2 * abs(float(ends.logsnr_max)) or precision == "float64"
        fall = np.diff(found)
        assert np.all(fall < 0) if strict and span > 1e-9 else np.all(fall <= 0)


def test_tables_have_the_gradient_of_the_network(x64):
    params, t = params_of(scale=0.5), np.arange(1, 11) / 10

    @jax.jit
    @jax.grad
    def by_table(params):
        chain = continuous.discretize(learned.schedule(params), 10, clean=True)
        return jnp.sin(chain(np.arange(1, 11)).logsnr).sum()

    direct = jax.grad(lambda p: jnp.sin(learned.schedule(p)(t).logsnr).sum())(params)
    assert_same(by_table(params), direct)


X0, EPS = np.random.default_rng(0).normal(size=(2, 8, 3))
T = np.random.default_rng(1).uniform(size=8)


def losses_of(theta):
    """Those of a small network that knows its level: -slope / 2 ||eps - eps_hat||^2."""

    def each(level, slope):
        wide = level.like(jnp.asarray(X0))
        guess = jnp.tanh(theta * (wide.alpha * X0 + wide.sigma * EPS) + wide.logsnr / 8)
        return -0.5 * slope * ((EPS - guess) ** 2).sum(1)

    return each


def two_gradients(params, theta):
    """Of the mean, and of the mean square: what the one pass is made of."""

    def losses(params, theta):
        def logsnr(u):
            return learned.schedule(params)(u).logsnr

        found, slope = jax.jvp(logsnr, (T,), (np.ones_like(T),))
        return losses_of(theta)(schedule.preserving(found), slope)

    def parts(params, theta):
        each = losses(params, theta)
        return jnp.stack([each.mean(), (each**2).mean()])

    slopes = jax.jacrev(parts, (0, 1))(params, theta)
    mean, square = (jax.tree.map(lambda a, k=k: a[k], slopes) for k in (0, 1))
    # They differ, or nothing is shown.
    far = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-3, mean, square)
    assert all(jax.tree.leaves(far))
    ends = mean[0]._replace(interior=square[0].interior)
    return losses(params, theta).mean(), (ends, mean[1])


def one_pass(params, theta):
    def each(level, slope):
        return losses_of(theta)(level, slope), level.sigma

    losses, sigma = learned.minimise_variance(params, T, each, has_aux=True)
    return losses.mean(), sigma


def test_ends_get_the_mean_and_the_interior_the_mean_square(x64):
    params = params_of(scale=0.5)
    step = jax.jit(jax.value_and_grad(one_pass, (0, 1), has_aux=True))
    (mean, sigma), slopes = step(params, 0.7)
    assert_same((mean, slopes), two_gradients(params, 0.7))
    # What comes with a loss is given back.
    np.testing.assert_allclose(sigma, learned.schedule(params)(T).sigma)


def test_the_network_runs_once_forward_and_once_back(x64):
    def count(program):
        return str(jax.make_jaxpr(program)(params_of(scale=0.5), 0.7)).count("tanh")

    both = jax.value_and_grad(one_pass, (0, 1), has_aux=True)
    assert count(both) == count(one_pass) == 1
