"""Solvers of the flow: their order of convergence."""

import functools

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
from continuous_oracles import numbered
from rules import RULES

from diffusion_jax import continuous, grids, langevin, samplers, schedule, solvers

KEY = jax.random.key(0)
ORDERS = {name: rule.order for name, rule in RULES.items() if rule.order}
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


def test_predictor_without_corrector_is_ancestral_sampling(x64):
    made = schedule.linear()
    denoise, shape = DATA.denoiser(made), (4, *DATA.shape)
    options = {"predictor": "ancestral", "corrections": 0}
    rules = (
        langevin.predictor_corrector(denoise, made, **options),
        samplers.ddpm(denoise, made),
    )
    one, two = (samplers.sample(KEY, r, grids.uniform(made, 20), shape) for r in rules)
    np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-10)


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
