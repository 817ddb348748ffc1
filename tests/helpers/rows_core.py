"""Rows of `test_transforms`: schedules, the Gaussian algebra, losses, samplers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transforms import SHAPE, Row, T, network, wide_network

from diffusion_jax import (
    analytic,
    continuous,
    editing,
    gaussian,
    grids,
    langevin,
    likelihood,
    losses,
    ode,
    samplers,
    schedule,
    sde,
    solvers,
)

# Not functions of arrays: they raise and do no more, or are of NumPy, or count.
NOT_OF_ARRAYS = {
    "errors.raise_unknown",
    "likelihood.rate_distortion",
    "losses.check_values",
    "samplers.check_grid",
    "samplers.count_evaluations",
    "samplers.counted",
    "samplers.pad",
    "schedule.check_num_steps",
}


def _made(made: Callable) -> Callable:
    return lambda t: tuple(made(t))


def _denoise(kind: str, **options: Any) -> Callable:
    net = wide_network if "variance" in options else network

    def fn(x: jax.Array, t: jax.Array) -> Any:
        made = schedule.linear(T)
        pred = gaussian.denoiser(net, made, kind, **options)(x, t)
        return tuple(field for field in pred if field is not None)

    return fn


def _rule(made: schedule.Schedule, variance: str) -> samplers.Sampler:
    net = wide_network if variance in ("learned", "range") else network
    denoise = gaussian.denoiser(net, made, "v", variance=variance)
    if variance == "analytic":
        denoise = analytic.attach(denoise, np.linspace(0, 0.5, T + 1))
    return samplers.ddpm(denoise, made, variance=variance)


def _step(variance: str) -> Callable:
    def fn(keys: jax.Array, x: jax.Array) -> Any:
        rule = _rule(schedule.linear(T), variance)
        new = rule.step(keys, x, (), jnp.asarray(9), jnp.asarray(7))
        return new.x, new.x0

    return fn


def _ddim(eta: float) -> Callable:
    def fn(keys: jax.Array, x: jax.Array) -> Any:
        made = schedule.linear(T)
        denoise = gaussian.denoiser(network, made, "v")
        rule = samplers.ddim(denoise, made, eta=eta)
        new = rule.step(keys, x, (), jnp.asarray(9), jnp.asarray(7))
        return new.x, new.x0

    return fn


def _two_steps(make: Callable, **options: Any) -> Callable:
    """Two steps of a rule, so that what it remembers matters."""

    def fn(keys: jax.Array, x: jax.Array) -> Any:
        made = schedule.linear(T)
        denoise = gaussian.denoiser(network, made, "v", threshold=0.9)
        rule = make(denoise, made, **options)
        memory = rule.init(x, np.array([19, 9, 7]))
        for t, s in ((19, 9), (9, 7)):
            new = rule.step(keys, x, memory, jnp.asarray(t), jnp.asarray(s))
            x, memory = new.x, new.memory
        return new.x, new.x0

    return fn


def _padded(keys: jax.Array, x: jax.Array) -> Any:
    made = schedule.linear(T)
    rule = samplers.padded(_rule(made, "small"))
    grid = jnp.asarray(samplers.pad(grids.uniform(made, 3), 6))
    new = rule.step(keys, x, (), grid[0], grid[1])
    return rule.step(keys, new.x, (), grid[4], grid[5]).x


def _quadratic(x: jax.Array) -> jax.Array:
    return x * grids.quadratic(schedule.linear(T), 4)[0]


def _sample(x: jax.Array, index: jax.Array) -> jax.Array:
    made = schedule.linear(T)
    rule, grid = _rule(made, "large"), grids.uniform(made, 4)
    key = jax.random.key(3)
    return samplers.sample(key, rule, grid, x.shape, start=x, first=index[0])


def _trajectory(x: jax.Array, index: jax.Array) -> Any:
    made = schedule.linear(T)
    rule, grid = _rule(made, "small"), grids.uniform(made, 4)
    key = jax.random.key(3)
    end, path = samplers.trajectory(
        key, rule, grid, x.shape, (0, 3), start=x, first=index[0]
    )
    return end, *path.x_t, *path.x0


def _with_variances(
    x0: jax.Array, eps: jax.Array, log: jax.Array
) -> gaussian.Prediction:
    return gaussian.Prediction(x0, eps, log, jax.nn.sigmoid(log), jnp.exp(log))


def _p_sample(variance: str) -> Callable:
    def fn(keys, x0, x, log, level, prev_level):
        pred = _with_variances(x0, x0, log)
        return gaussian.p_sample(keys, pred, x, level, prev_level, variance=variance)

    return fn


def _vlb(variance: str) -> Callable:
    def fn(x0, x, y, log, t):
        pred = _with_variances(x0 + 0.05 * y, x0, log)
        return losses.vlb(pred, x0, x, schedule.linear(T), t, variance=variance)

    return fn


def _bound(keys: jax.Array, x0: jax.Array) -> Any:
    made = schedule.linear(4)
    denoise = gaussian.denoiser(network, made, "v")
    bits = likelihood.bound(keys, denoise, made, x0, chunk=3)
    return bits.total, bits.prior, bits.terms.T, bits.mse.T


VP, REAL = continuous.vp(), continuous.interpolate(schedule.linear(T))
SOLVE = {"rtol": 1e-8, "atol": 1e-8}


def _coefficients(u: jax.Array) -> Any:
    return tuple(sde.coefficients(VP, u))


def _score(y: jax.Array, level: schedule.NoiseLevel) -> jax.Array:
    return sde.score(gaussian.Prediction(y, y), level)


def _field(make: Callable) -> Callable:
    return make(gaussian.denoiser(network, VP, "v"), VP)


def _ode(keys: jax.Array, x: jax.Array) -> Any:
    rule = ode.ode(gaussian.denoiser(network, VP, "v"), VP, **SOLVE)
    new = rule.step(keys, x, (), jnp.asarray(0.6), jnp.asarray(0.3))
    return new.x, new.x0


def _ode_bits(keys: jax.Array, x0: jax.Array) -> Any:
    denoise, options = gaussian.denoiser(network, VP, "v"), {"start": 0.2, **SOLVE}
    bits = likelihood.ode_bits_per_dim(keys, denoise, VP, x0, probes=2, **options)
    return bits.total, bits.density.prior, bits.density.divergence


def _vary(keys: jax.Array, x0: jax.Array) -> jax.Array:
    made = schedule.linear(T)
    grid = grids.uniform(made, 4)
    return editing.vary(keys, _rule(made, "small"), made, grid, x0, 12)


def _interpolate(keys: jax.Array, x0: jax.Array, x: jax.Array) -> jax.Array:
    made = schedule.linear(T)
    rule, grid = _rule(made, "small"), grids.uniform(made, 4)
    return editing.interpolate(keys, rule, made, grid, x0, x, 12, [0.2, 0.7])


def _encode(x0: jax.Array) -> jax.Array:
    made = schedule.linear(T)
    rule = samplers.ddim(gaussian.denoiser(network, made, "v"), made)
    return editing.encode(rule, grids.uniform(made, 4), x0)


def _inpaint(keys: jax.Array, x0: jax.Array) -> jax.Array:
    made = schedule.linear(T)
    mask = np.arange(4).reshape(1, *SHAPE) < 2
    rule = editing.inpaint(_rule(made, "small"), made, x0, mask)
    grid = editing.repaint_grid(grids.uniform(made, 4), 2, 2)
    return samplers.sample(keys, rule, grid, x0.shape)


def _colorize(keys: jax.Array, x0: jax.Array) -> jax.Array:
    made = schedule.linear(T)
    rule = editing.colorize(_rule(made, "small"), made, x0)
    return samplers.sample(keys, rule, grids.uniform(made, 4), (len(x0), 2, 2, 3))


def _simple(space: str) -> Callable:
    def fn(x0, x, y, level, prev_level):
        pred = gaussian.Prediction(y, x)
        return losses.simple(pred, x0, x, level, prev_level, space=space)

    return fn


PAIR = "level prev_level"
ROWS = [
    *(
        Row(f"schedule.{name}", _made(getattr(schedule, name)(T)), "t")
        for name in ("linear", "quad", "const", "jsd", "warmup", "cosine")
    ),
    Row("schedule.from_betas", _made(schedule.from_betas([0.1] * T)), "t"),
    Row("continuous.vp", _made(continuous.vp()), "u"),
    Row("continuous.sub_vp", _made(continuous.sub_vp()), "u"),
    Row("continuous.ve", _made(continuous.ve()), "u"),
    Row("continuous.discretize", _made(continuous.discretize(continuous.vp(), T)), "t"),
    Row("continuous.interpolate", lambda u: tuple(REAL(T * u)), "u"),
    Row("continuous.time_of", lambda u: continuous.time_of(REAL, 6 * u - 3), "u"),
    Row("continuous.last_time", lambda u: u * continuous.last_time(REAL), "u"),
    Row("continuous.counts_steps", lambda u: u * continuous.counts_steps(REAL), "u"),
    Row("schedule.is_discrete", lambda u: u * schedule.is_discrete(REAL), "u"),
    Row("schedule.timed", lambda u: u * schedule.timed(REAL).last, "u"),
    Row(
        "schedule.from_tables schedule.tables",
        _made(schedule.from_tables(*schedule.tables(schedule.linear(T)))),
        "t",
    ),
    Row(
        "schedule.num_steps", lambda u: u * schedule.num_steps(schedule.linear(T)), "u"
    ),
    Row("gaussian.q_sample", gaussian.q_sample, "x0 x level"),
    Row("gaussian.q_posterior", gaussian.q_posterior, f"x0 x {PAIR}"),
    *(
        Row(
            "gaussian.predict",
            lambda *a, kind=kind: gaussian.predict(kind, *a)[:2],
            f"y x {PAIR}",
            kind,
        )
        for kind in gaussian.KINDS
    ),
    *(
        Row(
            "gaussian.target",
            lambda *a, kind=kind: gaussian.target(kind, *a),
            f"x0 x {PAIR}",
            kind,
        )
        for kind in gaussian.KINDS
    ),
    *(
        Row(
            "gaussian.reverse_variance",
            lambda *a, kind=kind: gaussian.reverse_variance(kind, *a),
            PAIR,
            kind,
        )
        for kind in ("small", "large")
    ),
    *(
        Row("gaussian.p_sample", _p_sample(kind), f"keys x0 x log {PAIR}", kind)
        for kind in gaussian.VARIANCES
    ),
    Row("gaussian.denoiser", _denoise("eps"), "x t", "eps"),
    Row("gaussian.denoiser", _denoise("x0", clip=True), "x t", "clip"),
    Row("gaussian.denoiser", _denoise("mean", variance="learned"), "x t", "learned"),
    Row("gaussian.normal", lambda keys: gaussian.normal(keys, (len(keys), 3)), "keys"),
    *(
        Row("losses.simple", _simple(space), f"x0 x y {PAIR}", space)
        for space in gaussian.KINDS
    ),
    *(
        Row("losses.vlb", _vlb(variance), "x0 x y log t", variance)
        for variance in gaussian.VARIANCES
    ),
    Row("losses.prior", losses.prior, "x0 level"),
    Row("losses.normal_kl", losses.normal_kl, "x log y log"),
    Row("losses.decoder", losses.decoder, "x0 y log", "tanh"),
    Row(
        "losses.decoder",
        lambda *a: losses.decoder(*a, exact=True),
        "x0 y log",
        "exact",
    ),
    *(
        Row("samplers.ddpm", _step(variance), "keys x", variance)
        for variance in gaussian.VARIANCES
    ),
    Row("likelihood.bound", _bound, "keys x0"),
    Row(
        "likelihood.ode_bits_per_dim likelihood.log_density",
        _ode_bits,
        "keys x0",
        check_vma=False,
    ),
    Row("sde.coefficients", _coefficients, "u"),
    Row("sde.score", _score, "y level"),
    Row("sde.reverse_drift", _field(sde.reverse_drift), "x u"),
    Row("sde.flow", _field(sde.flow), "x u"),
    Row("sde.prior_logp", sde.prior_logp, "x level"),
    Row("ode.ode ode.follow ode.integrate", _ode, "keys x", check_vma=False),
    *(Row("samplers.ddim", _ddim(eta), "keys x", str(eta)) for eta in (0.0, 0.5)),
    Row("solvers.heun", _two_steps(solvers.heun), "keys x"),
    Row("solvers.edm", _two_steps(solvers.edm, churn=1.0), "keys x"),
    *(
        Row(
            "solvers.dpm_solver_pp solvers.phi",
            _two_steps(solvers.dpm_solver_pp, order=order),
            "keys x",
            order,
        )
        for order in ("2S", "3M", "SDE")
    ),
    Row("solvers.unipc", _two_steps(solvers.unipc, order=3), "keys x"),
    Row(
        "langevin.predictor_corrector",
        _two_steps(langevin.predictor_corrector),
        "keys x",
    ),
    Row("langevin.langevin", _two_steps(langevin.langevin, moves=2), "keys x"),
    Row("samplers.padded", _padded, "keys x"),
    Row("editing.vary editing.below", _vary, "keys x0"),
    Row("editing.interpolate", _interpolate, "keys x0 x"),
    Row("editing.encode", _encode, "x0"),
    Row("editing.slerp", editing.slerp, "x y u"),
    Row("editing.inpaint editing.constrain editing.repaint_grid", _inpaint, "keys x0"),
    Row("editing.colorize", _colorize, "keys x0"),
    Row("grids.quadratic", _quadratic, "x"),
    Row("grids.logsnr", lambda x: x * grids.logsnr(REAL, 4)[2], "x"),
    Row("grids.karras", lambda x: x * grids.karras(REAL, 4)[2], "x"),
    Row("samplers.sample samplers.forgetful grids.uniform", _sample, "x index"),
    Row("samplers.trajectory", _trajectory, "x index"),
]
