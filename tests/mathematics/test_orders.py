"""Solvers of the flow: their order of convergence."""

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
COUNTS = (64, 128, 256)
DATA, BOUND = mixtures.one(), {"float32": 2e-5, "float64": 1e-11}


def errors(name):
    """Largest distances from the exact flow, from log-SNR -6 to 4, for each schedule.

    All grids on all schedules are drawn along by one program.
    """

    @jax.jit
    def draw(made, grid, start):
        rule = samplers.padded(RULES[name].make(DATA.denoiser(made), made))
        return samplers.sample(KEY, rule, grid, start.shape, start=start)

    spaced = grids.karras if name == "heun" else grids.logsnr
    for made in NUMBERED:
        ends = [float(continuous.time_of(made, jnp.float64(r))) for r in (-6, 4)]
        high, low = map(made, ends)
        start = np.random.default_rng(2).normal(size=(8, *DATA.shape))
        start *= float(high.sigma)
        truth, found = DATA.flow(start, high, low), []
        for count in COUNTS:
            # Without the step from the last to data.
            grid = samplers.pad(spaced(made, count + 1, ends=ends)[:-1], COUNTS[-1] + 1)
            found.append(np.abs(draw(made, jnp.asarray(grid), start) - truth).max())
        yield found


@pytest.mark.parametrize("name", ORDERS)
def test_slope_of_the_error_is_the_order(name, x64):
    for schedule_name, found in zip(MADE, errors(name), strict=True):
        slope = -np.polyfit(np.log(COUNTS), np.log(found), 1)[0]
        assert abs(slope - ORDERS[name]) < 0.2, (schedule_name, found)


def test_predictor_without_corrector_is_ancestral_sampling(x64):
    made = schedule.linear()
    denoise, shape = DATA.denoiser(made), (4, *DATA.shape)
    options = {"predictor": "ancestral", "corrections": 0}
    corrected = langevin.predictor_corrector(denoise, made, **options)
    one, two = (
        samplers.sample(KEY, rule, grids.uniform(made, 20), shape)
        for rule in (corrected, samplers.ddpm(denoise, made))
    )
    np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_keeps_its_digits(k, precision):
    """Against its integral, phi_k(h) = int_0^1 e^{-h (1 - u)} u^{k-1} / (k-1)! du."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u, factorial = 0.5 * (nodes + 1), [1, 1, 2, 6][k - 1]
    for h in (-3.0, -0.5, -1e-4, 0.0, 1e-6, 1e-3, 0.1, 0.9, 1.0, 1.1, 5.0, 20.0):
        truth = 0.5 * weights @ (np.exp(-h * (1 - u)) * u ** (k - 1)) / factorial
        got = solvers.phi(k, jnp.asarray(h, precision))
        np.testing.assert_allclose(got, truth, rtol=BOUND[precision])
