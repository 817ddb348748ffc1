"""The loop of all rules, mostly along the chain of ancestral sampling."""

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
from oracles import T

from diffusion_jax import gaussian, grids, samplers, schedule

SHAPE = (2, 2, 1)
KEY = jax.random.key(0)
DATA, LIN = mixtures.one(), schedule.linear()
DENOISE = DATA.denoiser(LIN)
EVEN = np.arange(T, -1, -20)


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
    grid, start = np.array([10, 7, 5, 4, 1, 0]), jnp.arange(6.0).reshape(3, 2)
    steps, rule = (4, 0, 2), countdown()
    x, path = samplers.trajectory(KEY, rule, grid, (3, 2), steps, start=start)
    np.testing.assert_array_equal(x, start - 10)
    x = samplers.sample(KEY, rule, grid, (3, 2), start=start)
    np.testing.assert_array_equal(x, start - 10)
    t = np.array([1, 10, 5])
    np.testing.assert_array_equal(path.t, t)
    x_t = np.asarray(start) - (10 - t)[:, None, None]
    np.testing.assert_array_equal(path.x_t, x_t)
    x0 = np.broadcast_to((100 * t + steps)[:, None, None], (3, 3, 2))
    np.testing.assert_array_equal(path.x0, x0)


def test_example_depends_on_key_and_index_alone():
    """Batches of 1, 7 and 64 hold the same examples, wherever they begin."""
    rule = samplers.ddpm(DENOISE, LIN)

    def draw(first, count, key=KEY):
        return samplers.sample(key, rule, EVEN, (count, *SHAPE), first=first)

    whole = draw(0, 64)
    for first, count in ((0, 7), (13, 7), (63, 1), (jnp.asarray(20), 7)):
        part = whole[first : first + count]
        np.testing.assert_allclose(draw(first, count), part, rtol=1e-5, atol=1e-6)
    assert len(np.unique(whole)) == whole.size
    assert np.all(draw(0, 64, jax.random.key(1)) != whole)


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

    rule = samplers.ddpm(denoise, LIN)
    for seed, first in ((0, 0), (1, 7), (2, jnp.asarray(9))):
        grid = grids.uniform(LIN, 10)
        samplers.sample(jax.random.key(seed), rule, grid, (3, *SHAPE), first=first)
        if not seed:
            compiled = len(traces)
    assert len(traces) == compiled > 0
