"""Losses and rules of few steps, on data whose paths are known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
import tiny

from diffusion_jax import continuous, distillation, gaussian, grids, jumps, samplers
from diffusion_jax import schedule as schedules
from diffusion_jax.prediction import Prediction

DATA = mixtures.one()
REAL = {
    "linear": continuous.interpolate(schedules.linear()),
    "cosine": continuous.cosine(),
    "flow": continuous.flow(),
    "ve": continuous.ve(sigma_max=20.0),
}
FLOW = REAL["flow"]
CLEAN = schedules.linear()(0)
START = jnp.asarray(np.random.default_rng(1).normal(size=(6, *DATA.shape)))


def along(x_t, level, end):
    """Where the exact flow takes x_t of `DATA`, [B, ...]."""
    rows = level.alpha, level.sigma, end.alpha, end.sigma
    alpha, sigma, alpha_s, sigma_s = (jnp.reshape(a, (-1, 1)) for a in rows)
    mean, spread, basis = DATA.means, DATA.spread, DATA.basis[0]
    off = (x_t.reshape(len(x_t), -1) - alpha * mean) @ basis
    scale = (alpha_s**2 * spread + sigma_s**2) / (alpha**2 * spread + sigma**2)
    return (alpha_s * mean + (off * jnp.sqrt(scale)) @ basis.T).reshape(x_t.shape)


def exact(made):
    """The consistency function of `DATA`, as a denoiser."""

    def denoise(x_t, t):
        level = made(jnp.broadcast_to(t, x_t.shape[:1])).like(x_t)
        x0 = along(x_t, level, CLEAN)
        return Prediction(x0, (x_t - level.alpha * x0) / level.sigma)

    return denoise


def exact_jump(x_t, t, s):
    """The mean velocity of `DATA` on `FLOW`, as x0 and eps of a straight line."""
    level, prev = (FLOW(jnp.broadcast_to(a, x_t.shape[:1])).like(x_t) for a in (t, s))
    x_s = along(x_t, level, prev)
    # x_t = alpha x0 + sigma eps and x_s = alpha_s x0 + sigma_s eps.
    det = level.alpha * prev.sigma - level.sigma * prev.alpha
    x0 = (x_t * prev.sigma - x_s * level.sigma) / det
    return Prediction(x0, (x_s * level.alpha - x_t * prev.alpha) / det)


def from_start(rule, made, steps, start=START):
    grid = grids.uniform(made, steps)
    return samplers.sample(jax.random.key(0), rule, grid, start.shape, start=start)


def drawn(made):
    """x_t at some times, and the ends of the exact path through it."""
    t = jnp.array([0.03, 0.2, 0.5, 0.8, 0.97]) * continuous.last_time(made)
    eps = jax.random.normal(jax.random.key(0), (len(t), *DATA.shape))
    x_t = gaussian.q_sample(DATA.draw(len(t)), eps, made(t))
    return t, x_t, Prediction(*DATA.denoiser(made)(x_t, t)[:2])


@pytest.mark.parametrize("name", REAL)
@pytest.mark.usefixtures("x64")
def test_the_consistency_function_has_no_tangent(name):
    made, other = REAL[name], DATA.denoiser(REAL[name])

    def angle(t):
        return jnp.arctan(jnp.exp(-made(t).logsnr / 2))

    @jax.jit
    def parts():
        (t, x_t, ends), denoise = drawn(made), exact(made)
        level, tangent = made(t), distillation.tangent
        none = tangent(denoise, ends, made, t)
        lost = distillation.consistency(denoise(x_t, t), none, level)

        # What it is by equation (2), for a network whose ends do move.
        def end(t):
            return other(gaussian.q_sample(ends.x0, ends.eps, made(t)), t).x0

        moved, turned = (jax.jvp(f, (t,), (jnp.ones_like(t),))[1] for f in (end, angle))
        cos = jnp.sqrt(jax.nn.sigmoid(level.logsnr))
        wanted = schedules.widened(cos / turned, x_t) * moved
        near = distillation.difference(other, ends, made, t, t * (1 - 1e-6))
        # Without its second term: cos^2 (v - F).
        still = tangent(other, ends, made, t, warmup=0.0)
        velocity, seen = (distillation.across(p, level) for p in (ends, other(x_t, t)))
        first = schedules.widened(cos**2, x_t) * (velocity - seen)
        found = tangent(other, ends, made, t)
        return (none, lost), (found, near, wanted), (still, first)

    zeros, (found, near, wanted), (still, first) = parts()
    assert max(np.abs(zero).max() for zero in zeros) < 1e-8
    assert np.abs(wanted).max() > 0.05
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(near, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(still, first, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_gradients_are_of_the_network_alone():
    """That of (3) is -2 g / (|g| + c) dF: nothing flows through the tangent."""
    made, scale = REAL["cosine"], jnp.asarray(0.9)
    t, x_t, ends = drawn(made)

    def network(x, t):
        return x * (1 + t.reshape(-1, 1, 1, 1))

    def denoise(scale):
        return gaussian.denoiser(lambda *of: scale * network(*of), made, "v")

    def loss(scale):
        g = distillation.tangent(denoise(scale), ends, made, t)
        pred, g = denoise(scale)(x_t, t), g * scale / 0.9
        return distillation.consistency(pred, g, made(t)).sum()

    g = distillation.tangent(denoise(scale), ends, made, t)
    size = jnp.sqrt((g**2).mean((1, 2, 3), keepdims=True))
    wanted = -2 * (g / (size + 0.1) * network(x_t, t)).mean((1, 2, 3)).sum()
    np.testing.assert_allclose(jax.grad(loss)(scale), wanted, rtol=1e-9)

    def aimed(scale):
        x0 = distillation.two_steps(denoise(scale), x_t, made, t, t / 2, t / 4)
        return (x0**2).sum()

    assert jax.grad(aimed)(scale) == 0


@pytest.mark.parametrize("name", REAL)
@pytest.mark.usefixtures("x64")
def test_two_steps_of_ddim_end_where_one_to_their_x0_does(name):
    made, teacher = REAL[name], DATA.denoiser(REAL[name])

    @jax.jit
    def parts():
        t, x_t, _ = drawn(made)
        times = t, 0.7 * t, 0.5 * t
        x0, level = distillation.two_steps(teacher, x_t, made, *times), made(t)
        eps = (x_t - level.like(x_t).alpha * x0) / level.like(x_t).sigma
        ended, keys = x_t, jax.random.split(jax.random.key(0), 5)
        for now, then in itertools.pairwise(times):
            ended = samplers.ddim(teacher, made).step(keys, ended, (), now, then).x
        off = distillation.progressive(Prediction(x0 + 0.1, eps), x0, level)
        return gaussian.q_sample(x0, eps, made(times[-1])), ended, off, level.logsnr

    found, ended, off, logsnr = parts()
    np.testing.assert_allclose(found, ended, atol=1e-9)
    np.testing.assert_allclose(off, 0.01 * np.maximum(1, np.exp(logsnr)), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_mean_velocities_satisfy_mean_flow_and_jump_to_the_end():
    t, _, ends = drawn(FLOW)
    s = t * jnp.array([0.0, 0.5, 0.9, 0.3, 0.0])
    assert distillation.mean_flow(exact_jump, ends, FLOW, t, s).max() < 1e-12

    def still(x, t, s):  # velocities in place of their means
        return Prediction(*DATA.denoiser(FLOW)(x, t)[:2])

    assert distillation.mean_flow(still, ends, FLOW, t, s).min() > 1e-3
    for steps in (1, 2, 3):
        wanted = DATA.flow(START, FLOW(1.0), FLOW(0.0))
        found = from_start(jumps.mean_flow(exact_jump, FLOW), FLOW, steps)
        np.testing.assert_allclose(found, wanted, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_consistency_sampling_ends_in_the_data_for_any_number_of_steps():
    made = schedules.linear()
    rule = jumps.consistency(exact(made), made)
    for steps in (1, 2, 4):
        grid, shape = grids.uniform(made, steps), (40_000, *DATA.shape)
        found = np.asarray(samplers.sample(jax.random.key(0), rule, grid, shape))
        flat = found.reshape(len(found), -1)
        np.testing.assert_allclose(flat.mean(0), DATA.mean, atol=0.02)
        np.testing.assert_allclose(np.cov(flat.T), DATA.cov, atol=0.02)
    one, wanted = from_start(rule, made, 1), DATA.flow(START, made(1000), made(0))
    np.testing.assert_allclose(one, wanted, atol=1e-9)


# Networks that learn: x times a function of time, for data N(0, SPREAD^2).
SPREAD = 0.5
LINE = mixtures.normal(np.zeros(1), [[SPREAD**2]])


def halves(t):
    return t, t - 0.25, jnp.maximum(t - 0.5, 1e-4)


def scaled(params, made):
    """A network of 1-D data that multiplies x by a learned function of the times."""

    def denoise(x, t, s=None):
        told = jnp.stack([t, t if s is None else s], axis=1)
        return gaussian.predict("v", tiny.through(params, told) * x, x, made(t))

    return denoise


def few_loss(method, made, params, key, _):
    keys = jax.random.split(key, 4)
    t = jax.random.uniform(keys[0], [64], minval=0.01)
    x0, eps = (jax.random.normal(k, [64, 1]) for k in keys[1:3])
    x0, teacher, student = SPREAD * x0, LINE.denoiser(made), scaled(params, made)
    if method == "progressive":
        t, middle, s = halves(jnp.ceil(2 * t) / 2)
        x_t = gaussian.q_sample(x0, eps, made(t))
        aim = distillation.two_steps(teacher, x_t, made, t, middle, s)
        return distillation.progressive(student(x_t, t), aim, made(t)).mean()
    x_t = gaussian.q_sample(x0, eps, made(t))
    ends = teacher(x_t, t)
    if method == "mean_flow":
        # Some of them all the way.
        s = t * jnp.maximum(0, jax.random.uniform(keys[3], [64], minval=-0.3))
        return distillation.mean_flow(student, ends, made, t, s).mean()
    fixed = scaled(jax.lax.stop_gradient(params), made)
    if method == "ect":
        g = distillation.difference(fixed, ends, made, t, t * 0.98)
    else:
        g = distillation.tangent(fixed, ends, made, t)
    return distillation.consistency(student(x_t, t), g, made(t)).mean()


@pytest.mark.parametrize("method", ["consistency", "ect", "mean_flow", "progressive"])
def test_a_network_learns_the_truth_of_gaussian_data(method):
    made = FLOW if method == "mean_flow" else REAL["cosine"]
    loss = functools.partial(few_loss, method, made)
    params = tiny.trained(loss, tiny.fresh(jax.random.key(0), 2, 1), 3000, 3e-3)
    one, t = jnp.ones([5, 1]), jnp.array([0.05, 0.25, 0.5, 0.75, 0.95])
    size = jnp.sqrt(made(t).alpha ** 2 * SPREAD**2 + made(t).sigma ** 2)
    wanted = SPREAD / size
    if method == "mean_flow":
        pred = scaled(params, made)(one, t, 0 * t)
        found = gaussian.q_sample(pred.x0, pred.eps, made(0 * t))[:, 0]
    elif method == "progressive":
        one, t = one[:2], jnp.array([0.5, 1.0])
        teacher = LINE.denoiser(made)
        wanted = distillation.two_steps(teacher, one, made, *halves(t))[:, 0]
        found = scaled(params, made)(one, t).x0[:, 0]
    else:
        found = scaled(params, made)(one, t).x0[:, 0]
    np.testing.assert_allclose(found, wanted, atol=1e-2)


def sliced(a, b, count=64):
    """The sliced Wasserstein distance of two sets of as many points in the plane."""
    angles = np.linspace(0, np.pi, count, endpoint=False)
    axes = np.stack([np.cos(angles), np.sin(angles)])
    gaps = np.sort(np.asarray(a) @ axes, 0) - np.sort(np.asarray(b) @ axes, 0)
    return np.sqrt((gaps**2).mean())


def test_one_step_samples_of_a_mixture_end_where_its_flow_does():
    data, made = mixtures.two((2,)), REAL["cosine"]
    teacher = data.denoiser(made)

    def student(params):
        def denoise(x, t):
            t = jnp.broadcast_to(t, len(x))
            told = jnp.concatenate([x, jnp.sin(jnp.outer(t, 1.0 + jnp.arange(4)))], 1)
            return gaussian.predict("v", tiny.through(params, told), x, made(t))

        return denoise

    centres = jnp.asarray(data.means, jnp.float32)

    def loss(params, key, _):
        keys = jax.random.split(key, 3)
        t = jax.random.uniform(keys[0], [128], minval=0.01)
        which = jax.random.bernoulli(keys[1], data.weights[1], [128]).astype(int)
        noise = jax.random.normal(keys[2], [2, 128, 2])
        x_t = gaussian.q_sample(centres[which] + 0.2 * noise[0], noise[1], made(t))
        ends = Prediction(*teacher(x_t, t)[:2])
        g = distillation.tangent(student(jax.lax.stop_gradient(params)), ends, made, t)
        return distillation.consistency(student(params)(x_t, t), g, made(t)).mean()

    params = tiny.trained(loss, tiny.fresh(jax.random.key(1), 6, 2), 4000, 3e-3)
    start = jax.random.normal(jax.random.key(7), [2000, 2])
    exact = from_start(samplers.ddim(teacher, made), made, 200, start)
    found = student(params)(start, jnp.ones(2000)).x0
    other = samplers.ddim(student(tiny.fresh(jax.random.key(1), 6, 2)), made)
    assert sliced(found, exact) < 0.06
    assert sliced(other.step(None, start, (), 1.0, 0.0).x, exact) > 0.3
