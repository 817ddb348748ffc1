"""Losses and rules of few steps, on data whose paths are known."""

import functools

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
SHARES = jnp.array([0.03, 0.2, 0.5, 0.8, 0.97])


def along(x_t, level, end):
    """Where the exact flow takes x_t of `DATA`, [B, ...]."""
    level, end = level.like(x_t), end.like(x_t)
    rows = [
        a.reshape(len(x_t), 1) for a in (level.alpha, level.sigma, end.alpha, end.sigma)
    ]
    alpha, sigma, alpha_s, sigma_s = (jnp.broadcast_to(a, (len(x_t), 1)) for a in rows)
    mean, basis, spread = (
        jnp.asarray(a)[None] for a in (DATA.means[0], DATA.basis[0], DATA.spread[0])
    )
    off = (x_t.reshape(len(x_t), -1) - alpha * mean) @ basis[0]
    scale = jnp.sqrt(
        (alpha_s**2 * spread + sigma_s**2) / (alpha**2 * spread + sigma**2)
    )
    return (alpha_s * mean + (off * scale) @ basis[0].T).reshape(x_t.shape)


def clean(x):
    return schedules.NoiseLevel(jnp.zeros(len(x)), jnp.full(len(x), jnp.inf))


def exact(made):
    """The consistency function of `DATA`, as a denoiser."""

    def denoise(x_t, t):
        level = made(jnp.broadcast_to(t, x_t.shape[:1]))
        x0, wide = along(x_t, level, clean(x_t)), level.like(x_t)
        return Prediction(x0, (x_t - wide.alpha * x0) / wide.sigma)

    return denoise


def exact_jump(x_t, t, s):
    """The mean velocity of `DATA` on `FLOW`, as x0 and eps of a straight line."""
    level, prev = (FLOW(jnp.broadcast_to(a, x_t.shape[:1])) for a in (t, s))
    x_s = along(x_t, level, prev)
    level, prev = level.like(x_t), prev.like(x_t)
    # x_t = alpha x0 + sigma eps and x_s = alpha_s x0 + sigma_s eps.
    det = level.alpha * prev.sigma - level.sigma * prev.alpha
    x0 = (x_t * prev.sigma - x_s * level.sigma) / det
    return Prediction(x0, (x_s * level.alpha - x_t * prev.alpha) / det)


def drawn(made, seed=0):
    """x_t at some times, and the ends of the exact path through it."""
    t = SHARES * continuous.last_time(made)
    eps = jax.random.normal(jax.random.key(seed), (len(t), *DATA.shape))
    x_t = gaussian.q_sample(DATA.draw(len(t), seed), eps, made(t))
    seen = DATA.denoiser(made)(x_t, t)
    return t, x_t, Prediction(seen.x0, seen.eps)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.usefixtures("x64")
def test_the_consistency_function_has_no_tangent(name):
    made = REAL[name]
    t, x_t, ends = drawn(made)
    denoise, level = exact(made), made(t)
    g = distillation.tangent(denoise, ends, made, t)
    assert np.abs(g).max() < 1e-8
    assert distillation.consistency(denoise(x_t, t), g, level).max() < 1e-8
    # So it is by equation (2) for any network, whose ends do move.
    other = DATA.denoiser(made)

    def end(t):
        return other(gaussian.q_sample(ends.x0, ends.eps, made(t)), t).x0

    _, moved = jax.jvp(end, (t,), (jnp.ones_like(t),))
    _, turned = jax.jvp(
        lambda t: jnp.arctan(jnp.exp(-made(t).logsnr / 2)), (t,), (jnp.ones_like(t),)
    )
    cos = jnp.sqrt(jax.nn.sigmoid(level.logsnr))
    wanted = schedules.widened(cos / turned, x_t) * moved
    g = distillation.tangent(other, ends, made, t)
    np.testing.assert_allclose(g, wanted, rtol=1e-6, atol=1e-8)
    assert np.abs(wanted).max() > 0.05
    near = distillation.difference(other, ends, made, t, t * (1 - 1e-6))
    np.testing.assert_allclose(near, wanted, rtol=1e-4, atol=1e-5)
    # Without its second term: cos^2 (v - F).
    still = distillation.tangent(other, ends, made, t, warmup=0.0)
    seen = distillation.across(ends, level) - distillation.across(other(x_t, t), level)
    np.testing.assert_allclose(still, schedules.widened(cos**2, x_t) * seen, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_gradients_are_of_the_network_alone():
    """That of (3) is -2 g / (|g| + c) dF: nothing flows through the tangent."""
    made, scale = REAL["cosine"], jnp.asarray(0.9)
    t, x_t, ends = drawn(made)

    def denoise(scale):
        return gaussian.denoiser(
            lambda x, t: scale * x * (1 + t.reshape(-1, 1, 1, 1)), made, "v"
        )

    def loss(scale):
        g = distillation.tangent(denoise(scale), ends, made, t)
        pred, g = denoise(scale)(x_t, t), g * scale / 0.9
        return distillation.consistency(pred, g, made(t)).sum()

    g = distillation.tangent(denoise(scale), ends, made, t)
    size = jnp.sqrt((g**2).mean((1, 2, 3), keepdims=True))
    of_turned = x_t * (1 + t.reshape(-1, 1, 1, 1))
    wanted = -2 * (g / (size + 0.1) * of_turned).mean((1, 2, 3)).sum()
    np.testing.assert_allclose(jax.grad(loss)(scale), wanted, rtol=1e-9)

    def aimed(scale):
        x0 = distillation.two_steps(denoise(scale), x_t, made, t, t / 2, t / 4)
        return (x0**2).sum()

    assert jax.grad(aimed)(scale) == 0


@pytest.mark.parametrize("name", REAL)
@pytest.mark.usefixtures("x64")
def test_two_steps_of_ddim_end_where_one_to_their_x0_does(name):
    made = REAL[name]
    t, x_t, _ = drawn(made)
    teacher, middle, s = DATA.denoiser(made), 0.7 * t, 0.5 * t
    x0 = distillation.two_steps(teacher, x_t, made, t, middle, s)
    level = made(t)
    wide = level.like(x_t)
    eps = (x_t - wide.alpha * x0) / wide.sigma
    ended, rule = x_t, samplers.ddim(teacher, made)
    for now, then in ((t, middle), (middle, s)):
        ended = rule.step(
            jax.random.split(jax.random.key(0), 5), ended, (), now, then
        ).x
    np.testing.assert_allclose(gaussian.q_sample(x0, eps, made(s)), ended, atol=1e-9)
    loss = distillation.progressive(Prediction(x0, eps), x0, level)
    assert loss.max() == 0
    off = distillation.progressive(Prediction(x0 + 0.1, eps), x0, level)
    snr = np.exp(np.asarray(level.logsnr))
    np.testing.assert_allclose(off, 0.01 * np.maximum(1, snr), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_mean_velocities_satisfy_mean_flow_and_jump_to_the_end():
    t, _, ends = drawn(FLOW)
    s = t * jnp.array([0.0, 0.5, 0.9, 0.3, 0.0])
    assert distillation.mean_flow(exact_jump, ends, FLOW, t, s).max() < 1e-12

    def still(x, t, s):  # velocities in place of their means
        return Prediction(*DATA.denoiser(FLOW)(x, t)[:2])

    assert distillation.mean_flow(still, ends, FLOW, t, s).min() > 1e-3
    for steps in (1, 2, 3):
        rule, keys = jumps.mean_flow(exact_jump, FLOW), jax.random.key(0)
        start = jax.random.normal(jax.random.key(1), (6, *DATA.shape))
        grid = grids.uniform(FLOW, steps)
        found = samplers.sample(keys, rule, grid, start.shape, start=start)
        wanted = DATA.flow(start, FLOW(1.0), FLOW(0.0))
        np.testing.assert_allclose(found, wanted, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_consistency_sampling_ends_in_the_data_for_any_number_of_steps():
    made = schedules.linear()
    start = jax.random.normal(jax.random.key(1), (6, *DATA.shape))
    rule = jumps.consistency(exact(made), made)
    for steps in (1, 2, 4):
        grid, shape = grids.uniform(made, steps), (40_000, *DATA.shape)
        found = np.asarray(samplers.sample(jax.random.key(0), rule, grid, shape))
        flat = found.reshape(len(found), -1)
        np.testing.assert_allclose(flat.mean(0), DATA.mean, atol=0.02)
        np.testing.assert_allclose(np.cov(flat.T), DATA.cov, atol=0.02)
    one = samplers.sample(
        jax.random.key(0), rule, grids.uniform(made, 1), start.shape, start=start
    )
    np.testing.assert_allclose(one, DATA.flow(start, made(1000), made(0)), atol=1e-9)


# Networks that learn: x times a function of time, for data N(0, SPREAD^2).
SPREAD = 0.5


def scaled(params, made):
    """A network of 1-D data that multiplies x by a learned function of the times."""

    def denoise(x, t, s=None):
        told = jnp.stack([t, t if s is None else s], axis=1)
        return gaussian.predict("v", tiny.through(params, told) * x, x, made(t))

    return denoise


@functools.cache
def teacher_of(made):
    def denoise(x, t):
        level = made(t).like(x)
        x0 = x * level.alpha * SPREAD**2
        x0 = x0 / (level.alpha**2 * SPREAD**2 + level.sigma**2)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma)

    return denoise


def few_loss(method, made, params, key, _):
    keys = jax.random.split(key, 4)
    t = jax.random.uniform(keys[0], [64], minval=0.01)
    x0, eps = (jax.random.normal(k, [64, 1]) for k in keys[1:3])
    x0 = SPREAD * x0
    level = made(t)
    x_t, teacher = gaussian.q_sample(x0, eps, level), teacher_of(made)
    student = scaled(params, made)
    ends = teacher(x_t, t)
    if method == "progressive":
        place = jnp.ceil(2 * t)
        times = place / 2, place / 2 - 0.25, jnp.maximum(place / 2 - 0.5, 1e-4)
        x_t = gaussian.q_sample(x0, eps, made(times[0]))
        aim = distillation.two_steps(teacher, x_t, made, *times)
        pred = student(x_t, times[0])
        return distillation.progressive(pred, aim, made(times[0])).mean()
    if method == "mean_flow":
        # Some of them all the way.
        s = t * jnp.maximum(0, jax.random.uniform(keys[3], [64], minval=-0.3))
        return distillation.mean_flow(student, ends, made, t, s).mean()
    fixed = scaled(jax.lax.stop_gradient(params), made)
    if method == "ect":
        g = distillation.difference(fixed, ends, made, t, t * 0.98)
    else:
        g = distillation.tangent(fixed, ends, made, t)
    return distillation.consistency(student(x_t, t), g, level).mean()


TRUTHS = ("consistency", "ect", "mean_flow", "progressive")


@pytest.mark.parametrize("method", TRUTHS)
def test_a_network_learns_the_truth_of_gaussian_data(method):
    made = FLOW if method == "mean_flow" else REAL["cosine"]
    params = tiny.fresh(jax.random.key(0), 2, 1)
    loss = functools.partial(few_loss, method, made)
    params = tiny.trained(loss, params, 3000, 3e-3)
    one, t = jnp.ones([5, 1]), jnp.array([0.05, 0.25, 0.5, 0.75, 0.95])

    def size(level):
        return jnp.sqrt(level.alpha**2 * SPREAD**2 + level.sigma**2)

    if method == "mean_flow":
        pred = scaled(params, made)(one, t, 0 * t)
        found = gaussian.q_sample(pred.x0, pred.eps, made(0 * t))[:, 0]
        wanted = size(made(0 * t)) / size(made(t))
    elif method == "progressive":
        t = jnp.array([0.5, 1.0])
        x0 = distillation.two_steps(
            teacher_of(made), one[:2], made, t, t - 0.25, jnp.maximum(t - 0.5, 1e-4)
        )
        found, wanted = scaled(params, made)(one[:2], t).x0[:, 0], x0[:, 0]
    else:
        found = scaled(params, made)(one, t).x0[:, 0]
        wanted = SPREAD / size(made(t))
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
    exact = samplers.sample(
        jax.random.key(0),
        samplers.ddim(teacher, made),
        grids.uniform(made, 200),
        start.shape,
        start=start,
    )
    found = student(params)(start, jnp.ones(2000)).x0
    other = samplers.ddim(student(tiny.fresh(jax.random.key(1), 6, 2)), made)
    assert sliced(found, exact) < 0.06
    assert sliced(other.step(None, start, (), 1.0, 0.0).x, exact) > 0.3
