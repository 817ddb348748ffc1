"""Editing with the exact denoiser of Gaussian data, whose edits have closed forms."""

import itertools

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
from oracles import T, ancestral, oracle

from diffusion_jax import (
    continuous,
    editing,
    gaussian,
    grids,
    samplers,
    schedule,
    solvers,
)

SHAPE = (2, 2, 1)
LINEAR, LIN = oracle("linear"), schedule.linear()
KEY = jax.random.key(0)
# Four pixels of variance 1 and correlation 3/4: two of them say much of the others.
DATA = mixtures.normal(
    np.array([0.3, -0.2, 0.1, -0.4]).reshape(SHAPE), 0.25 * np.eye(4) + 0.75
)
DENOISE = DATA.denoiser(LIN)
DDPM = samplers.ddpm(DENOISE, LIN, variance="small")
DDIM = samplers.ddim(DENOISE, LIN)

IMAGE = jnp.asarray((DATA.mean + np.array([1.2, 0.8, 0, 0])).reshape(1, *SHAPE))
MASK = np.array([True, True, False, False]).reshape(1, *SHAPE)


def flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def constrained_moments(grid):
    """Mean and covariance of what inpainting with DDPM ends in, by recursion."""
    known = MASK.ravel()
    mean, cov = np.zeros(4), np.eye(4)
    for t, s in itertools.pairwise(np.asarray(grid).tolist()):
        if s > t:
            beta = LINEAR.beta(np.asarray(s), np.asarray(t))
            mean, cov = np.sqrt(1 - beta) * mean, (1 - beta) * cov + beta * np.eye(4)
            continue
        step, offset = ancestral(DATA, LINEAR, t, s)
        mean = step @ mean + offset
        cov = step @ cov @ step.T + LINEAR.variance("small", t, s) * np.eye(4)
        mean = np.where(known, LINEAR.alphas[s] * flat(IMAGE)[0], mean)
        cov = np.where(known[:, None] | known, 0, cov)
        cov += np.diag(known * LINEAR.noise[s])
    return mean, cov


def test_moments_of_inpainting_are_those_of_its_chain():
    """Down steps, what is put back, and steps up: all exact but for Monte Carlo."""
    grid = editing.repaint_grid(grids.uniform(LIN, 20), 5, 3)
    rule = editing.inpaint(DDPM, LIN, IMAGE, MASK)
    x = samplers.sample(KEY, rule, grid, (10_000, *SHAPE))
    mean, cov = constrained_moments(grid)
    size = np.sqrt(np.diag(cov) / len(x))
    assert np.all(abs(flat(x).mean(0) - mean) <= 5 * size + 1e-6)
    size = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / len(x))
    assert np.all(abs(np.cov(flat(x).T) - cov) <= 5 * size + 1e-6)


@pytest.mark.parametrize(
    ("rule", "resamples"), [(DDPM, 3), (DDIM, 1), (solvers.unipc(DENOISE, LIN), 1)]
)
def test_known_pixels_come_out_to_the_bit(rule, resamples):
    image = DATA.draw(7).astype(jnp.float32)
    mask = np.random.default_rng(0).random((7, *SHAPE)) < 0.5
    grid = editing.repaint_grid(grids.quadratic(LIN, 20), 4, resamples)
    painted = editing.inpaint(rule, LIN, image, mask)
    x = np.asarray(samplers.sample(KEY, painted, grid, image.shape))
    np.testing.assert_array_equal(x[mask], np.asarray(image)[mask])
    assert np.all(x[~mask] != np.asarray(image)[~mask])


def test_known_pixels_come_out_where_data_keep_some_noise():
    """Variance-exploding levels have noise at t = 0 too; the known pixels have none."""
    made = continuous.ve()
    denoise = gaussian.denoiser(lambda x, t: 0 * x, made, "x0")
    rule = editing.inpaint(samplers.ddpm(denoise, made), made, IMAGE, MASK)
    x = samplers.sample(KEY, rule, grids.uniform(made, 5), IMAGE.shape, start_std=50.0)
    np.testing.assert_array_equal(x[MASK], IMAGE[MASK])


def test_the_known_part_has_noise_of_its_own():
    """Not that of the rule, with which a mixture of both would be too noisy."""

    def draw(keys, x_t, memory, t, s):
        return samplers.Step(gaussian.normal(keys, x_t.shape), memory, x_t)

    rule = samplers.Sampler(lambda x, grid: (), draw)
    rule = editing.constrain(rule, LIN, jnp.zeros([1, 5000]), lambda y, x: y * x)
    keys, x = jax.random.split(KEY, 1), jnp.zeros([1, 5000])
    product = rule.step(keys, x, ((), None), jnp.array(500), jnp.array(400)).x
    assert abs(product.mean() / float(LIN(400).sigma)) < 0.1
    assert 0.8 < product.std() / float(LIN(400).sigma) < 1.2


def test_a_step_up_asks_nothing_of_the_network_and_shows_what_was_seen_last():
    seen = []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: seen.append(int(t)), t)
        return gaussian.Prediction(0 * x_t + t, x_t)

    rule = editing.inpaint(samplers.ddpm(denoise, LIN), LIN, IMAGE, MASK)
    grid = editing.repaint_grid(np.array([40, 30, 20, 10, 0]), 2, 2)
    _, path = samplers.trajectory(KEY, rule, grid, IMAGE.shape, range(len(grid) - 1))
    np.testing.assert_array_equal(
        path.x0.mean((1, 2, 3, 4)), [40, 30, 20, 20, 30, 20, 10]
    )
    jax.effects_barrier()
    assert seen == [40, 30, 20, 30, 20, 10]


def test_colours_are_drawn_and_the_grey_mean_is_kept():
    """Given the mean of three channels, the conditional Gaussian has that mean."""
    corner = np.array([[1, 0.6, 0.3], [0.6, 1, 0.5], [0.3, 0.5, 1.2]])
    exact = np.array([[[0.2, -0.1, 0.4]]])
    data = mixtures.normal(exact, corner)
    rule = samplers.ddpm(data.denoiser(LIN), LIN, variance="small")
    # An image stands for its mean.
    grey = jnp.asarray([-0.9, -0.5, -0.1]).reshape(1, 1, 1, 3)
    painted = editing.colorize(rule, LIN, grey)
    mean = corner.mean(0) / corner.mean() * (-0.5 - exact.mean()) + exact[0, 0]
    grid = editing.repaint_grid(grids.uniform(LIN, 20), 2, 8)
    x = samplers.sample(KEY, painted, grid, (2000, 1, 1, 3))
    np.testing.assert_allclose(x.mean(-1, keepdims=True), -0.5, atol=1e-6)
    assert np.all(np.std(x, axis=0) > 0.3)  # colours differ
    np.testing.assert_allclose(flat(x).mean(0), mean, atol=0.1)


def test_encoding_returns_with_order_one(x64):
    x0 = DATA.draw(8, seed=1)
    counts, errors = np.array([50, 100, 200, 400]), []
    for count in counts:
        grid = grids.quadratic(LIN, count)
        latent = editing.encode(DDIM, grid, x0)
        back = samplers.sample(KEY, DDIM, grid, x0.shape, start=latent)
        errors.append(np.abs(back - x0).max())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope + 1) < 0.2, errors
    assert errors[-1] < 0.03
    # What the latent is: the quantile of each image, to the same order.
    quantile = DATA.flow(x0, LIN(0), LIN(T))
    np.testing.assert_allclose(latent, quantile, atol=0.03)


def test_slerp_keeps_length_and_ends(x64):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(5, *SHAPE))) for _ in range(2))
    for share, end in ((0.0, a), (1.0, b)):
        np.testing.assert_allclose(editing.slerp(a, b, share), end, atol=1e-12)
    a, b = (x / jnp.sqrt((x**2).sum((1, 2, 3), keepdims=True)) for x in (a, b))
    shares = jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9])
    mixed = editing.slerp(a, b, shares)
    np.testing.assert_allclose((mixed**2).sum((1, 2, 3)), 1, atol=1e-12)
    angle, walked = (np.arccos((a * x).sum((1, 2, 3))) for x in (b, mixed))
    np.testing.assert_allclose(walked, shares * angle, atol=1e-9)


def test_slerp_of_parallel_vectors_is_a_straight_line(precision):
    a = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    mixed = jax.jit(editing.slerp)
    slopes = jax.jit(jax.grad(lambda a, b: editing.slerp(a, b, 0.3).sum(), (0, 1)))
    for scale in (1.0, 2.0, 1 + 1e-6, 0.0, -1.0):
        b = scale * (a + 1e-7)
        line = 0.7 * a + 0.3 * b
        if scale >= 0:
            np.testing.assert_allclose(mixed(a, b, 0.3), line, rtol=1e-5, atol=1e-6)
        assert np.all(np.isfinite(slopes(a, b))), scale
    assert np.all(np.isfinite([mixed(a, -a, 0.3), *slopes(a, a)]))


def test_interpolation_ends_and_mixes():
    grid = grids.uniform(LIN, 20)
    a, b = DATA.draw(3).astype(jnp.float32), DATA.draw(3, seed=2).astype(jnp.float32)
    fractions = np.linspace(0, 1, 5)
    for t in (500, T):
        x = editing.interpolate(KEY, DDPM, LIN, grid, a, b, t, fractions)
        first, last = (editing.vary(KEY, DDPM, LIN, grid, x0, t) for x0 in (a, b))
        np.testing.assert_allclose(x[:, 0], first, atol=1e-5)
        np.testing.assert_allclose(x[:, -1], last, atol=1e-5)
        # Every step is affine here: with shared noise the whole is, in the fraction.
        line = x[:, :1] + fractions.reshape(1, -1, 1, 1, 1) * (x[:, -1:] - x[:, :1])
        np.testing.assert_allclose(x, line, atol=1e-4)
    # Coarse to fine: at T both images are all but forgotten, at 0 pixels are mixed.
    assert np.abs(x[:, 0] - x[:, -1]).max() < 0.05
    assert np.std(flat(x[:, 0])) > 0.3
    mixed = editing.interpolate(KEY, DDPM, LIN, grid, a, b, 0, fractions)
    np.testing.assert_allclose(mixed[:, 1], 0.75 * a + 0.25 * b, rtol=1e-5, atol=1e-6)


def test_a_grid_below_a_time():
    grid = [1000, 500, 250, 0]
    for t, expected in ((1000, grid), (999, [999, *grid[1:]]), (1, [1, 0]), (0, [0])):
        np.testing.assert_array_equal(editing.below(np.array(grid), t), expected)
    np.testing.assert_array_equal(
        editing.below(np.array([1.0, 0.5, 0]), 0.75), [0.75, 0.5, 0]
    )


def test_a_depth_may_be_an_argument_under_jit():
    """A rule without noise draws the same, in or between the times of the grid."""
    grid, x0 = grids.uniform(LIN, 20), DATA.draw(2).astype(jnp.float32)

    def vary(t):
        return editing.vary(KEY, DDIM, LIN, grid, x0, t)

    traced = jax.jit(vary)
    for t in (0, 1, 250, 300, T):
        np.testing.assert_allclose(traced(t), vary(t), rtol=1e-5, atol=1e-5)


def test_a_repainting_grid_walks_each_stretch_as_often():
    cases = (2, 1, 2), (3, 2, 10), (10, 1, 1), (10, 2, 3), (250, 10, 10), (250, 2, 2)
    for steps, jump, resamples in cases:
        grid = editing.repaint_grid(np.arange(steps, -1, -1), jump, resamples)
        moves = list(itertools.pairwise(grid.tolist()))
        stretches = (steps - 1) // jump
        for s in range(steps):
            walked = resamples if 1 <= s < 1 + stretches * jump else 1
            assert moves.count((s + 1, s)) == walked, (steps, jump, resamples)
        # All others go up.
        ups = [(t, s) for t, s in moves if t - s != 1]
        assert len(ups) == stretches * (resamples - 1)
        assert all(s - t == jump for t, s in ups)
        assert moves[-1] == (1, 0)
