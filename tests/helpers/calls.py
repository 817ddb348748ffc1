"""A call of every public function of arrays: for `test_transforms` and `test_types`.

Each is a function of `Inputs`, whose first axis is a batch of B examples, and gives
arrays with that axis. A new function needs a line here.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import (
    analytic,
    autoencoding,
    continuous,
    distillation,
    editing,
    gaussian,
    grids,
    guidance,
    jumps,
    langevin,
    latents,
    learned,
    likelihood,
    losses,
    ode,
    prediction,
    samplers,
    schedule,
    sde,
    solvers,
    timesteps,
    weightings,
)

# Not functions of arrays: they raise and do no more, tell a fact of a schedule, count,
# or are of NumPy.
OTHERS = {
    # Without a gradient, by design.
    "autoencoding": ("adaptive_weight",),
    "continuous": ("counts_steps", "last_time"),
    "grids": ("karras", "logsnr", "quadratic", "uniform"),
    "latents": ("fit",),
    "likelihood": ("log_density", "rate_distortion"),
    "losses": ("check_values",),
    "samplers": ("check_grid", "count_evaluations", "counted", "forgetful", "pad"),
    "schedule": ("check_num_steps", "check_range", "is_discrete", "num_steps", "timed"),
    # Called by those beside them.
    "editing": ("below", "constrain", "repaint_grid"),
    "ode": ("follow", "integrate"),
}
B, T, SHAPE = 8, 20, (2, 2, 1)
LIN, VP, KEY = schedule.linear(T), continuous.vp(), jax.random.key(3)
REAL = continuous.interpolate(LIN)
VE = continuous.ve(sigma_min=0.05, sigma_max=2.0)
GRID, DOWN = grids.uniform(LIN, 4), np.array([19, 9, 7])
SOLVE = {"rtol": 1e-8, "atol": 1e-8}
with jax.enable_x64(True):
    PARAMS = learned.init(jax.random.key(0), width=8)


class Inputs(NamedTuple):
    """What the functions are given, [B, ...]."""

    x0: jax.Array
    x: jax.Array
    y: jax.Array
    log: jax.Array
    u: jax.Array
    t: jax.Array
    number: jax.Array
    keys: jax.Array
    level: schedule.NoiseLevel
    prev_level: schedule.NoiseLevel

    @property
    def pred(self):
        return gaussian.Prediction(self.y, self.x)

    @property
    def pair(self):
        return self.level, self.prev_level


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    t = np.array([20, 17, 13, 8, 5, 3, 2, 1])
    x0 = rng.uniform(-0.9, 0.9, (B, *SHAPE))
    x, y = rng.normal(size=(2, B, *SHAPE))
    arrays = x0, x, y, rng.uniform(-3, 0, (B, *SHAPE)), rng.uniform(0.1, 0.9, B)
    number, keys = jnp.arange(B) + 100 * seed, jax.random.split(jax.random.key(seed), B)
    real = (jnp.asarray(a, float) for a in arrays)
    return Inputs(*real, jnp.asarray(t), number, keys, LIN(t), LIN(t - 1))


def network(x, t):
    return jnp.tanh(x) * (1 + 0.01 * t.reshape(-1, 1, 1, 1))


def denoiser(kind="v", made=LIN, **options):
    """One by the stand-in network, twice as wide where it tells a variance."""

    def wide(x, t):
        return jnp.concatenate([network(x, t), 0.1 * x - 2], axis=-1)

    net = wide if options.get("variance") in ("learned", "range") else network
    return gaussian.denoiser(net, made, kind, **options)


def attached(end):
    return analytic.attach(denoiser(), np.linspace(0, end, T + 1))


DENOISERS = {
    **{kind: denoiser(kind) for kind in ("eps", "score", "edm", "velocity")},
    "clip": denoiser("x0", clip=True),
    "learned": denoiser("mean", variance="learned"),
    "range": denoiser(variance="range"),
}
RULES = {
    variance: samplers.ddpm(denoiser(variance=variance), LIN, variance=variance)
    for variance in ("small", "large", "learned", "range")
}
RULES["analytic"] = samplers.ddpm(attached(0.5), LIN, variance="analytic")


def walked(make, **options):
    """Two steps of a rule, so that what it remembers matters."""

    def call(a):
        rule, x = make(denoiser(threshold=0.9), LIN, **options), a.x
        memory = rule.init(x, DOWN)
        for times in ((19, 9), (9, 7)):
            x, memory, x0 = rule.step(a.keys, x, memory, *map(jnp.asarray, times))
        return x, x0

    return call


def stepped(rule, t, s):
    """One step of all examples."""
    return lambda a: rule.step(a.keys, a.x, (), jnp.asarray(t), jnp.asarray(s))[::2]


def _padded(a):
    rule, grid = samplers.padded(RULES["small"]), samplers.pad(DOWN, 4)
    for t, s in (grid[:2], grid[2:]):
        a = a._replace(x=stepped(rule, t, s)(a)[0])
    return a.x


def _trajectory(a):
    options = {"start": a.x, "first": a.number[0]}
    rule, shape = RULES["small"], a.x.shape
    end, path = samplers.trajectory(KEY, rule, GRID, shape, (0, 3), **options)
    return end, *path.x_t, *path.x0


def _ode_bits(a):
    options = {"start": 0.2, "probes": 2, **SOLVE}
    bits = likelihood.ode_bits_per_dim(a.keys, denoiser(made=VP), VP, a.x0, **options)
    return bits.total, bits.density.prior, bits.density.divergence


def _bound(a):
    made = schedule.linear(4)
    bits = likelihood.bound(a.keys, denoiser(made=made), made, a.x0, chunk=3)
    return bits.total, bits.prior, bits.terms.T, bits.mse.T


def _sampled(a, rule, grid=GRID, channels=1):
    return samplers.sample(a.keys, rule, grid, (*a.x0.shape[:-1], channels))


def _inpaint(a):
    mask = np.arange(4).reshape(1, *SHAPE) < 2
    rule = editing.inpaint(RULES["small"], LIN, a.x0, mask)
    return _sampled(a, rule, editing.repaint_grid(GRID, 2, 2))


def _free(a, active=None):
    def labelled(x, t, label):
        return network(x, t) * jnp.cos(label)[:, None, None, None]

    scale = 0.1 * a.number + 2
    apply = guidance.classifier_free(labelled, a.number, 7, scale=scale, active=active)
    return gaussian.denoiser(apply, LIN, "v")(a.x, a.t)


def _by_classifier(a, clip):
    def log_prob(x, t):
        return jnp.cos(x * network(x, t)).sum(axis=(1, 2, 3))

    options = {"scale": a.u, "clip": clip}
    return guidance.classifier(denoiser(), log_prob, LIN, **options)(a.x, a.t)


def _x0_variance(a):
    """Of each example by itself, since a table has no batch."""
    made = schedule.linear(2)
    one = partial(analytic.x0_variance, denoise=denoiser(made=made), schedule=made)
    return jax.vmap(lambda key, x0: one(key[None], x0=x0[None]))(a.keys, a.x0)


def _recorded(a):
    """A history for each example, of its loss and of one that all have."""

    def one(t, index):
        past, loss = timesteps.history(T, length=1), jnp.stack([index, index + 1])
        times = jnp.stack([t, t % T + 1])
        past = timesteps.record(past, times, loss.astype(jnp.float32))
        return *past, timesteps.probabilities(past)

    return jax.vmap(one)(a.t, a.number)


def _believed(a, x0=None):
    """A prediction with all its fields."""
    x0 = a.x0 if x0 is None else x0
    return gaussian.Prediction(x0, a.x0, a.log, jax.nn.sigmoid(a.log), jnp.exp(a.log))


def _hybrid(a):
    # The x0 predicted is fixed in the bound, which finite differences would not know.
    pred = gaussian.Prediction(jnp.full_like(a.x0, 0.3), a.y, a.log)
    return losses.hybrid(pred, a.x0, a.x, a.x0, LIN, a.t, variance="learned")


FLOW = continuous.flow()
LATE = 0.5  # of the times that jumps end at


def _still(a):
    """Ends of paths and a time that no slope is taken by: what follows stops it."""
    x0 = gaussian.normal(a.keys, (len(a.keys), *SHAPE))
    return gaussian.Prediction(x0, jnp.cos(3 * x0)), a.t / 25.0


def _jump(x, t, s):
    return denoiser("velocity", FLOW)(x, t)._replace(x0=network(x, t - s))


def _distilled(a):
    """Each loss and target of distillation, by its name."""
    (ends, u), denoise, to = _still(a), denoiser("v", VP), distillation
    return {
        "two_steps": to.two_steps(denoise, ends.eps, VP, u, 0.7 * u, LATE * u),
        "tangent": to.tangent(denoise, ends, VP, u, warmup=0.7),
        "difference": to.difference(denoise, ends, VP, u, LATE * u),
        "consistency": to.consistency(ends, ends.x0, VP(u)),
        "mean_flow": to.mean_flow(_jump, ends, FLOW, u, LATE * u),
    }


def _minimised(a):
    def of(level, slope):
        level = level.like(a.x0)
        rest = jnp.sin(level.alpha * a.x0 + level.sigma * a.x) - a.x
        return -slope * (rest**2).mean((1, 2, 3)), level.alpha[:, 0, 0, 0]

    return learned.minimise_variance(PARAMS, a.u, of, has_aux=True)


def every(options, call):
    """All options of a function, as one call."""
    return lambda a: {option: call(a, option) for option in options}


DISCRETE = ("linear", "quad", "const", "jsd", "warmup", "cosine", "sigmoid")
REALS = ("vp", "sub_vp", "ve", "cosine", "flow")
WEIGHTS = ("simple", "min_snr", "p2", "sigmoid", "edm", "x0", "v", "velocity")
KINDS, VARIANCES = gaussian.KINDS, gaussian.VARIANCES
BOTH = ("small", "large")
# Functions without arrays of their own make schedules, weightings and rules: they are
# called with what they make.
CALLS = {
    **{
        f"schedule.{name}": lambda a, name=name: getattr(schedule, name)(T)(a.t)
        for name in DISCRETE
    },
    "schedule.from_betas": lambda a: schedule.from_betas([0.1] * T)(a.t),
    "schedule.from_tables": lambda a: schedule.from_tables(*LIN.args)(a.t),
    "schedule.tables": lambda a: [jnp.asarray(x)[a.t] for x in schedule.tables(LIN)],
    "schedule.preserving": lambda a: schedule.preserving(6 * a.u - 3),
    "schedule.real_time": lambda a: schedule.real_time(a.u),
    "schedule.real_data": lambda a: schedule.real_data(a.x0),
    "schedule.widened": lambda a: schedule.widened(a.u, a.x),
    **{
        f"continuous.{name}": lambda a, name=name: getattr(continuous, name)()(a.u)
        for name in REALS
    },
    "continuous.interpolate": lambda a: REAL(T * a.u),
    "continuous.shifted": lambda a: continuous.shifted(REAL, -1.0)(T * a.u),
    "continuous.discretize": lambda a: continuous.discretize(VP, T)(a.t),
    "continuous.time_of": lambda a: continuous.time_of(REAL, 6 * a.u - 3),
    "learned.schedule": lambda a: learned.schedule(PARAMS)(a.u),
    "learned.init": lambda a: jax.vmap(learned.init)(a.keys).interior.offset,
    "learned.minimise_variance": _minimised,
    "gaussian.q_sample": lambda a: gaussian.q_sample(a.x0, a.x, a.level),
    "gaussian.q_posterior": lambda a: gaussian.q_posterior(a.x0, a.x, *a.pair),
    "gaussian.q_step": lambda a: gaussian.q_step(a.keys, a.x, *a.pair[::-1], noise=1.1),
    "gaussian.predict": every(
        KINDS, lambda a, kind: gaussian.predict(kind, a.x0, a.x, *a.pair)
    ),
    "gaussian.target": every(
        KINDS, lambda a, kind: gaussian.target(kind, a.x0, a.x, *a.pair)
    ),
    "gaussian.p_sample": every(
        VARIANCES,
        lambda a, v: gaussian.p_sample(a.keys, _believed(a), a.x, *a.pair, variance=v),
    ),
    "gaussian.denoiser": every(DENOISERS, lambda a, name: DENOISERS[name](a.x, a.t)),
    "gaussian.denoiser of ve": lambda a: denoiser("edm", VE)(a.x, a.u),
    "gaussian.normal": lambda a: gaussian.normal(a.keys, (len(a.keys), 3)),
    "prediction.reverse_variance": every(
        BOTH, lambda a, kind: prediction.reverse_variance(kind, *a.pair)
    ),
    "prediction.log_variance": every(
        VARIANCES,
        lambda a, kind: prediction.log_variance(
            kind, _believed(a), *a.pair, log_small=jnp.full_like(a.log, -4.0)
        ),
    ),
    "analytic.attach": lambda a: attached(1)(a.x, a.t),
    "analytic.x0_variance": _x0_variance,
    "analytic.bounded": jax.vmap(
        lambda a: analytic.bounded(0.01 * jnp.exp(a.log).ravel(), schedule.linear(3))
    ),
    **{
        f"weightings.{n}": lambda a, n=n: getattr(weightings, n)()(a.level.logsnr)
        for n in WEIGHTS
    },
    "weightings.slope": lambda a: [
        weightings.slope(made, t)
        for made, t in ((VP, a.u), (REAL, T * a.u), (LIN, a.t))
    ],
    "timesteps.uniform": lambda a: timesteps.uniform(KEY, a.number),
    **{
        f"timesteps.{make.__name__}": lambda a, f=make: f(KEY, a.number % B, B)
        for make in (timesteps.low_discrepancy, timesteps.antithetic)
    },
    "timesteps.steps": lambda a: timesteps.steps(a.u, T),
    "timesteps.times": lambda a: timesteps.times(a.u),
    "timesteps.log_normal": lambda a: timesteps.log_normal(
        timesteps.uniform(KEY, a.number), VP
    ),
    "timesteps.logit_normal": lambda a: timesteps.logit_normal(a.u),
    "timesteps.importance": lambda a: timesteps.importance(
        a.u, np.arange(1, T + 1) / (T * (T + 1) / 2)
    ),
    "timesteps.history": lambda a: timesteps.history(T).losses[a.t - 1],
    "timesteps.record": _recorded,
    "timesteps.probabilities": _recorded,
    "autoencoding.reconstruction": every(
        autoencoding.ERRORS,
        lambda a, kind: autoencoding.reconstruction(a.x0, a.x, a.log, kind=kind),
    ),
    "autoencoding.kl": lambda a: autoencoding.kl((a.x, a.log)),
    "autoencoding.elbo": lambda a: autoencoding.elbo(
        a.x0, a.x, a.log, (a.y, a.log), beta=2.0
    ),
    "autoencoding.hinge": lambda a: autoencoding.hinge(a.x, 0.3 * a.y),
    "autoencoding.adversarial": lambda a: autoencoding.adversarial(a.x),
    "autoencoding.perceptual": lambda a: autoencoding.perceptual([a.x], [a.y]),
    "latents.bound": lambda a: latents.bound(a.u, 2 * a.u, a.log, dimensions=8),
    "losses.simple": every(
        KINDS, lambda a, kind: losses.simple(a.pred, a.x0, a.x, *a.pair, space=kind)
    ),
    "losses.weighted": lambda a: losses.weighted(a.pred, a.y, a.level, jax.nn.sigmoid),
    "losses.diffusion": lambda a: losses.diffusion(a.pred, a.y, a.u),
    "losses.prior": lambda a: losses.prior(a.x0, a.level),
    "losses.vlb": every(
        VARIANCES,
        lambda a, kind: losses.vlb(
            _believed(a, a.x0 + 0.05 * a.y), a.x0, a.x, LIN, a.t, variance=kind
        ),
    ),
    "losses.hybrid": _hybrid,
    **{
        f"distillation.{name}": lambda a, name=name: _distilled(a)[name]
        for name in ("two_steps", "tangent", "difference", "consistency", "mean_flow")
    },
    "distillation.progressive": lambda a: distillation.progressive(
        a.pred, a.x0, VP(a.u)
    ),
    "distillation.across": lambda a: distillation.across(a.pred, a.level),
    "distillation.derivative": lambda a: distillation.derivative(
        lambda t: network(a.x, t), a.u
    ),
    "jumps.consistency": stepped(
        jumps.consistency(denoiser("v", FLOW), FLOW), 0.9, 0.4
    ),
    "jumps.mean_flow": stepped(jumps.mean_flow(_jump, FLOW), 0.9, 0.4),
    "losses.reconstruction": lambda a: losses.reconstruction(
        a.x0, a.x0 + 0.1 * a.x, schedule.NoiseLevel(-0.1 * a.u, 2 + 8 * a.u)
    ),
    "losses.normal_kl": lambda a: losses.normal_kl(a.x, a.log, a.y, 0.5 * a.log),
    "losses.decoder": every(
        (False, True),
        lambda a, exact: losses.decoder(a.x0, a.y, a.log, exact=exact),
    ),
    "sde.coefficients": lambda a: sde.coefficients(VP, a.u),
    "sde.score": lambda a: sde.score(gaussian.Prediction(a.y, a.y), a.level),
    "sde.reverse_drift": lambda a: sde.reverse_drift(denoiser(made=VP), VP)(a.x, a.u),
    "sde.flow": lambda a: sde.flow(denoiser(made=VP), VP)(a.x, a.u),
    "sde.prior_logp": lambda a: sde.prior_logp(a.x, a.level),
    "guidance.classifier_free": _free,
    "guidance.within": lambda a: _free(a, guidance.within(LIN, 0.1, 0.3)),
    "guidance.classifier": every((False, True), _by_classifier),
    "samplers.ddpm": every(VARIANCES, lambda a, name: stepped(RULES[name], 9, 7)(a)),
    "samplers.ddim": walked(samplers.ddim, eta=0.5),
    "samplers.padded": _padded,
    "samplers.trajectory": _trajectory,
    "samplers.sample": lambda a: samplers.sample(
        KEY, RULES["large"], GRID, a.x.shape, start=a.x, first=a.number[0]
    ),
    "samplers.each_key": lambda a: jax.random.key_data(
        samplers.each_key(KEY, len(a.x), first=a.number[0])
    ),
    "samplers.fold": lambda a: jax.random.key_data(samplers.fold(a.keys, 3)),
    "solvers.heun": walked(solvers.heun),
    "solvers.edm": walked(solvers.edm, churn=1.0),
    "solvers.dpm_solver_pp": every(
        ("2S", "3M", "SDE"),
        lambda a, order: walked(solvers.dpm_solver_pp, order=order)(a),
    ),
    "solvers.unipc": walked(solvers.unipc, order=3),
    "solvers.phi": lambda a: solvers.phi(2, a.u),
    "langevin.predictor_corrector": walked(langevin.predictor_corrector),
    "langevin.langevin": walked(langevin.langevin, moves=2),
    "likelihood.bound": _bound,
    "likelihood.continuous_bound": lambda a: likelihood.continuous_bound(
        a.keys, denoiser(made=VE), VE, a.x0, draws=3, chunk=2
    ),
    "editing.vary": lambda a: editing.vary(a.keys, RULES["small"], LIN, GRID, a.x0, 12),
    "editing.interpolate": lambda a: editing.interpolate(
        a.keys, RULES["small"], LIN, GRID, a.x0, a.x, 12, [0.2, 0.7]
    ),
    "editing.encode": lambda a: editing.encode(
        samplers.ddim(denoiser(), LIN), GRID, a.x0
    ),
    "editing.slerp": lambda a: editing.slerp(a.x, a.x0, a.u),
    "editing.inpaint": _inpaint,
    "editing.colorize": lambda a: _sampled(
        a, editing.colorize(RULES["small"], LIN, a.x0), channels=3
    ),
    "ode.ode": stepped(ode.ode(denoiser(made=VP), VP, **SOLVE), 0.6, 0.3),
    "likelihood.ode_bits_per_dim": _ode_bits,
}
