"""Every sampling rule, for the tests that hold all of them to the same truths.

A new rule is a row here and is held to all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from oracles import SCHEDULES

from diffusion_jax import continuous, grids, langevin, ode, samplers, schedule, solvers
from diffusion_jax.schedule import is_discrete


def _stretch(made, steps):
    """All the way in one step, but for the last one."""
    last = continuous.last_time(made)
    return np.array([last, 1, 0] if last > 1 else [1.0, 1e-3, 0.0])


class Rule(NamedTuple):
    """A rule and how it is to be used."""

    make: Callable
    """From (denoise, schedule) to a Sampler."""
    steps: int = 60
    """Enough for the samples to be the data's but for some percent."""
    grid: Callable = grids.quadratic
    order: int | None = None
    """Of convergence to the flow, where it converges to the flow at a fixed rate."""
    excess: float = 0.0
    """Share by which its variance is too large, by its own mathematics."""
    shape: tuple[int, ...] = (2, 2, 1)
    """Images of a size that it is made for."""


def _pp(order):
    return partial(solvers.dpm_solver_pp, order=order)


def _pc(predictor):
    return partial(langevin.predictor_corrector, predictor=predictor, snr=0.1)


_langevin = partial(langevin.langevin, moves=30, step_size=0.1)


RULES = {
    "ddpm-small": Rule(partial(samplers.ddpm, variance="small"), 250),
    "ddpm-large": Rule(samplers.ddpm, 250),
    "ddim": Rule(samplers.ddim, 250, order=1),
    "ddim-half": Rule(partial(samplers.ddim, eta=0.5), 250),
    "ddim-full": Rule(partial(samplers.ddim, eta=1.0), 250),
    "heun": Rule(solvers.heun, grid=grids.karras, order=2),
    "edm": Rule(partial(solvers.edm, churn=20.0), 120, grid=grids.karras),
    "dpm_solver_pp-1": Rule(_pp("1"), 250, order=1),
    "dpm_solver_pp-2S": Rule(_pp("2S"), grid=grids.logsnr, order=2),
    "dpm_solver_pp-2M": Rule(solvers.dpm_solver_pp, grid=grids.logsnr, order=2),
    "dpm_solver_pp-3M": Rule(_pp("3M"), grid=grids.logsnr, order=3),
    "dpm_solver_pp-SDE": Rule(_pp("SDE"), grid=grids.logsnr),
    # The corrector raises the order of the predictor by one.
    "unipc-1": Rule(partial(solvers.unipc, order=1), grid=grids.logsnr, order=2),
    "unipc-2": Rule(solvers.unipc, grid=grids.logsnr, order=3),
    "unipc-3": Rule(partial(solvers.unipc, order=3), grid=grids.logsnr, order=4),
    "pc-reverse": Rule(_pc("reverse_diffusion"), 300, shape=(8, 8, 1)),
    "pc-ancestral": Rule(_pc("ancestral"), 250, shape=(8, 8, 1)),
    "langevin": Rule(_langevin, 100, grid=grids.logsnr, excess=0.026),
    "ode": Rule(partial(ode.ode, rtol=1e-4, atol=1e-4), grid=_stretch),
}

MADE = {
    **{name: SCHEDULES[name]() for name in SCHEDULES if name != "from_betas"},
    "vp": continuous.vp(),
    "sub_vp": continuous.sub_vp(),
    "ve": continuous.ve(sigma_max=20.0),
    "interpolated": continuous.interpolate(schedule.linear()),
}
# cosine ends in more noise than a step in sigma / alpha can be taken from; and jsd in
# pure noise, from which it is taken as one of first order.
FIRST = {"cosine": 990}


def made_for(name, schedule_name):
    """The schedule, in real time for the rule that needs it."""
    made = MADE[schedule_name]
    return continuous.interpolate(made) if name == "ode" and is_discrete(made) else made


def grid_of(name, schedule_name):
    """The rule's grid, from a time at which there is some signal."""
    rule, made = RULES[name], made_for(name, schedule_name)
    grid = rule.grid(made, rule.steps)
    most = FIRST.get(schedule_name, continuous.last_time(made))
    return np.append(most, grid[grid < most]).astype(grid.dtype)
