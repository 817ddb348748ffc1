"""All rules draw data whose best network is known, under all schedules."""

import functools

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
from rules import RULES, grid_of, made_for

from diffusion_jax import samplers

# Much is computed here, with few programs.
pytestmark = pytest.mark.optimised

KEY = jax.random.key(0)
# const has much noise left in its first step, where every rule ends in the mean of x0:
# that takes so much of the variance away.
LAST_STEP = {"const": 0.1}
SLOW = {"pc-reverse": 1000, "pc-ancestral": 1000, "langevin": 2000}
"""How many samples are drawn, where that takes long."""


@functools.cache
def program(name):
    """Draws by a rule; schedule and grid are arguments, so most compile together."""
    rule = RULES[name]
    data = mixtures.two(rule.shape)
    count = SLOW.get(name, 5000)

    @jax.jit
    def draw(made, grid, std):
        sampler = samplers.padded(rule.make(data.denoiser(made), made))
        shape = (count, *data.shape)
        return samplers.sample(KEY, sampler, grid, shape, start_std=std)

    return data, draw


def drawn(name, schedule_name):
    data, draw = program(name)
    grid, made = grid_of(name, schedule_name), made_for(name, schedule_name)
    length = RULES[name].steps + 2 if len(grid) > 3 else 3
    level = made(grid[0])
    std = np.sqrt(level.alpha**2 + level.sigma**2)
    x = draw(made, jnp.asarray(samplers.pad(grid, length)), std)
    return data, np.asarray(x, np.float64)


# A rule sees levels, not where they are from: few see more than one schedule. What the
# rules left out draw is known from their order and from their peers. jsd ends in pure
# noise, from which steps in sigma / alpha are endless.
PEERED = ("ddim", "ddim-half", "dpm_solver_pp-1", "dpm_solver_pp-3M", "unipc-1")
SCHEDULES = {
    **dict.fromkeys((*PEERED, "unipc-3", "ode"), ""),
    "ddpm-large": "ve",
    "ddim-full": "const jsd sub_vp sigmoid",
    "heun": "jsd",
    "edm": "jsd ve",
    "dpm_solver_pp-2S": "jsd",
    "dpm_solver_pp-2M": "linear cosine jsd ve interpolated",
    "unipc-2": "linear jsd",
    "pc-ancestral": "jsd",
    "langevin": "ve",
}
PAIRS = [(name, one) for name in RULES for one in SCHEDULES.get(name, "linear").split()]


@pytest.mark.parametrize(("name", "schedule_name"), PAIRS)
def test_samples_have_the_weights_means_and_covariance_of_a_mixture(
    name, schedule_name
):
    """Five standard errors, and some percent for the size of the steps."""
    data, x = drawn(name, schedule_name)
    error = 5 * np.sqrt(data.weights * (1 - data.weights) / len(x))
    np.testing.assert_array_less(np.abs(data.shares(x) - data.weights), error)
    flat, size = x.reshape(len(x), -1), np.sqrt(np.diag(data.cov))
    error = np.abs(flat.mean(axis=0) - data.mean) / size
    assert error.max() < 5 / np.sqrt(len(x)) + 0.02
    error = np.abs(np.cov(flat.T) - data.cov) - RULES[name].excess * np.abs(data.cov)
    more = 0.04 + LAST_STEP.get(schedule_name, 0)
    assert (error / np.outer(size, size)).max() < 5 * np.sqrt(2 / len(x)) + more
