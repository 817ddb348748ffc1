"""The learned schedule: monotone for any weights, and trained by two objectives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from diffusion_jax import continuous, grids, learned, schedule, sde

TIMES = np.linspace(0, 1, 1001)


def params_of(seed=0, scale=0.0, width=16):
    """Parameters off the straight line, each moved by a normal number."""
    params = learned.init(jax.random.key(seed), width=width)
    rng = np.random.default_rng(seed)
    moved = lambda a: a + scale * jnp.asarray(rng.normal(size=a.shape), a.dtype)  # noqa: E731
    return jax.tree.map(moved, params)


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
    np.testing.assert_allclose(
        level.alpha**2, scipy.special.expit(high - span * share), rtol=1e-11
    )
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


def test_a_schedule_like_any_other(x64):
    params = params_of(scale=0.5)
    made = learned.schedule(params)
    assert continuous.last_time(made) == 1.0
    assert not continuous.counts_steps(made)
    t = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(continuous.time_of(made, made(t).logsnr), t, rtol=1e-9)
    np.testing.assert_array_equal(grids.uniform(made, 2), [1.0, 0.5, 0.0])
    np.testing.assert_allclose(
        continuous.shifted(made, -2.0)(t).logsnr, made(t).logsnr - 2
    )
    chain = continuous.discretize(made, 10, clean=True)
    np.testing.assert_allclose(chain([1, 5, 9]).logsnr, made(t).logsnr, rtol=1e-12)
    assert (chain(0).alpha, chain(0).sigma) == (1, 0)
    inside = jax.jit(lambda made, t: tuple(made(t)))
    np.testing.assert_allclose(inside(made, t), made(t), rtol=1e-12)
    assert made(0.5).logsnr.shape == ()
    assert made(np.full([2, 3], 0.5)).logsnr.shape == (2, 3)
    # In single precision the table is that of double precision, rounded.
    with jax.enable_x64(False):
        single = learned.init(jax.random.key(0))
        table = schedule.tables(continuous.discretize(learned.schedule(single), 10))
        assert table[1].dtype == np.float64


def test_tables_have_the_gradient_of_the_network(x64):
    params, t = params_of(scale=0.5), np.arange(1, 11) / 10

    @jax.jit
    @jax.grad
    def by_table(params):
        chain = continuous.discretize(learned.schedule(params), 10, clean=True)
        return jnp.sin(chain(np.arange(1, 11)).logsnr).sum()

    direct = jax.grad(lambda p: jnp.sin(learned.schedule(p)(t).logsnr).sum())(params)
    for a, b in zip(*map(jax.tree.leaves, (by_table(params), direct)), strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def losses_of(theta, x0, eps):
    """Those of a small network that knows its level: -slope / 2 ||eps - eps_hat||^2."""

    def each(level, slope):
        x = level.like(x0).alpha * x0 + level.like(x0).sigma * eps
        guess = jnp.tanh(theta * x + level.like(x0).logsnr / 8)
        return -0.5 * slope * ((eps - guess) ** 2).sum(1)

    return each


def case(size=8):
    rng = np.random.default_rng(0)
    x0, eps = (jnp.asarray(rng.normal(size=(size, 3))) for _ in range(2))
    return params_of(scale=0.5), jnp.asarray(rng.uniform(size=size)), x0, eps


def two_gradients(params, theta, t, x0, eps):
    """Of the mean, and of the mean square: what the one pass is made of."""

    def losses(params, theta):
        def logsnr(u):
            return learned.schedule(params)(u).logsnr

        found, slope = jax.jvp(logsnr, (t,), (jnp.ones_like(t),))
        return losses_of(theta, x0, eps)(schedule.preserving(found), slope)

    mean = jax.grad(lambda p, q: losses(p, q).mean(), (0, 1))(params, theta)
    square = jax.grad(lambda p, q: (losses(p, q) ** 2).mean(), (0, 1))(params, theta)
    value = losses(params, theta).mean()
    # They differ, or nothing is shown.
    far = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-3, mean, square)
    assert all(jax.tree.leaves(far))
    return value, (mean[0]._replace(interior=square[0].interior), mean[1])


def one_pass(params, theta, t, x0, eps):
    return learned.minimise_variance(params, t, losses_of(theta, x0, eps)).mean()


def assert_same(found, expected):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_ends_get_the_mean_and_the_interior_the_mean_square(x64):
    params, t, x0, eps = case()
    step = jax.jit(jax.value_and_grad(one_pass, (0, 1)))
    found = step(params, 0.7, t, x0, eps)
    assert_same(found, two_gradients(params, 0.7, t, x0, eps))


def test_the_network_runs_once_forward_and_once_back(x64):
    params, t, x0, eps = case()

    def count(program):
        text = str(jax.make_jaxpr(program)(params, 0.7, t, x0, eps))
        return text.count("tanh")

    assert count(jax.value_and_grad(one_pass, (0, 1))) == count(one_pass) == 1


def test_anything_else_comes_along(x64):
    params, t, x0, eps = case()

    def each(level, slope):
        return losses_of(0.7, x0, eps)(level, slope), {"sigma": level.sigma}

    losses, aux = learned.minimise_variance(params, t, each, has_aux=True)
    np.testing.assert_allclose(losses.mean(), one_pass(params, 0.7, t, x0, eps))
    np.testing.assert_allclose(aux["sigma"], learned.schedule(params)(t).sigma)


REFUSED = [
    (lambda: learned.init(jax.random.key(0), logsnr_min=14.0), "14.0"),
    (lambda: learned.init(jax.random.key(0), logsnr_max=np.nan), "nan"),
    (lambda: learned.init(jax.random.key(0), width=0), "0"),
    (lambda: learned.init(jax.random.key(0), width=2.5), "2.5"),
    (lambda: learned.schedule(params_of())(1.5), "1.5"),
    (
        lambda: learned.minimise_variance(
            params_of(), jnp.array([0.1, 0.2]), lambda level, slope: slope.mean()
        ),
        "()",
    ),
]


def test_bad_input_is_refused(refuses):
    for call, got in REFUSED:
        with refuses(got):
            call()
