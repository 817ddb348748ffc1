"""Solvers of the flow: their order of convergence, and DDIM as their limit."""

import functools

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
from continuous_oracles import numbered
from rules import RULES

from diffusion_jax import (
    continuous,
    gaussian,
    grids,
    langevin,
    samplers,
    schedule,
    solvers,
)

KEY = jax.random.key(0)
ORDERS = {name: rule.order for name, rule in RULES.items() if rule.order}
FLOWS = ("ddim", "heun", "dpm_solver_pp-2S", "dpm_solver_pp-3M", "unipc-3")
MADE = {
    "linear": continuous.interpolate(schedule.linear()),
    "vp": continuous.vp(),
    "sub_vp": continuous.sub_vp(),
    "ve": continuous.ve(sigma_max=20.0),
}
NUMBERED = numbered(MADE.values())
COUNTS = (32, 64, 128, 256)
DATA = mixtures.one()


@functools.cache
def draw(name):
    """Draws along any grid on any schedule of MADE, as one program."""

    @jax.jit
    def run(made, grid, start):
        rule = samplers.padded(RULES[name].make(DATA.denoiser(made), made))
        return samplers.sample(KEY, rule, grid, start.shape, start=start)

    return run


def errors(name, made):
    """Largest distance from the exact flow, from log-SNR -6 to 4, by steps taken."""
    first, last = (float(continuous.time_of(made, jnp.float64(r))) for r in (-6, 4))
    high, low = made(first), made(last)
    start = float(high.sigma) * np.random.default_rng(2).normal(size=(8, *DATA.shape))
    truth = DATA.flow(start, high, low)
    spaced = grids.karras if name == "heun" else grids.logsnr
    found = []
    for count in COUNTS:
        # Without the step from `last` to data.
        grid = spaced(made, count + 1, ends=(first, last))[:-1]
        end = draw(name)(made, jnp.asarray(samplers.pad(grid, COUNTS[-1] + 1)), start)
        found.append(np.abs(end - truth).max())
    return np.array(found)


@pytest.mark.parametrize("name", ORDERS)
def test_slope_of_the_error_is_the_order(name, x64):
    for schedule_name, made in zip(MADE, NUMBERED, strict=True):
        found = errors(name, made)
        slope = -np.polyfit(np.log(COUNTS[1:]), np.log(found[1:]), 1)[0]
        assert abs(slope - ORDERS[name]) < 0.2, (schedule_name, found)


def test_constant_x0_is_drawn_as_by_ddim(x64):
    """Where x0 as the network sees it stays, the flow is a line and all walk it."""
    made = MADE["linear"]
    target = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 2, 2, 1)))
    denoise = gaussian.denoiser(lambda x, t: target + 0 * x, made, "x0")
    grid = grids.karras(made, 8)[:-2]
    start = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 2, 1)))
    ends = {
        name: samplers.sample(
            KEY, RULES[name].make(denoise, made), grid, start.shape, start=start
        )
        for name in FLOWS
    }
    for name, end in ends.items():
        np.testing.assert_allclose(end, ends["ddim"], atol=1e-9, err_msg=name)


def hold_same(rules, made, grid):
    """Both rules draw the same samples."""
    denoise, shape = DATA.denoiser(made), (4, *DATA.shape)
    one, two = (samplers.sample(KEY, m(denoise, made), grid, shape) for m in rules)
    np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", FLOWS[1:])
def test_one_step_is_that_of_ddim(name, x64):
    made = schedule.linear()
    hold_same((RULES[name].make, samplers.ddim), made, grids.uniform(made, 1))


def test_predictor_without_corrector_is_ancestral_sampling(x64):
    def alone(denoise, made):
        return langevin.predictor_corrector(
            denoise, made, predictor="ancestral", corrections=0
        )

    made = schedule.linear()
    hold_same((alone, samplers.ddpm), made, grids.uniform(made, 20))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_keeps_its_digits(k, precision):
    """Against its integral, phi_k(h) = int_0^1 e^{-h (1 - u)} u^{k-1} / (k-1)! du."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u, factorial = 0.5 * (nodes + 1), [1, 1, 2, 6][k - 1]
    for h in (-3.0, -0.5, -1e-4, 0.0, 1e-6, 1e-3, 0.1, 0.9, 1.0, 1.1, 5.0, 20.0):
        truth = 0.5 * weights @ (np.exp(-h * (1 - u)) * u ** (k - 1)) / factorial
        got = solvers.phi(k, jnp.asarray(h, jnp.result_type(float)))
        np.testing.assert_allclose(
            got, truth, rtol=2e-5 if precision == "float32" else 1e-11
        )


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda d, s: solvers.dpm_solver_pp(d, s, order="4M"), "'4M'"),
        (lambda d, s: solvers.unipc(d, s, order=4), "4"),
        (lambda d, s: solvers.edm(d, s, churn=-1.0), "-1.0"),
        (lambda d, s: solvers.edm(d, s, churn=1.0, churn_range=(2.0, 1.0)), "2.0, 1.0"),
    ],
)
def test_bad_options_are_refused(call, got, refuses):
    made = schedule.linear()
    with refuses(got):
        call(gaussian.denoiser(lambda x, t: x, made, "eps"), made)
