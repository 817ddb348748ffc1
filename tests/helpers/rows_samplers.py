"""Rows of `test_transforms`: sampling rules, edits and likelihoods."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transforms import LINEAR, SHAPE, Row, T, denoiser, each

from diffusion_jax import (
    analytic,
    continuous,
    editing,
    gaussian,
    grids,
    langevin,
    likelihood,
    ode,
    samplers,
    schedule,
    solvers,
)

# Not functions of arrays: they raise and do no more, or are of NumPy, or count.
NOT_OF_ARRAYS = {
    "likelihood.rate_distortion",
    "samplers.check_grid",
    "samplers.count_evaluations",
    "samplers.counted",
    "samplers.pad",
}
VP, KEY = continuous.vp(), jax.random.key(3)
VE = continuous.ve(sigma_min=0.05, sigma_max=2.0)
SOLVE = {"rtol": 1e-8, "atol": 1e-8}
FOUR = grids.uniform(LINEAR, 4)


def _rule(variance: str) -> samplers.Sampler:
    denoise = denoiser(variance=variance)
    if variance == "analytic":
        denoise = analytic.attach(denoise, np.linspace(0, 0.5, T + 1))
    return samplers.ddpm(denoise, LINEAR, variance=variance)


def _ancestral(variance: str, keys: jax.Array, x: jax.Array) -> Any:
    new = _rule(variance).step(keys, x, (), jnp.asarray(9), jnp.asarray(7))
    return new.x, new.x0


def _two_steps(make: Callable, **options: Any) -> Callable:
    """Two steps of a rule, so that what it remembers matters."""

    def fn(keys: jax.Array, x: jax.Array) -> Any:
        rule = make(denoiser(threshold=0.9), LINEAR, **options)
        memory = rule.init(x, np.array([19, 9, 7]))
        for t, s in ((19, 9), (9, 7)):
            new = rule.step(keys, x, memory, jnp.asarray(t), jnp.asarray(s))
            x, memory = new.x, new.memory
        return new.x, new.x0

    return fn


MULTISTEP = {
    order: _two_steps(solvers.dpm_solver_pp, order=order)
    for order in ("2S", "3M", "SDE")
}
RULES = {
    "samplers.ddim": _two_steps(samplers.ddim, eta=0.5),
    "solvers.heun": _two_steps(solvers.heun),
    "solvers.edm": _two_steps(solvers.edm, churn=1.0),
    "solvers.dpm_solver_pp solvers.phi": lambda keys, x: {
        order: rule(keys, x) for order, rule in MULTISTEP.items()
    },
    "solvers.unipc": _two_steps(solvers.unipc, order=3),
    "langevin.predictor_corrector": _two_steps(langevin.predictor_corrector),
    "langevin.langevin": _two_steps(langevin.langevin, moves=2),
}


def _padded(keys: jax.Array, x: jax.Array) -> Any:
    rule = samplers.padded(_rule("small"))
    grid = jnp.asarray(samplers.pad(grids.uniform(LINEAR, 3), 6))
    new = rule.step(keys, x, (), grid[0], grid[1])
    return rule.step(keys, new.x, (), grid[4], grid[5]).x


def _sample(x: jax.Array, index: jax.Array) -> Any:
    options = {"start": x, "first": index[0]}
    end, path = samplers.trajectory(
        KEY, _rule("small"), FOUR, x.shape, (0, 3), **options
    )
    whole = samplers.sample(KEY, _rule("large"), FOUR, x.shape, **options)
    return whole, end, *path.x_t, *path.x0


def _ode(keys: jax.Array, x: jax.Array) -> Any:
    rule = ode.ode(denoiser(made=VP), VP, **SOLVE)
    new = rule.step(keys, x, (), jnp.asarray(0.6), jnp.asarray(0.3))
    return new.x, new.x0


def _ode_bits(keys: jax.Array, x0: jax.Array) -> Any:
    options = {"start": 0.2, "probes": 2, **SOLVE}
    bits = likelihood.ode_bits_per_dim(keys, denoiser(made=VP), VP, x0, **options)
    return bits.total, bits.density.prior, bits.density.divergence


def _bounds(keys: jax.Array, x0: jax.Array) -> Any:
    made = schedule.linear(4)
    bits = likelihood.bound(keys, denoiser(made=made), made, x0, chunk=3)
    options = {"draws": 3, "chunk": 2}
    real = likelihood.continuous_bound(keys, denoiser(made=VE), VE, x0, **options)
    return bits.total, bits.prior, bits.terms.T, bits.mse.T, real


def _edits(keys: jax.Array, x0: jax.Array, x: jax.Array, u: jax.Array) -> Any:
    rule = _rule("small")
    return {
        "vary": editing.vary(keys, rule, LINEAR, FOUR, x0, 12),
        "interpolate": editing.interpolate(
            keys, rule, LINEAR, FOUR, x0, x, 12, [0.2, 0.7]
        ),
        "encode": editing.encode(samplers.ddim(denoiser(), LINEAR), FOUR, x0),
        "slerp": editing.slerp(x, x0, u),
    }


def _inpaint(keys: jax.Array, x0: jax.Array) -> Any:
    mask = np.arange(4).reshape(1, *SHAPE) < 2
    grid = editing.repaint_grid(FOUR, 2, 2)
    painted = editing.inpaint(_rule("small"), LINEAR, x0, mask)
    colours = editing.colorize(_rule("small"), LINEAR, x0)
    return (
        samplers.sample(keys, painted, grid, x0.shape),
        samplers.sample(keys, colours, FOUR, (len(x0), 2, 2, 3)),
    )


ROWS = [
    Row("samplers.ddpm", each(_ancestral, gaussian.VARIANCES), "keys x"),
    *(Row(name, rule, "keys x") for name, rule in RULES.items()),
    Row("samplers.padded", _padded, "keys x"),
    Row(
        "samplers.sample samplers.trajectory samplers.forgetful grids.uniform",
        _sample,
        "x index",
    ),
    # The gradient of a solve is that of the next row.
    Row("ode.ode", _ode, "keys x", check_vma=False, slopes=False),
    Row(
        "likelihood.ode_bits_per_dim likelihood.log_density ode.follow ode.integrate",
        _ode_bits,
        "keys x0",
        check_vma=False,
    ),
    Row("likelihood.bound likelihood.continuous_bound", _bounds, "keys x0"),
    Row(
        "editing.vary editing.below editing.interpolate editing.encode editing.slerp",
        _edits,
        "keys x0 x u",
    ),
    Row(
        "editing.inpaint editing.constrain editing.repaint_grid editing.colorize",
        _inpaint,
        "keys x0",
    ),
]
