"""All rules x schedules x predictions, on data whose best network is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rules import MADE, RULES, made_for

from diffusion_jax import gaussian, grids, samplers
from diffusion_jax.training import parallel

KEY = jax.random.key(0)


def tiny(x, t):
    """A network of no use, of any shape.

    It is slow in t: of faster waves the steps of an adaptive rule would meet a few, and
    which ones would depend on rounding.
    """
    return jnp.tanh(x + 0.1 * jnp.cos(t / 300).reshape(-1, *[1] * (x.ndim - 1)))


# One form of each function, that which remembers most.
FORMS = ("ddpm-large", "ddim-half", "heun", "edm", "dpm_solver_pp-3M", "unipc-3")
FORMS += ("pc-reverse", "langevin", "ode")
SHAPES = [
    *((name, (2, 5, 7, 3), {"threshold": 0.9}) for name in FORMS),
    ("pc-reverse", (1, 3), {"clip": True}),
]


@pytest.mark.parametrize(("name", "shape", "options"), SHAPES)
def test_any_shape_in_bfloat16_clipped(name, shape, options):
    rule, made = RULES[name], made_for(name, "linear")

    def net(x, t):
        return tiny(x.astype(jnp.bfloat16), t.astype(jnp.bfloat16))

    denoise = gaussian.denoiser(net, made, "eps", **options)
    grid = rule.grid(made, 6)
    sampler, last = rule.make(denoise, made), len(grid) - 2
    end, seen = samplers.trajectory(KEY, sampler, grid, shape, [0, last])
    assert (end.shape, end.dtype) == (shape, jnp.float32)
    assert seen.x_t.shape == seen.x0.shape == (2, *shape)
    assert np.abs(seen.x0).max() <= 1 + 1e-6
    assert np.all(np.isfinite(end))
    if name != "pc-reverse":  # whose last step is no mean of x0
        assert np.abs(end).max() <= 1 + 1e-6


@functools.cache
def few(name):
    """Eight samples by a rule in six steps; and what they were drawn with."""
    rule, made = RULES[name], made_for(name, "linear")
    sampler = rule.make(gaussian.denoiser(tiny, made, "v"), made)
    grid = rule.grid(made, 6)
    return sampler, grid, samplers.sample(KEY, sampler, grid, (8, 2, 2, 1))


def test_many_devices_draw_what_one_draws():
    """By the rule that takes norms."""
    sampler, grid, one = few("pc-reverse")
    out = NamedSharding(parallel.make_mesh(), PartitionSpec("data"))
    many = jax.jit(
        lambda key: samplers.sample(key, sampler, grid, (8, 2, 2, 1)), out_shardings=out
    )(KEY)
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)


TWICE = ("heun", "edm", "dpm_solver_pp-2S", "pc-reverse", "pc-ancestral")
EVALUATIONS = {
    # That of "ode" depends on its tolerance.
    **{name: 5 for name in RULES if name != "ode"},
    **dict.fromkeys(TWICE, 2 * 5 - 1),
    "langevin": 30 * 5 + 1,
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_are_counted(name):
    rule, lin = RULES[name], MADE["linear"]
    denoise = gaussian.denoiser(tiny, lin, "v")
    count = samplers.count_evaluations(
        lambda counted: rule.make(counted, lin), denoise, grids.uniform(lin, 5), (3, 2)
    )
    assert count == EVALUATIONS[name]


@pytest.mark.parametrize("name", ["ddpm-large", "unipc-3"])
def test_a_padded_grid_changes_nothing(name):
    sampler, grid, plain = few(name)
    filled = jax.jit(
        lambda grid: samplers.sample(KEY, samplers.padded(sampler), grid, plain.shape)
    )(jnp.asarray(samplers.pad(grid, 20)))
    np.testing.assert_allclose(filled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_grids_that_cannot_be_walked_are_refused(name, refuses):
    rule, lin = RULES[name], MADE["linear"]
    sampler = rule.make(gaussian.denoiser(tiny, MADE["interpolated"], "v"), lin)
    with refuses("2000"):
        samplers.sample(KEY, sampler, np.array([2000, 0]), (1, 3))
    with refuses("array([5, 7, 0])"):
        samplers.sample(KEY, sampler, np.array([5, 7, 0]), (1, 3))
