"""What is handed to a pure function in another type: right, or refused in three parts.

Everything is computed in the default floating-point type, and one key draws the same
noise for images of every type. Whole numbers are values of 0 to 255 that nobody scaled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transforms import network

from diffusion_jax import (
    analytic,
    continuous,
    editing,
    gaussian,
    grids,
    guidance,
    langevin,
    likelihood,
    losses,
    ode,
    samplers,
    schedule,
    solvers,
)
from diffusion_jax.gaussian import Prediction

LIN, VP = schedule.linear(20), continuous.vp()
KEY, KEYS = jax.random.key(3), jax.random.split(jax.random.key(4), 2)
X = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 2, 2, 1))
T = np.array([5, 13])


def denoiser(made=LIN):
    return gaussian.denoiser(network, made, "v", clip=made is LIN)


def step(make, **options):
    """One step of a rule, as by hand."""

    def call(x):
        rule = make(denoiser(), LIN, **options)
        memory = rule.init(x, np.array([13, 5, 0]))
        return rule.step(KEYS, x, memory, jnp.asarray(13), jnp.asarray(5)).x

    return call


def rule():
    return samplers.ddim(denoiser(), LIN)


def padded(denoise, made):
    return samplers.padded(samplers.ddpm(denoise, made))


GRID = grids.uniform(LIN, 4)
BORDERS = {
    "q_sample": lambda x: gaussian.q_sample(x, x, LIN(T)),
    "predict": lambda x: gaussian.predict("v", x, x, LIN(T)),
    "target": lambda x: gaussian.target("velocity", x, x, LIN(T)),
    "p_sample": lambda x: gaussian.p_sample(
        KEYS, Prediction(x, x), x, LIN(T), LIN(T - 1)
    ),
    "denoiser": lambda x: denoiser()(x, T)[:2],
    "ddpm": step(samplers.ddpm),
    "ddim": step(samplers.ddim, eta=0.5),
    "edm": step(solvers.edm, churn=1.0),
    "3M": step(solvers.dpm_solver_pp, order="3M"),
    "unipc": step(solvers.unipc),
    "corrector": step(langevin.predictor_corrector),
    "langevin": step(langevin.langevin, moves=2),
    "padded": step(padded),
    "ode": lambda x: (
        ode.ode(denoiser(VP), VP).step(KEYS, x, (), np.array(0.6), np.array(0.3)).x
    ),
    "sample": lambda x: samplers.sample(KEY, rule(), GRID, x.shape, start=x),
    "vary": lambda x: editing.vary(KEY, rule(), LIN, GRID, x, 10),
    "interpolate": lambda x: editing.interpolate(
        KEY, rule(), LIN, GRID, x, x, 10, np.array([0.5])
    ),
    "encode": lambda x: editing.encode(rule(), GRID, x),
    "slerp": lambda x: editing.slerp(x, x[::-1], 0.3),
    "colorize": lambda x: samplers.sample(
        KEY, editing.colorize(rule(), LIN, x), GRID, x.shape
    ),
    "x0_variance": lambda x: analytic.x0_variance(KEY, denoiser(), LIN, x),
    "classifier": lambda x: guidance.classifier(
        denoiser(), lambda x, t: x.sum((1, 2, 3)), LIN, scale=2.0
    )(x, T)[:2],
    "classifier_free": lambda x: guidance.classifier_free(
        lambda x, t, label: network(x, t) + label.reshape(-1, 1, 1, 1),
        1.0,
        0.0,
        scale=2,
    )(x, T),
    "simple": lambda x: losses.simple(Prediction(x, x), 0.5 * x, x, LIN(T), space="v"),
    "weighted": lambda x: losses.weighted(
        Prediction(x[::-1], x[::-1]), x, LIN(T), jax.nn.sigmoid
    ),
    "diffusion": lambda x: losses.diffusion(
        Prediction(x[::-1], x[::-1]), x, np.ones(2, np.float32)
    ),
    "prior": lambda x: losses.prior(x, LIN(20)),
}
# A solve takes long to compile: its numbers are those of "ode" and "ode_bits".
SOLVED = {
    "log_density": lambda x: likelihood.log_density(KEY, denoiser(VP), VP, x).logp,
}
# What tells 256 values apart.
FINE = {
    "vlb": lambda x: losses.vlb(Prediction(x, x), x, x, LIN, T),
    "decoder": lambda x: losses.decoder(x, x, np.float32(-3.0)),
    "reconstruction": lambda x: losses.reconstruction(x, x, VP(0.1)),
    "bound": lambda x: likelihood.bound(KEY, denoiser(), LIN, x).total,
    "continuous_bound": lambda x: (
        likelihood.continuous_bound(
            KEY, denoiser(continuous.ve()), continuous.ve(), x, draws=2
        ).total
    ),
    "ode_bits": lambda x: likelihood.ode_bits_per_dim(KEY, denoiser(VP), VP, x).total,
}


def leaves(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", BORDERS)
def test_bfloat16_gives_what_its_values_give(name):
    low = jnp.asarray(X, jnp.bfloat16)
    exact = BORDERS[name](low.astype(jnp.float32))
    for a, b in zip(leaves(BORDERS[name](low)), leaves(exact), strict=True):
        assert np.max(np.abs(a - b) / (1 + np.abs(b))) < 0.01


@pytest.mark.parametrize("name", [name for name in BORDERS | FINE if name != "ode"])
def test_float32_gives_what_its_values_give_in_double_precision(name, x64):
    low, call = jnp.asarray(X, jnp.float32), (BORDERS | FINE)[name]
    exact = call(low.astype(jnp.float64))
    for a, b in zip(leaves(call(low)), leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BORDERS | FINE | SOLVED)
def test_whole_numbers_are_refused(name, refuses):
    with refuses("uint8"):
        (BORDERS | FINE | SOLVED)[name](jnp.asarray(127 * (X + 1), jnp.uint8))


@pytest.mark.parametrize("name", FINE)
def test_what_cannot_tell_256_values_apart_is_refused(name, refuses):
    with refuses("float16"):
        FINE[name](jnp.asarray(X, jnp.float16))


def test_a_batch_of_numpy_is_as_good():
    """As data sets give it: float64, whatever JAX computes in."""
    for name in ("sample", "bound"):
        call = (BORDERS | FINE)[name]
        for a, b in zip(leaves(call(X)), leaves(call(jnp.asarray(X))), strict=True):
            np.testing.assert_array_equal(a, b)
