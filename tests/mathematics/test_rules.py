"""All rules x schedules x predictions, on data whose best network is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rules import MADE, RULES, made_for

from diffusion_jax import gaussian, grids, samplers

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
IMAGES = {"shape": (2, 5, 7, 3), "threshold": 0.9}
SHAPES = [*((name, IMAGES) for name in FORMS), ("pc-reverse", {"shape": (1, 3)})]


@pytest.mark.parametrize(("name", "given"), SHAPES)
def test_any_shape_in_bfloat16_clipped(name, given):
    rule, made = RULES[name], made_for(name, "linear")
    shape, threshold = given["shape"], given.get("threshold")

    def net(x, t):
        return tiny(x.astype(jnp.bfloat16), t.astype(jnp.bfloat16))

    clip = {"clip": threshold is None, "threshold": threshold}
    sampler = rule.make(gaussian.denoiser(net, made, "eps", **clip), made)
    grid = rule.grid(made, 6)
    end, seen = samplers.trajectory(KEY, sampler, grid, shape, [0, len(grid) - 2])
    assert (end.shape, end.dtype) == (shape, jnp.float32)
    assert seen.x_t.shape == seen.x0.shape == (2, *shape)
    assert np.all(np.isfinite(end))
    assert np.abs(seen.x0).max() <= 1 + 1e-6
    # The last step of the other is no mean of x0.
    assert name == "pc-reverse" or np.abs(end).max() <= 1 + 1e-6


EVALUATIONS = {
    # That of "ode" depends on its tolerance.
    **{name: 5 for name in RULES if name != "ode"},
    **dict.fromkeys(("heun", "edm", "dpm_solver_pp-2S"), 2 * 5 - 1),
    **dict.fromkeys(("pc-reverse", "pc-ancestral"), 2 * 5 - 1),
    "langevin": 30 * 5 + 1,
}


def test_evaluations_are_counted():
    lin = MADE["linear"]
    given = gaussian.denoiser(tiny, lin, "v"), grids.uniform(lin, 5), (3, 2)
    found = {
        name: samplers.count_evaluations(
            partial(RULES[name].make, schedule=lin), *given
        )
        for name in EVALUATIONS
    }
    assert found == EVALUATIONS


def test_a_padded_grid_changes_nothing():
    """Of what is drawn by a rule with noise; what a rule remembers, its order tells."""
    made, shape = MADE["linear"], (8, 2, 2, 1)
    rule = samplers.ddpm(gaussian.denoiser(tiny, made, "v"), made)
    grid = grids.uniform(made, 6)
    plain = samplers.sample(KEY, rule, grid, shape)
    rule, grid = samplers.padded(rule), samplers.pad(grid, 20)
    filled = jax.jit(lambda grid: samplers.sample(KEY, rule, grid, shape))(grid)
    np.testing.assert_allclose(filled, plain, rtol=1e-5, atol=1e-6)


def test_grids_that_cannot_be_walked_are_refused(refuses):
    lin, denoise = MADE["linear"], gaussian.denoiser(tiny, MADE["interpolated"], "v")
    for rule in RULES.values():
        for grid, got in (([2000, 0], "2000"), ([5, 7, 0], "array([5, 7, 0])")):
            with refuses(got):
                samplers.sample(KEY, rule.make(denoise, lin), np.array(grid), (1, 3))
