"""A function around a schedule gives its numbers, or is refused: never others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import (
    analytic,
    continuous,
    gaussian,
    grids,
    guidance,
    langevin,
    likelihood,
    losses,
    ode,
    samplers,
    schedule,
    sde,
    solvers,
    timesteps,
    weightings,
)

T = 12
MADE = {
    "linear": schedule.linear(T, beta_start=0.01, beta_end=0.6),
    "vp": continuous.vp(),
}
WRAPPERS = (jax.jit, functools.partial, lambda made: lambda t: made(t))
KEY, X = jax.random.key(0), jnp.linspace(-0.9, 0.9, 8).reshape(2, 2, 2, 1)


def network(x, t):
    """Tells t from t - 1."""
    return jnp.cos(1.0 * t).reshape(-1, 1, 1, 1) * x


def denoiser(made, **options):
    return gaussian.denoiser(network, made, "eps", **options)


def times_of(made):
    """Two times of the schedule itself, for uses that are handed a wrapped one."""
    return jnp.asarray(grids.uniform(made, 3)[:2])


def drawn(make):
    """From a rule to a use: images along three steps, the denoiser told its shift."""

    def use(made, known):
        rule = make(denoiser(made, time_shift=1), made)
        return samplers.sample(KEY, rule, grids.uniform(known, 3), X.shape)

    return use


# A use of a schedule as (how it was made or wrapped, the schedule itself).
NEEDS_LEVELS = {
    "denoiser, told": lambda s, k: denoiser(s, time_shift=1)(X, times_of(k)),
    "denoiser, edm": lambda s, k: gaussian.denoiser(network, s, "edm")(X, times_of(k)),
    "guidance, told": lambda s, k: guidance.within(s, 0.1, 5.0, time_shift=0)(
        times_of(k)
    ),
    "ddpm": drawn(samplers.ddpm),
    "2M": drawn(solvers.dpm_solver_pp),
    "corrector": drawn(langevin.predictor_corrector),
}
NEEDS_TIMES = {
    "denoiser": lambda s, k: denoiser(s)(X, times_of(k)),
    "guidance": lambda s, k: guidance.within(s, 0.1, 5.0)(times_of(k)[1:]),
    "2S": drawn(lambda d, s: solvers.dpm_solver_pp(d, s, order="2S")),
    "time_of": lambda s, k: continuous.time_of(s, 0.3),
    "last_time": lambda s, k: continuous.last_time(s),
    "weighting": lambda s, k: weightings.slope(s, times_of(k)),
    "log-normal": lambda s, k: timesteps.log_normal(jnp.array([0.3]), s),
    **{
        make.__name__: lambda s, k, make=make: make(s, 3)
        for make in (grids.uniform, grids.quadratic, grids.logsnr, grids.karras)
    },
    "shifted": lambda s, k: continuous.shifted(s, 0.5)(times_of(k)),
}
PRED = gaussian.Prediction(X, X, fraction=X)
WHOLE = {
    "hybrid": lambda s, k: losses.hybrid(PRED, X, X, X, s, times_of(k)),
    "bound": lambda s, k: likelihood.bound(KEY, denoiser(s, time_shift=1), s, X),
    "interpolate": lambda s, k: continuous.interpolate(s)(3.5),
    "analytic": lambda s, k: analytic.bounded(np.ones(T + 1), s),
}
REAL = {
    "drift": lambda s, k: sde.flow(denoiser(s, time_shift=1), s)(X, times_of(k)),
    "ode": drawn(ode.ode),
    "density": lambda s, k: likelihood.log_density(
        KEY, denoiser(s, time_shift=1), s, X, start=0.01 * k.last
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_wrapped_schedule_gives_the_same_numbers(name):
    """As it does where it is told its times; all in one program."""
    known = MADE[name]
    own = schedule.from_tables(*jax.jit(known)(np.arange(T + 1)))
    told = own if known.whole else schedule.Timed(jax.jit(known))

    def run():
        ways = (known, jax.jit(known), told)
        return [[use(made, known) for made in ways] for use in NEEDS_LEVELS.values()]

    for expected, *found in jax.jit(run)():
        assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(expected))
        same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        for other in found:
            jax.tree.map(same, expected, other)


@pytest.mark.parametrize("name", MADE)
def test_where_the_unit_of_time_is_needed_a_wrapped_schedule_is_refused(name, refuses):
    known = MADE[name]
    for use in (NEEDS_TIMES | (WHOLE if known.whole else REAL)).values():
        for wrap in WRAPPERS:
            wrapped = wrap(known)
            with refuses(repr(wrapped)):
                use(wrapped, known)


def test_the_refusal_says_how_to_mend():
    with pytest.raises(ValueError, match=r"Timed\(f\).*from_tables\(\*f\("):
        gaussian.denoiser(network, jax.jit(MADE["linear"]), "eps")
