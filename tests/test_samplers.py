"""Ancestral sampling against the exact moments of its chain on Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles import GaussianData, NumpyDDPM, T, chain_moments

from diffusion_jax import gaussian, grids, samplers, schedule

SHAPE = (2, 2, 1)
LINEAR = NumpyDDPM.named("linear")
KEY = jax.random.key(0)


def gaussian_image():
    """Four correlated pixels with a mean: variances from 0.03 to 0.5."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4)) * 0.25
    return GaussianData(rng.uniform(-0.7, 0.7, SHAPE), root @ root.T + 0.01 * np.eye(4))


DATA = gaussian_image()
DENOISE = DATA.denoiser(LINEAR)
GRIDS = {
    "every step": np.arange(T, -1, -1),
    "50 steps": np.arange(T, -1, -20),
    "uneven": np.array([1000, 990, 900, 700, 450, 200, 90, 30, 5, 1, 0]),
}


def hold_moments(samples, mean, cov):
    """Five standard errors of the mean and of the covariance of a Gaussian."""
    flat = np.asarray(samples, np.float64).reshape(len(samples), -1)
    variance = np.diag(cov)
    mean_error = np.sqrt(variance / len(flat))
    cov_error = np.sqrt((np.outer(variance, variance) + cov**2) / len(flat))
    np.testing.assert_array_less(abs(flat.mean(0) - mean), 5 * mean_error)
    np.testing.assert_array_less(abs(np.cov(flat.T) - cov), 5 * cov_error)


def test_exact_denoiser_is_the_regression_of_x0_on_x_t(x64):
    """The oracle itself: E[x0 | x_t] and E[eps | x_t] from joint covariances."""
    x_t = np.random.default_rng(1).normal(size=(5, *SHAPE))
    times = np.array([1, 100, 400, 800, T])
    pred = DENOISE(jnp.asarray(x_t), times)
    again = LINEAR.q_sample(np.asarray(pred.x0), np.asarray(pred.eps), times)
    np.testing.assert_allclose(again, x_t, rtol=1e-10, atol=1e-12)
    for i, t in enumerate(times):
        mean, cov = DATA.marginal(LINEAR, t)
        cross = LINEAR.alphas[t] * DATA.cov
        gain = np.linalg.solve(cov, cross).T
        x0 = DATA.mean.ravel() + gain @ (x_t[i].ravel() - mean)
        np.testing.assert_allclose(pred.x0[i].ravel(), x0, rtol=1e-9, atol=1e-10)


def test_exact_chain_ends_in_the_data():
    """The oracle itself: many steps bring the chain to the data's own moments."""
    size = np.sqrt(np.outer(np.diag(DATA.cov), np.diag(DATA.cov)))
    for variance in ("small", "large"):
        mean, cov, _ = chain_moments(DATA, LINEAR, GRIDS["every step"], variance)
        np.testing.assert_allclose(mean, DATA.mean.ravel(), atol=0.01)
        np.testing.assert_array_less(abs(cov - DATA.cov), 0.05 * size)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("grid", GRIDS)
def test_moments_of_ancestral_samples(grid, variance):
    """Mean and covariance of the discretised chain, exact but for Monte Carlo."""
    rule = samplers.ddpm(DENOISE, schedule.linear(), variance=variance)
    count = 20_000 if grid == "every step" else 100_000
    samples = samplers.sample(KEY, rule, GRIDS[grid], (count, *SHAPE))
    mean, cov, _ = chain_moments(DATA, LINEAR, GRIDS[grid], variance)
    hold_moments(samples, mean, cov)


def test_bounds_tell_the_variances_apart():
    """What the moments' test can see: small is not large on 50 steps."""
    rule = samplers.ddpm(DENOISE, schedule.linear(), variance="large")
    samples = samplers.sample(KEY, rule, GRIDS["50 steps"], (100_000, *SHAPE))
    mean, cov, _ = chain_moments(DATA, LINEAR, GRIDS["50 steps"], "small")
    with pytest.raises(AssertionError):
        hold_moments(samples, mean, cov)


@pytest.mark.parametrize("grid", GRIDS)
def test_slope_of_the_chain_is_exact(grid, x64):
    """d sample / d start is the product of the steps' matrices: no Monte Carlo."""
    rule = samplers.ddpm(DENOISE, schedule.linear(), variance="small")

    def end(start):
        start = start.reshape(1, *SHAPE)
        return samplers.sample(KEY, rule, GRIDS[grid], (1, *SHAPE), start=start).ravel()

    slope = jax.jacfwd(end)(jnp.zeros(4))
    expected = chain_moments(DATA, LINEAR, GRIDS[grid], "small")[2]
    np.testing.assert_allclose(slope, expected, rtol=1e-8, atol=1e-12)


def test_learned_variance_is_used(x64):
    """A learned log-variance equal to the small one draws the same samples."""
    lin = schedule.linear()

    def denoise(x_t, t):
        small = gaussian.reverse_variance("small", lin(t), lin(t - 1))
        small = jnp.maximum(small, 1e-20) * jnp.ones_like(x_t)
        return DENOISE(x_t, t)._replace(log_variance=jnp.log(small))

    grid = np.arange(T, -1, -1)[-101:]
    one, other = (
        samplers.sample(
            KEY, samplers.ddpm(denoise, lin, variance=variance), grid, (4, *SHAPE)
        )
        for variance in ("small", "learned")
    )
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def countdown():
    """A rule in closed form: x falls by t - s a step, memory counts, x0 is 100 t."""

    def init(x, grid):
        return jnp.zeros((), jnp.int32), x

    def step(keys, x_t, memory, t, s):
        count, begin = memory
        x0 = 100.0 * t + count + 0 * x_t
        return samplers.Step(x_t - (t - s), (count + 1, begin), x0)

    return samplers.Sampler(init, step)


def test_loop_and_trajectory_in_closed_form():
    grid = np.array([10, 7, 5, 4, 1, 0])
    start = jnp.arange(6.0).reshape(3, 2)
    rule = countdown()
    x = samplers.sample(KEY, rule, grid, (3, 2), start=start)
    np.testing.assert_array_equal(x, start - 10)
    steps = (4, 0, 2)
    x, path = samplers.trajectory(KEY, rule, grid, (3, 2), steps, start=start)
    np.testing.assert_array_equal(x, start - 10)
    np.testing.assert_array_equal(path.t, [1, 10, 5])
    assert path.x_t.shape == path.x0.shape == (3, 3, 2)
    for k, (step, t) in enumerate(zip(steps, path.t, strict=True)):
        np.testing.assert_array_equal(path.x_t[k], start - (10 - t))
        np.testing.assert_array_equal(path.x0[k], np.full((3, 2), 100 * t + step))


def test_trajectory_of_ancestral_sampling():
    """Its end is that of `sample`; x0 is what the network says of the recorded x_t."""
    rule = samplers.ddpm(DENOISE, schedule.linear())
    grid, shape = GRIDS["50 steps"], (8, *SHAPE)
    x, path = samplers.trajectory(KEY, rule, grid, shape, (0, 10, 49))
    np.testing.assert_allclose(
        x, samplers.sample(KEY, rule, grid, shape), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_array_equal(path.t, [1000, 800, 20])
    for t, x_t, x0 in zip(*path, strict=True):
        np.testing.assert_allclose(DENOISE(x_t, t).x0, x0, rtol=1e-5, atol=1e-6)
    # The last step's mean is the x0 it saw, and it adds no noise.
    np.testing.assert_allclose(x, path.x0[-1], rtol=1e-6, atol=1e-7)


def test_start_is_the_prior():
    rule = samplers.ddpm(DENOISE, schedule.linear())
    grid, shape = np.array([1000, 0]), (50_000, *SHAPE)
    _, path = samplers.trajectory(KEY, rule, grid, shape, (0,))
    hold_moments(path.x_t[0], np.zeros(4), np.eye(4))


def test_example_depends_on_key_and_index_alone():
    """Batches of 1, 7 and 64 hold the same examples, wherever they begin."""
    rule = samplers.ddpm(DENOISE, schedule.linear())
    grid = GRIDS["50 steps"]

    def draw(first, count):
        return samplers.sample(KEY, rule, grid, (count, *SHAPE), first=first)

    whole = draw(0, 64)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(draw(0, 7), whole[:7], **close)
    np.testing.assert_allclose(draw(13, 7), whole[13:20], **close)
    for i in (0, 20, 63):
        np.testing.assert_allclose(draw(i, 1), whole[i : i + 1], **close)
    np.testing.assert_allclose(draw(jnp.asarray(20), 7), whole[20:27], **close)
    assert len(np.unique(whole)) == whole.size
    other = samplers.sample(jax.random.key(1), rule, grid, (64, *SHAPE))
    assert np.all(other != whole)


def test_noise_of_every_step_and_example_is_its_own():
    """Seen through a rule that keeps nothing but its noise."""

    def step(keys, x_t, memory, t, s):
        z = gaussian.normal(keys, x_t.shape, x_t.dtype)
        return samplers.Step(z, memory, z)

    rule = samplers.Sampler(lambda x, grid: (), step)
    grid, shape = np.arange(20, -1, -1), (2000, 2)
    _, path = samplers.trajectory(KEY, rule, grid, shape, range(20))
    noise = np.concatenate([path.x_t, path.x0[-1:]])
    # Of 84,000 float32 normal numbers some coincide by chance, rows of two do not.
    assert len(np.unique(noise.reshape(-1, 2), axis=0)) == 21 * 2000
    flat = noise.transpose(1, 0, 2).reshape(2000, -1).astype(np.float64)
    np.testing.assert_allclose(np.corrcoef(flat.T), np.eye(42), atol=5 / np.sqrt(2000))
    np.testing.assert_allclose(flat.std(0), 1, atol=5 / np.sqrt(2 * 2000))


def test_second_call_compiles_nothing():
    traces = []

    def denoise(x_t, t):
        traces.append(1)
        return DENOISE(x_t, t)

    rule = samplers.ddpm(denoise, schedule.linear())
    for seed, first in ((0, 0), (1, 7), (2, jnp.asarray(9))):
        grid = grids.uniform(schedule.linear(), 10 + 0 * seed)
        samplers.sample(jax.random.key(seed), rule, grid, (3, *SHAPE), first=first)
        # Other times, as many of them, are data and not another program.
        samplers.sample(KEY, rule, np.arange(10, -1, -1), (3, *SHAPE), first=first)
        if not seed:
            compiled = len(traces)
    assert len(traces) == compiled > 0


def test_sampler_built_inside_jit_takes_changing_parameters():
    traces = []

    @jax.jit
    def draw(key, made, scale):
        traces.append(1)
        denoise = gaussian.denoiser(lambda x, t: scale * x, made, "eps", clip=True)
        rule = samplers.ddpm(denoise, made)
        return samplers.sample(key, rule, np.arange(10, -1, -1), (2, *SHAPE))

    one = draw(KEY, schedule.linear(10), 0.1)
    other = draw(KEY, schedule.cosine(10), 0.2)
    assert len(traces) == 1
    assert np.any(one != other)


def test_sharded_over_devices_draws_the_same():
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    rule = samplers.ddpm(DENOISE, schedule.linear())

    def draw(key):
        return samplers.sample(key, rule, GRIDS["50 steps"], (16, *SHAPE))

    sharded = jax.jit(draw, out_shardings=sharding)(KEY)
    assert len(sharded.addressable_shards) == 8
    assert sharded.addressable_shards[3].data.shape == (2, *SHAPE)
    np.testing.assert_allclose(sharded, draw(KEY), rtol=1e-6, atol=1e-6)


def _sample(grid=(2, 1, 0), shape=(2, 3), **options):
    return samplers.sample(KEY, countdown(), np.asarray(grid), shape, **options)


def _down(grid):
    return samplers.sample(KEY, samplers.ddpm(DENOISE, LIN), np.array(grid), (2, 3))


def _trajectory(steps):
    return samplers.trajectory(KEY, countdown(), np.array([2, 1, 0]), (2, 3), steps)


LIN = schedule.linear(10)


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda: samplers.ddpm(DENOISE, LIN, variance="fixedlarge"), "'fixedlarge'"),
        (lambda: samplers.ddim(DENOISE, LIN, eta=1.5), "1.5"),
        (lambda: _down([0, 1, 2]), "array([0, 1, 2])"),
        (lambda: _down([2, 3, 0]), "array([2, 3, 0])"),
        (lambda: _sample([2, 2, 0]), "array([2, 2, 0])"),
        (lambda: _sample([2]), "array([2])"),
        (lambda: _sample([[2, 1]]), "array([[2, 1]])"),
        (lambda: _sample(start=jnp.zeros([3, 2])), "(3, 2)"),
        (lambda: _trajectory([2]), "(2,)"),
        (lambda: _trajectory([-1]), "(-1,)"),
        (lambda: _trajectory([0, 0]), "(0, 0)"),
        (lambda: _trajectory([]), "()"),
    ],
)
def test_bad_input_is_refused(call, got, refuses):
    with refuses(got):
        call()


RULES = {
    "ddpm": lambda denoise, lin: samplers.ddpm(denoise, lin),
    "ddim": lambda denoise, lin: samplers.ddim(denoise, lin),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("grid", "got"), [([2000, 0], "2000"), ([10, -1], "-1")])
def test_times_that_the_schedule_does_not_have_are_refused(rule, grid, got, refuses):
    """Not nan images, an hour later."""
    lin = schedule.linear()
    denoise = gaussian.denoiser(lambda x, t: 0 * x, lin, "eps")
    with refuses(got):
        samplers.sample(KEY, RULES[rule](denoise, lin), np.array(grid), (1, *SHAPE))
