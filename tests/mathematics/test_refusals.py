"""Bad input is refused in three parts, before anything is computed."""

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

LIN, TEN, VP = schedule.linear(), schedule.linear(10), continuous.vp()
# Chains that do not preserve variance, one in real time and one in steps.
VE, NOISY = continuous.ve(), continuous.discretize(continuous.ve(), 9)
KEY, KEYS = jax.random.key(0), jax.random.split(jax.random.key(0), 3)
OLD = jax.random.PRNGKey(0)
X, NOW, THEN = jnp.ones([2, 3]), LIN(500), LIN(499)
PRED = gaussian.Prediction(X, X)
IMAGE, LABEL, TIMES = jnp.zeros([3, 2, 2, 1]), jnp.zeros(3, int), jnp.ones(3, int)
MASK = np.array([True, True, False, False]).reshape(1, 2, 2, 1)
DENOISE = gaussian.denoiser(lambda x, t: x, LIN, "eps")
DDPM, DDIM = samplers.ddpm(DENOISE, LIN), samplers.ddim(DENOISE, LIN)
GRID, DOWN = np.array([40, 30, 20, 10, 0]), np.array([2, 1, 0])
REMEMBERS = samplers.Sampler(
    lambda x, grid: x, lambda keys, x_t, memory, t, s: samplers.Step(x_t, memory, x_t)
)


def sample(rule, grid, shape=(1, 2, 2, 1), **options):
    return samplers.sample(KEY, rule, np.array(grid), shape, **options)


def trajectory(steps):
    return samplers.trajectory(KEY, DDPM, DOWN, (2, 3), steps)


def inpaint(mask=MASK, rule=DDPM, grid=GRID):
    return sample(editing.inpaint(rule, LIN, IMAGE[:1], mask), grid)


def vary_to_traced_depth(t):
    return editing.vary(KEY, REMEMBERS, LIN, GRID, IMAGE, t)


def interpolate(other=IMAGE, fractions=(0.0,)):
    return editing.interpolate(KEY, DDPM, LIN, GRID, IMAGE, other, 20, fractions)


def p_sample(variance):
    return gaussian.p_sample(KEY, PRED, X, NOW, THEN, variance=variance)


def free(label=LABEL, scale=1.0, **options):
    def network(x, t, label):
        return x

    guided = guidance.classifier_free(network, label, 2, scale=scale, **options)
    return guided(IMAGE, TIMES)


def by_classifier(log_prob, **options):
    return guidance.classifier(DENOISE, log_prob, LIN, **options)(IMAGE, TIMES)


def continuous_bound(made, draws=4):
    def bound(x0):
        denoise = gaussian.denoiser(lambda x, t: x, made, "eps")
        return likelihood.continuous_bound(KEY, denoise, made, x0, draws=draws)

    return bound


def ode_bits(key=KEY, **options):
    denoise = gaussian.denoiser(lambda x, t: 0 * x, VP, "x0")
    return likelihood.ode_bits_per_dim(key, denoise, VP, X, **options)


def integrate(**options):
    return ode.integrate(lambda x, t: -x, X, 0.0, 1.0, **options)


# What must be refused, and what the message must name behind "got".
REFUSED = {
    "schedule": [
        *(
            (lambda t=t: LIN(t), str(np.max(t)))
            for t in (-1, 1001, np.array([5, 2000]))
        ),
        (lambda: LIN(np.array([-3, 5])), "from -3"),
        (lambda: LIN(jnp.array(0.5)), "dtype float32"),
        (lambda: jax.jit(LIN)(jnp.array(0.5)), "dtype float32"),
        *(
            (lambda betas=betas: schedule.from_betas(betas), got)
            for betas, got in (
                ([], "shape (0,)"),
                (0.1, "shape ()"),
                ([[0.1]], "shape (1, 1)"),
                ([0.0, 0.1], "from 0 to 0.1"),
                ([-0.1, 0.1], "from -0.1"),
                ([1.0, 0.1], "to 1"),
                ([0.1, 1.5], "to 1.5"),
                ([0.1, np.nan], "nan"),
            )
        ),
        (lambda: schedule.linear(0), "0"),
        (lambda: schedule.cosine(10.0), "10.0"),
        (lambda: schedule.const("many"), "'many'"),
        (lambda: schedule.quad(None), "None"),
        (lambda: schedule.jsd(-1), "-1"),
        (lambda: schedule.sigmoid(0), "0"),
        (lambda: schedule.warmup(1.5), "1.5"),
        (lambda: schedule.warmup(fraction=0.0), "0.0"),
        (lambda: schedule.warmup(fraction=1.5), "1.5"),
        (lambda: schedule.sigmoid(start=3.0), "3.0"),
        (lambda: schedule.sigmoid(tau=0.0), "tau 0.0"),
        (lambda: schedule.sigmoid(end=np.nan), "nan"),
        (lambda: schedule.num_steps(VP), "_vp"),
    ],
    "continuous": [
        (lambda: continuous.vp(beta_min=0.0), "0.0"),
        (lambda: continuous.sub_vp(beta_min=3.0, beta_max=2.0), "3.0"),
        (lambda: continuous.ve(sigma_min=2.0, sigma_max=1.0), "2.0"),
        (lambda: continuous.ve(sigma_min=0.0), "0.0"),
        (lambda: continuous.cosine(logsnr_min=5.0, logsnr_max=5.0), "5.0"),
        (lambda: continuous.cosine(logsnr_max=np.nan), "nan"),
        (lambda: continuous.flow(alpha_min=0.0), "0.0"),
        (lambda: continuous.flow(alpha_min=1.0), "1.0"),
        (lambda: VP(1.5), "1.5"),
        (lambda: VP(np.nan), "nan"),
        (lambda: VE(np.array([-0.1, 0.5])), "-0.1"),
        (lambda: continuous.interpolate(TEN)(10.5), "10.5"),
        (lambda: continuous.shifted(VP, -1.0)(1.5), "1.5"),
        (lambda: continuous.interpolate(VP), "_vp"),
        (lambda: continuous.interpolate(NOISY), "off by"),
        (lambda: continuous.discretize(VP, 0), "0"),
        *(
            (lambda made=made: continuous.shifted(made, 1.0), "off by")
            for made in (VE, continuous.sub_vp(), continuous.flow(), NOISY)
        ),
        (lambda: continuous.shifted(VP, np.inf), "inf"),
        (lambda: continuous.shifted(VP, [1.0, 2.0]), "[1.0, 2.0]"),
    ],
    "learned": [
        (lambda: learned.init(KEY, logsnr_min=14.0), "14.0"),
        (lambda: learned.init(KEY, logsnr_max=np.nan), "nan"),
        (lambda: learned.init(KEY, width=0), "0"),
        (lambda: learned.init(KEY, width=2.5), "2.5"),
        (lambda: learned.schedule(learned.init(KEY))(1.5), "1.5"),
        (
            lambda: learned.minimise_variance(
                learned.init(KEY), jnp.array([0.1]), lambda level, slope: slope.mean()
            ),
            "()",
        ),
    ],
    "gaussian": [
        (lambda: gaussian.predict("epsilon", X, X, NOW), "'epsilon'"),
        (lambda: gaussian.target("flow", X, X, NOW), "'flow'"),
        (lambda: gaussian.predict("edm", X, X, NOW, sigma_data=-1.0), "-1.0"),
        (lambda: gaussian.target("edm", X, X, NOW, sigma_data=0.0), "0.0"),
        (lambda: gaussian.predict("mean", X, X, NOW), "prev_level=None"),
        (lambda: losses.simple(PRED, X, X, NOW, space="mean"), "prev_level=None"),
        (lambda: gaussian.denoiser(None, LIN, "noise"), "'noise'"),
        (lambda: gaussian.denoiser(None, LIN, "eps", variance="ranged"), "'ranged'"),
        (lambda: gaussian.denoiser(None, LIN, "eps", threshold=1.5), "1.5"),
        (lambda: gaussian.reverse_variance("fixed", NOW, THEN), "'fixed'"),
        (lambda: prediction.log_variance("big", PRED, NOW, THEN), "'big'"),
        (lambda: p_sample("big"), "'big'"),
        *((lambda v=v: p_sample(v), "none") for v in ("learned", "range", "analytic")),
        (lambda: gaussian.normal(KEYS, (2, 3)), "3"),
        (lambda: gaussian.normal(KEYS[:1], (2, 3)), "1"),
        # Under jit as well: the decoder takes its variance from a second step.
        (
            lambda: jax.jit(lambda t: losses.vlb(PRED, X, X, schedule.linear(1), t))(
                jnp.array([1, 1])
            ),
            "1",
        ),
    ],
    "weightings": [
        (lambda: weightings.min_snr(gamma=0), "0"),
        (lambda: weightings.p2(gamma=-1), "-1"),
        (lambda: weightings.p2(k=0), "0"),
        (lambda: weightings.edm(sigma_data=-0.5), "-0.5"),
        (lambda: weightings.slope(VP, jnp.array([0.0, 0.5])), "0"),
        (lambda: weightings.slope(TEN, jnp.array([0, 5])), "0"),
        (lambda: weightings.slope(TEN, 11), "11"),
        (lambda: weightings.slope(schedule.linear(1), 1), "1"),
    ],
    "timesteps": [
        *(
            (lambda make=make, i=i, size=size: make(KEY, i, size), got)
            for make in (timesteps.antithetic, timesteps.low_discrepancy)
            for i, size, got in (
                (np.arange(5), 4, "4"),
                (np.array([-1]), 4, "-1"),
                (np.arange(5), 0, "0"),
            )
        ),
        (lambda: timesteps.times(X, first=1), "1"),
        (lambda: timesteps.steps(X, 0), "0"),
        (lambda: timesteps.log_normal(X, VP, std=0), "0"),
        (lambda: timesteps.logit_normal(X, std=-1), "-1"),
        (lambda: timesteps.history(10, length=0), "0"),
        (lambda: timesteps.probabilities(timesteps.history(3), uniform=2), "2"),
        (lambda: timesteps.record(timesteps.history(3), np.array([4]), X), "4"),
    ],
    "grids": [
        *(
            (lambda make=make, steps=steps: make(TEN, steps), str(steps))
            for make in (grids.uniform, grids.quadratic, grids.logsnr, grids.karras)
            for steps in (0, 11)
        ),
        (lambda: grids.uniform(VP, -1), "-1"),
        (lambda: grids.uniform(VP), "_vp"),
        (lambda: grids.logsnr(TEN, 4, ends=(3, 5)), "(3, 5)"),
        (lambda: grids.logsnr(TEN, 4, ends=(3, 1)), "(3, 1)"),
        (lambda: grids.logsnr(TEN, 4, ends=(11, 5)), "(11, 5)"),
        (lambda: grids.karras(VP, 4, ends=(1.0, 0.0)), "(1.0, 0.0)"),
    ],
    "sde": [
        (lambda: sde.coefficients(TEN, 3.0), "10 whole steps"),
        (lambda: sde.flow(None, TEN), "10 whole steps"),
        (lambda: sde.reverse_drift(None, TEN), "10 whole steps"),
        (lambda: sde.coefficients(VP, 0.0), "0.0"),
        (lambda: sde.coefficients(VP, np.array([0.5, 0])), "[0.5 0. ]"),
        (lambda: sde.coefficients(VP, 1.5), "1.5"),
    ],
    "analytic": [
        (lambda: analytic.x0_variance(KEY, None, LIN, X, estimator="eps"), "'eps'"),
        (lambda: analytic.x0_variance(KEY, None, VP, X), "Timed("),
        (lambda: analytic.bounded(np.zeros(4), TEN), "(4,)"),
        (lambda: analytic.bounded(np.zeros(11), TEN, half_range=0.0), "0.0"),
        (lambda: analytic.attach(None, np.zeros([2, 2])), "(2, 2)"),
        (lambda: analytic.attach(None, np.zeros(5))(X, 0.5), "float32"),
    ],
    "guidance": [
        *(
            (lambda e=ends: guidance.within(LIN, *e), f"{ends[0]} and {ends[1]}")
            for ends in ((-0.1, 1.0), (2.0, 2.0), (3.0, 2.0))
        ),
        (lambda: free(LABEL[:2]), "shape (2,)"),
        (lambda: free(scale=jnp.ones(2)), "shape (2,)"),
        (lambda: free(channels=0), "0"),
        (lambda: free(channels=2), "2"),
        (lambda: by_classifier(lambda x, t: x[:, 0, :, 0]), "(3, 2)"),
        (lambda: by_classifier(lambda x, t: t, scale=jnp.ones(2)), "shape (2,)"),
    ],
    "samplers": [
        (lambda: samplers.ddpm(DENOISE, LIN, variance="fixedlarge"), "'fixedlarge'"),
        (lambda: samplers.ddim(DENOISE, LIN, eta=1.5), "1.5"),
        (lambda: sample(DDPM, [0, 1, 2]), "array([0, 1, 2])"),
        # Not nan images, an hour later.
        (lambda: sample(DDPM, [10, -1]), "-1"),
        (lambda: sample(REMEMBERS, [2, 2, 0]), "array([2, 2, 0])"),
        (lambda: sample(DDPM, [2]), "array([2])"),
        (lambda: sample(DDPM, [[2, 1]]), "array([[2, 1]])"),
        (lambda: sample(DDPM, DOWN, start=X), "(2, 3)"),
        (lambda: samplers.sample(OLD, DDPM, DOWN, (1, 2)), "uint32"),
        *(
            (lambda steps=steps: trajectory(steps), str(tuple(steps)))
            for steps in ([2], [-1], [0, 0], [])
        ),
    ],
    "solvers": [
        (lambda: solvers.dpm_solver_pp(DENOISE, LIN, order="4M"), "'4M'"),
        (lambda: solvers.unipc(DENOISE, LIN, order=4), "4"),
        (lambda: solvers.edm(DENOISE, LIN, churn=-1.0), "-1.0"),
        (lambda: solvers.edm(DENOISE, LIN, churn_range=(2.0, 1.0)), "2.0, 1.0"),
        (lambda: langevin.predictor_corrector(DENOISE, LIN, predictor="x"), "'x'"),
        (lambda: langevin.predictor_corrector(DENOISE, LIN, corrections=-1), "-1"),
        (lambda: langevin.predictor_corrector(DENOISE, LIN, snr=0.0), "0.0"),
        (lambda: langevin.langevin(DENOISE, LIN, moves=0), "0 and 0.2"),
        (lambda: langevin.langevin(DENOISE, LIN, step_size=3.0), "3.0"),
        (lambda: integrate(rtol=0.0), "0.0"),
        (lambda: integrate(atol=-1.0), "-1.0"),
        (lambda: ode.ode(None, VP, max_steps=0), "0"),
        (lambda: sample(ode.ode(DENOISE, VP), [1.0, 2.0, 0.5]), "2. "),
    ],
    "likelihood": [
        *(
            (lambda made=made, way=way: way(continuous_bound(made))(X), got)
            for made, got in (
                (TEN, "10 whole"),
                (VP, "inf"),
                (continuous.interpolate(TEN), "inf"),
            )
            for way in (lambda f: f, jax.jit)
        ),
        (lambda: continuous_bound(VE, draws=0)(X), "0"),
        (lambda: ode_bits(trace="radamacher"), "'radamacher'"),
        (lambda: ode_bits(probes=0), "0"),
        (lambda: ode_bits(start=0.0), "0.0"),
        (lambda: ode_bits(start=1.0), "1.0"),
        (lambda: ode_bits(rtol=0.0), "0.0"),
        (lambda: ode_bits(atol=-1.0), "-1.0"),
        (lambda: ode_bits(OLD), "uint32"),
        (lambda: ode_bits(KEYS), "(3,)"),
    ],
    "editing": [
        (lambda: editing.below(GRID, 41), "41"),
        (lambda: editing.below(GRID, -1), "-1"),
        (lambda: editing.below(GRID, 0.5), "0.5"),
        (lambda: editing.below(GRID / 40, np.nan), "nan"),
        (lambda: editing.encode(DDIM, np.array([10, 0]), IMAGE), "array([10,  0])"),
        (lambda: editing.encode(DDPM, GRID, IMAGE), "array([10, 20, 30, 40])"),
        (lambda: editing.repaint_grid(GRID, 4, 2), "4 and 2"),
        (lambda: editing.repaint_grid(GRID, 0, 2), "0 and 2"),
        (lambda: editing.repaint_grid(GRID, 2, 0), "2 and 0"),
        (lambda: inpaint(MASK.astype(int)), "int"),
        (lambda: inpaint(MASK[0]), "(2, 2, 1)"),
        (lambda: inpaint(MASK.repeat(3, axis=-1)), "(1, 2, 2, 3)"),
        (lambda: inpaint(rule=REMEMBERS, grid=[40, 20, 40, 0]), "carries"),
        (lambda: jax.jit(vary_to_traced_depth)(20), "carries"),
        (lambda: inpaint(grid=[0, 20, 40]), "ends at 40"),
        (lambda: inpaint(grid=[2000, 20, 0]), "2000"),
        (lambda: interpolate(IMAGE.repeat(2, axis=0)), "(6, 2, 2, 1)"),
        (lambda: interpolate(fractions=0.5), "shape ()"),
    ],
}


@pytest.mark.parametrize("module", REFUSED)
def test_bad_input_is_refused(module, refuses):
    for call, got in REFUSED[module]:
        with refuses(got):
            call()


def test_what_is_traced_cannot_be_refused_and_reads_nan():
    t = jnp.array([-1, -11, 0, 10, 11])
    level = jax.jit(TEN)(t)
    for field in (*level, level.alpha, level.sigma):
        np.testing.assert_array_equal(np.isnan(field), [1, 1, 0, 0, 1])
    slope = jax.jit(lambda t: weightings.slope(TEN, t))(t)
    np.testing.assert_array_equal(np.isnan(slope), [1, 1, 1, 0, 1])
    f, g = jax.jit(lambda t: sde.coefficients(VP, t))(0.0)
    np.testing.assert_allclose([f, g], [-0.05, np.nan])


def test_hints_name_what_was_meant():
    with pytest.raises(ValueError, match="Did you mean 'eps'"):
        gaussian.predict("epsilon", X, X, NOW)
    with pytest.raises(ValueError) as caught:
        gaussian.reverse_variance("learned", NOW, THEN)
    assert "Did you mean 'learned'" not in str(caught.value)
