"""The density of the probability flow against that of Gaussian data."""

from functools import partial

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
import scipy.stats
from continuous_oracles import SDES

from diffusion_jax import continuous, gaussian, likelihood, samplers, schedule

DATA = mixtures.one()
KEY = jax.random.key(0)
MADE = {name: truth.schedule for name, truth in SDES.items()}
MADE["linear"] = schedule.linear()
REAL = {**MADE, "linear": continuous.interpolate(MADE["linear"])}
VP = MADE["vp"]


def density(name, x, **options):
    denoise = DATA.denoiser(REAL[name])
    solve = partial(likelihood.log_density, KEY, denoise, MADE[name], **options)
    return jax.jit(solve)(x)


def images(count=4):
    """On the grid of 256 values, where the data are likely."""
    values = np.clip(np.rint(127.5 * (DATA.draw(count) + 1)), 0, 255)
    return jnp.asarray(values / 127.5 - 1, float)


def truth_of(name, x, start):
    """Log density of the flow from the prior N(0, std^2 I), and of the data, nats, [B].

    The prior is not quite the marginal where the noising ends: their densities differ
    by about alpha_T x_T . mean, which is 0.01 nats.
    """
    level, end = (REAL[name](t) for t in (start, continuous.last_time(REAL[name])))
    far, data = DATA.flow(x, level, end), DATA.logp(x, level)
    std = 50.0 if name == "ve" else 1.0
    prior = scipy.stats.norm.logpdf(far, 0, std).reshape(len(x), -1).sum(axis=1)
    return data + prior - DATA.logp(far, end), data


# That of vp is in the next test.
@pytest.mark.parametrize("name", ["ve", "linear"])
def test_density_of_gaussian_data(name, x64):
    x = images()
    found = density(name, x, trace="exact")
    model, data = truth_of(name, x, 1.0 if name == "linear" else 1e-5)
    np.testing.assert_allclose(found.logp, model, atol=1e-3)
    np.testing.assert_allclose(found.logp, data, atol=0.03)
    np.testing.assert_allclose(found.logp, found.prior + found.divergence)
    assert np.all((found.evaluations > 60) & (found.evaluations < 400))


def test_bits_are_those_of_the_dequantised_images(x64):
    """-log2 of the exact density at them, on the scale of 0..255."""
    x0, denoise = images(), DATA.denoiser(VP)
    solve = partial(likelihood.ode_bits_per_dim, KEY, denoise, VP, trace="exact")
    bits = jax.jit(solve)(x0)
    # The documented noise: uniform, from the key of the image folded with 0.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(4))
    shift = np.stack(
        [jax.random.uniform(jax.random.fold_in(k, 0), x0.shape[1:]) for k in keys]
    )
    values = np.rint(127.5 * (np.asarray(x0) + 1)) + shift - 0.5
    logp, data = truth_of("vp", values / 127.5 - 1, 1e-5)
    # p(value) = p(x) / 127.5 for each of four dimensions.
    exact = -(logp - 4 * np.log(127.5)) / (4 * np.log(2))
    np.testing.assert_allclose(bits.total, exact, atol=1e-3)
    np.testing.assert_allclose(bits.density.logp, logp, atol=1e-3)
    np.testing.assert_allclose(logp, data, atol=0.03)
    assert 3 < exact.mean() < 8


def test_probes_are_unbiased_and_the_same_for_the_whole_solve(x64):
    """Their mean is the exact trace; that of a Gaussian probe varies more."""
    x = jnp.broadcast_to(images(1), (512, 2, 2, 1))
    exact = float(truth_of("vp", x[:1], 1e-5)[0][0])
    spread = {}
    for trace in ("rademacher", "gaussian"):
        found = np.asarray(density("vp", x, trace=trace, rtol=1e-4, atol=1e-4).logp)
        error = found.std() / np.sqrt(len(found))
        assert abs(found.mean() - exact) < 4 * error + 2e-3, trace
        spread[trace] = found.std()
    assert 0.01 < spread["rademacher"] < spread["gaussian"]


def test_rademacher_probes_of_a_diagonal_jacobian_are_exact(x64):
    """v_i^2 is 1, and nothing else is in v . J v, of which the mean is taken."""
    denoise = gaussian.denoiser(lambda x, t: jnp.tanh(x), VP, "eps")

    def logp(x, trace):
        solve = partial(likelihood.log_density, KEY, denoise, VP, probes=3, trace=trace)
        return jax.jit(solve)(x).logp

    x = images()
    np.testing.assert_allclose(logp(x, "rademacher"), logp(x, "exact"), atol=1e-4)


def test_value_and_divergence_take_one_pass():
    """As many calls of the network as evaluations, whatever the number of probes."""
    calls = []
    denoise = samplers.counted(DATA.denoiser(VP), calls)
    solve = partial(likelihood.log_density, KEY, denoise, VP, probes=5, rtol=1e-3)
    evaluations = int(jax.jit(solve)(images(1)).evaluations[0])
    jax.effects_barrier()
    assert len(calls) == evaluations
