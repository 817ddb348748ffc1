"""A function around a schedule gives its numbers, or is refused: never others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    sde,
    solvers,
    timesteps,
    weightings,
)

T = 12
MADE = {
    "linear": schedule.linear(T, beta_start=0.01, beta_end=0.6),
    "vp": continuous.vp(),
    "interpolated": continuous.interpolate(schedule.cosine(T)),
    "shifted": continuous.shifted(schedule.cosine(T), 0.5),
}
WRAPPERS = {
    "lambda": lambda made: lambda t: made(t),
    "jit": jax.jit,
    "partial": functools.partial,
    "vmap": lambda made: lambda t: jax.vmap(made)(t) if np.ndim(t) else made(t),
}
KEY, X = jax.random.key(0), jnp.linspace(-0.9, 0.9, 8).reshape(2, 2, 2, 1)


def network(x, t):
    """Tells t from t - 1."""
    return jnp.cos(1.0 * t).reshape(-1, 1, 1, 1) * x


def denoiser(made, **options):
    return gaussian.denoiser(network, made, "eps", **options)


def times_of(made):
    """Three times of the schedule itself, for uses that are handed a wrapped one."""
    grid = grids.uniform(made, 3)
    return jnp.asarray(grid[:2])


def drawn(make):
    """From a rule to a use: images along three steps, the denoiser told its shift."""

    def use(made, known):
        denoise = denoiser(made, time_shift=1)
        grid = grids.uniform(known, 3)
        return samplers.sample(KEY, make(denoise, made), grid, X.shape)

    return use


# A use of a schedule as (how it was made or wrapped, the schedule itself).
NEEDS_LEVELS = {
    "denoiser, told": lambda s, k: denoiser(s, time_shift=1)(X, times_of(k)),
    "denoiser, edm": lambda s, k: gaussian.denoiser(network, s, "edm")(X, times_of(k)),
    "q_sample": lambda s, k: gaussian.q_sample(X, X, s(times_of(k))),
    "loss": lambda s, k: losses.simple(
        denoiser(s, time_shift=1)(X, times_of(k)), X, X, s(times_of(k))
    ),
    "guidance, told": lambda s, k: guidance.within(s, 0.1, 5.0, time_shift=0)(
        times_of(k)
    ),
    "classifier": lambda s, k: guidance.classifier(
        denoiser(s, time_shift=1), lambda x, t: x.sum((1, 2, 3)), s
    )(X, times_of(k)),
    "ddpm": drawn(samplers.ddpm),
    "2M": drawn(solvers.dpm_solver_pp),
    "corrector": drawn(langevin.predictor_corrector),
    "inpaint": drawn(
        lambda d, s: editing.inpaint(
            samplers.ddim(d, s), s, X, np.eye(2, dtype=bool)[None, :, :, None]
        )
    ),
}
NEEDS_TIMES = {
    "denoiser": lambda s, k: denoiser(s)(X, times_of(k)),
    "guidance": lambda s, k: guidance.within(s, 0.1, 5.0)(times_of(k)[1:]),
    "2S": drawn(lambda d, s: solvers.dpm_solver_pp(d, s, order="2S")),
    "time_of": lambda s, k: continuous.time_of(s, 0.3),
    "last_time": lambda s, k: continuous.last_time(s),
    "weighting": lambda s, k: weightings.slope(s, times_of(k)),
    "log-normal": lambda s, k: timesteps.log_normal(jnp.array([0.3]), s),
    "uniform": lambda s, k: grids.uniform(s, 3),
    "quadratic": lambda s, k: grids.quadratic(s, 3),
    "logsnr": lambda s, k: grids.logsnr(s, 3),
    "karras": lambda s, k: grids.karras(s, 3),
    "shifted": lambda s, k: continuous.shifted(s, 0.5)(times_of(k)),
}
RANGE = gaussian.Prediction(X, X, fraction=X)
WHOLE = {
    "hybrid": lambda s, k: losses.hybrid(
        RANGE, X, X, X, s, times_of(k), variance="range"
    ),
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


def uses_of(known):
    return {**NEEDS_TIMES, **(WHOLE if known.whole else REAL)}


def hold(uses, known, others):
    """All numbers in one program: the schedule's own, and those of the others."""

    def run():
        return [[use(made, known) for made in (known, *others)] for use in uses]

    for expected, *found in jax.jit(run)():
        for a in jax.tree.leaves(expected):
            assert np.all(np.isfinite(a))
        for other in found:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                expected,
                other,
            )


@pytest.mark.parametrize("name", ["linear", "vp"])
def test_a_wrapped_schedule_gives_the_same_numbers(name):
    known = MADE[name]
    wrapped = [WRAPPERS[way](known) for way in ("jit", "vmap")]
    hold(NEEDS_LEVELS.values(), known, wrapped)


@pytest.mark.parametrize("name", MADE)
def test_where_the_unit_of_time_is_needed_a_wrapped_schedule_is_refused(name, refuses):
    known = MADE[name]
    for use in uses_of(known).values():
        for wrap in WRAPPERS.values():
            wrapped = wrap(known)
            with refuses(repr(wrapped)):
                use(wrapped, known)


def test_the_cures_of_the_refusal_work():
    """A schedule of one's own, told its times, is used as those of the library are."""
    discrete = schedule.from_tables(*jax.jit(MADE["linear"])(np.arange(T + 1)))
    real = schedule.Timed(jax.jit(MADE["vp"]))
    for known, told in ((MADE["linear"], discrete), (MADE["vp"], real)):
        # What is solved has the field of "drift", and takes long to compile.
        solved = "density", "ode"
        uses = [use for name, use in uses_of(known).items() if name not in solved]
        hold(uses, known, [told])


def test_parameters_of_an_own_schedule_have_gradients():
    own = schedule.Timed(lambda k, t: schedule.preserving(k * (0.5 - t)), (20.0,))

    def loss(made):
        return denoiser(made)(X, jnp.array([0.2, 0.7])).x0.sum()

    slope = jax.jit(jax.grad(loss))(own).args[0]
    h = 1e-2
    ends = [loss(schedule.Timed(own.function, (20.0 + d,))) for d in (h, -h)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-2)


def test_refusal_says_how_to_mend():
    with pytest.raises(ValueError, match=r"Timed\(f\).*from_tables\(\*f\("):
        denoiser(jax.jit(MADE["linear"]))
