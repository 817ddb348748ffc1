"""All rules x schedules x predictions, on data whose best network is known."""

import ast
import functools
import inspect
import textwrap

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from oracles import SCHEDULES
from rules import RULES

from diffusion_jax import (
    continuous,
    gaussian,
    grids,
    langevin,
    ode,
    samplers,
    schedule,
    solvers,
)
from diffusion_jax.schedule import is_discrete
from diffusion_jax.training import parallel

KEY = jax.random.key(0)
MADE = {
    **{name: SCHEDULES[name]() for name in SCHEDULES if name != "from_betas"},
    "vp": continuous.vp(),
    "sub_vp": continuous.sub_vp(),
    "ve": continuous.ve(sigma_max=20.0),
    "interpolated": continuous.interpolate(schedule.linear()),
}
# jsd and cosine end in more noise than a step in sigma / alpha can be taken from.
FIRST = {"jsd": 995, "cosine": 990}
# const has much noise left in its first step, where every rule ends in the mean of x0:
# that takes so much of the variance away.
LAST_STEP = {"const": 0.1}
SOLVERS = (
    solvers.heun,
    solvers.edm,
    solvers.dpm_solver_pp,
    solvers.unipc,
    langevin.predictor_corrector,
    langevin.langevin,
)
every_rule = pytest.mark.parametrize("name", RULES)


def made_for(name, schedule_name):
    """The schedule, in real time for the rule that needs it."""
    made = MADE[schedule_name]
    return continuous.interpolate(made) if name == "ode" and is_discrete(made) else made


def grid_of(name, schedule_name):
    """The rule's grid, from a time at which there is some signal."""
    rule, made = RULES[name], made_for(name, schedule_name)
    grid = rule.grid(made, rule.steps)
    most = FIRST.get(schedule_name, continuous.last_time(made))
    return np.append(most, grid[grid < most]).astype(grid.dtype)


@functools.cache
def program(name, data_name, count):
    """Draws by a rule; schedule and grid are arguments, so most compile together."""
    rule = RULES[name]
    data = getattr(mixtures, data_name)(rule.shape)

    @jax.jit
    def draw(made, grid, std):
        sampler = samplers.padded(rule.make(data.denoiser(made), made))
        shape = (count, *data.shape)
        return samplers.sample(KEY, sampler, grid, shape, start_std=std)

    return data, draw


def drawn(name, schedule_name, data_name, count):
    data, draw = program(name, data_name, count)
    grid, made = grid_of(name, schedule_name), made_for(name, schedule_name)
    length = RULES[name].steps + 2 if len(grid) > 3 else 3
    level = made(grid[0])
    std = np.sqrt(level.alpha**2 + level.sigma**2)
    x = draw(made, jnp.asarray(samplers.pad(grid, length)), std)
    return data, np.asarray(x, np.float64)


@pytest.mark.parametrize("schedule_name", MADE)
@every_rule
def test_samples_have_the_weights_means_and_covariance_of_a_mixture(
    name, schedule_name
):
    """With schedules and grids as arguments of one compiled program."""
    count = 1000 if RULES[name].shape == (8, 8, 1) else 2000
    data, x = drawn(name, schedule_name, "two", count)
    error = 5 * np.sqrt(data.weights * (1 - data.weights) / len(x))
    np.testing.assert_array_less(np.abs(data.shares(x) - data.weights), error)
    hold_moments(RULES[name], data, x, LAST_STEP.get(schedule_name, 0))


@every_rule
def test_samples_have_the_moments_of_a_gaussian(name):
    count = 2000 if RULES[name].shape == (8, 8, 1) else 10_000
    data, x = drawn(name, "linear", "one", count)
    hold_moments(RULES[name], data, x)


def hold_moments(rule, data, x, extra=0.0):
    """Five standard errors, and some percent for the size of the steps."""
    flat = x.reshape(len(x), -1)
    size = np.sqrt(np.diag(data.cov))
    error = np.abs(flat.mean(axis=0) - data.mean) / size
    assert error.max() < 5 / np.sqrt(len(x)) + 0.02
    error = np.abs(np.cov(flat.T) - data.cov) / np.outer(size, size)
    off = error - rule.excess * np.abs(data.cov) / np.outer(size, size)
    assert off.max() < 5 * np.sqrt(2 / len(x)) + 0.04 + extra


def test_the_oracle_itself_is_bayes_rule(x64):
    """E[x0 | x_t] and E[eps | x_t] of a mixture, by quadrature on one pixel."""
    weights, means, stds = [0.3, 0.7], [0.5, -0.4], [0.2, 0.1]
    covs = [[[std**2]] for std in stds]
    data = mixtures.Mixture(weights, means, covs, (1,))
    x0 = np.linspace(-3, 3, 20_001)
    density = sum(
        w * np.exp(-0.5 * ((x0 - m) / s) ** 2) / s
        for w, m, s in zip(weights, means, stds, strict=True)
    )
    for made, t in ((MADE["linear"], 200), (MADE["ve"], 0.4)):
        level = made(t)
        for x_t in (-0.5, 0.1, 1.0):
            noise = (x_t - float(level.alpha) * x0) / float(level.sigma)
            post = density * np.exp(-0.5 * noise**2)
            pred = data.denoiser(made)(jnp.full([1, 1], x_t), t)
            np.testing.assert_allclose(pred.x0[0, 0], (post @ x0) / post.sum(), 1e-6)
            np.testing.assert_allclose(
                pred.eps[0, 0], (post @ noise) / post.sum(), 1e-6
            )


# The others are these with another number in the same lines.
OTHERS = {"ddpm-small", "ddim-half", "ddim-full", "dpm_solver_pp-1", "unipc-1"}


@pytest.mark.parametrize("name", [name for name in RULES if name not in OTHERS])
def test_the_prediction_does_not_matter(name, x64):
    """A perfect network of every kind draws the same samples."""
    rule, real = RULES[name], MADE["interpolated"]
    data = mixtures.one()
    truth = data.denoiser(real)

    def output(kind, x, t):
        if kind == "edm":
            # It is fed c_in x_t / alpha and c_noise: back to x_t and t.
            t = continuous.time_of(real, -8 * t)
            level = real(t).like(x)
            x = x * jnp.sqrt(level.sigma**2 + 0.25 * level.alpha**2)
        pred = truth(x, t)
        # mean stands for the posterior's of the step to t - 1.
        return gaussian.target(kind, pred.x0, pred.eps, real(t), real(t - 1))

    made = made_for(name, "linear")
    grid = grid_of(name, "linear")
    grid = np.unique(np.rint(grid).astype(int) if name != "ode" else grid)[::-1]
    grid = grid if name == "ode" else np.append(grid[:-1:5], 0)
    ends = []
    for kind in gaussian.KINDS:
        net = functools.partial(output, kind)
        denoise = gaussian.denoiser(net, made, kind, time_shift=0)
        ends.append(rule.make(denoise, made))
    shape = (3, *data.shape)
    ends = [samplers.sample(KEY, sampler, grid, shape) for sampler in ends]
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], rtol=1e-6, atol=1e-8)


def tiny(x, t):
    """A network of no use, of any shape.

    It is slow in t: of faster waves the steps of an adaptive rule would meet a few, and
    which ones would depend on rounding.
    """
    return jnp.tanh(x + 0.1 * jnp.cos(t / 300).reshape(-1, *[1] * (x.ndim - 1)))


CASES = [
    ((1, 3), {"clip": True}),
    ((2, 5, 7, 3), {"threshold": 0.9}),
    ((10_000, 2), {"clip": True}),
]


@pytest.mark.parametrize(("shape", "options"), CASES)
@every_rule
def test_any_shape_in_bfloat16_clipped(name, shape, options):
    rule, made = RULES[name], made_for(name, "linear")

    def net(x, t):
        return tiny(x.astype(jnp.bfloat16), t.astype(jnp.bfloat16))

    denoise = gaussian.denoiser(net, made, "eps", **options)
    grid = rule.grid(made, 6)
    sampler, last = rule.make(denoise, made), len(grid) - 2
    end, seen = samplers.trajectory(KEY, sampler, grid, shape, [0, last])
    assert (end.shape, end.dtype) == (shape, jnp.float32)
    assert seen.x_t.shape == seen.x0.shape == (2, *shape)
    assert np.abs(seen.x0).max() <= 1 + 1e-6
    assert np.all(np.isfinite(end))
    if name != "pc-reverse":  # whose last step is no mean of x0
        assert np.abs(end).max() <= 1 + 1e-6


@every_rule
def test_many_devices_draw_what_one_draws(name):
    """Under jit over a mesh and under pmap: example i depends on (key, i) alone."""
    rule, made = RULES[name], made_for(name, "linear")
    sampler = rule.make(gaussian.denoiser(tiny, made, "v"), made)
    grid, mesh = rule.grid(made, 6), parallel.make_mesh()
    one = samplers.sample(KEY, sampler, grid, (8, 2, 2, 1))
    out = NamedSharding(mesh, PartitionSpec("data"))
    many = jax.jit(
        lambda key: samplers.sample(key, sampler, grid, (8, 2, 2, 1)), out_shardings=out
    )(KEY)
    each = jax.pmap(
        lambda first: samplers.sample(KEY, sampler, grid, (1, 2, 2, 1), first=first)
    )(jnp.arange(8))
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(each[:, 0], one, rtol=1e-4, atol=1e-5)


EVALUATIONS = {
    **dict.fromkeys(RULES, lambda n: n),
    "heun": lambda n: 2 * n - 1,
    "edm": lambda n: 2 * n - 1,
    "dpm_solver_pp-2S": lambda n: 2 * n - 1,
    "pc-reverse": lambda n: 2 * n - 1,
    "pc-ancestral": lambda n: 2 * n - 1,
    "langevin": lambda n: 30 * n + 1,
}


@every_rule
def test_evaluations_are_counted(name):
    if name == "ode":
        pytest.skip("as many as the tolerance takes: tests/test_ode.py")
    rule, lin = RULES[name], MADE["linear"]
    denoise = gaussian.denoiser(tiny, lin, "v")
    for steps in (1, 5):
        grid = grids.uniform(lin, steps)
        count = samplers.count_evaluations(
            lambda counted: rule.make(counted, lin), denoise, grid, (3, 2)
        )
        assert count == EVALUATIONS[name](steps)


@every_rule
def test_a_padded_grid_changes_nothing(name):
    rule, made = RULES[name], made_for(name, "linear")
    sampler = rule.make(gaussian.denoiser(tiny, made, "v"), made)
    grid = rule.grid(made, 6)
    plain = samplers.sample(KEY, sampler, grid, (2, 3))
    filled = jax.jit(
        lambda grid: samplers.sample(KEY, samplers.padded(sampler), grid, (2, 3))
    )(jnp.asarray(samplers.pad(grid, 20)))
    np.testing.assert_allclose(filled, plain, rtol=1e-5, atol=1e-6)


@every_rule
def test_grids_that_cannot_be_walked_are_refused(name, refuses):
    rule, lin = RULES[name], MADE["linear"]
    sampler = rule.make(gaussian.denoiser(tiny, MADE["interpolated"], "v"), lin)
    with refuses("2000"):
        samplers.sample(KEY, sampler, np.array([2000, 0]), (1, 3))
    with refuses("array([5, 7, 0])"):
        samplers.sample(KEY, sampler, np.array([5, 7, 0]), (1, 3))


@pytest.mark.parametrize(
    "rule", [samplers.ddpm, samplers.ddim, ode.ode, *SOLVERS], ids=lambda r: r.__name__
)
def test_a_rule_is_read_on_one_screen(rule):
    """At most 40 lines, its docstring aside."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(rule))).body[0]
    doc = tree.body[0]
    assert tree.end_lineno - (doc.end_lineno - doc.lineno + 1) <= 40
