"""The adaptive solver against exact flows, and what it costs."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
from continuous_oracles import SDES, numbered
from jax.sharding import AxisType, PartitionSpec

from diffusion_jax import continuous, ode, samplers, schedule, sde

DATA = mixtures.one()
KEY = jax.random.key(0)
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}
STEPS = {name: getattr(schedule, name)() for name in ("linear", "cosine")}
REAL = {name: continuous.interpolate(made) for name, made in STEPS.items()}
MADE = {**{name: truth.schedule for name, truth in SDES.items()}, **REAL}
NUMBERED = dict(zip(MADE, numbered(MADE.values()), strict=True))
LAST = 1e-3


def start(count=8, std=1.0, seed=2):
    numbers = np.random.default_rng(seed).normal(size=(count, 2, 2, 1))
    return jnp.asarray(std * numbers, float)


@cache
def follow(tolerance):
    @jax.jit
    def run(made, x):
        field = sde.flow(DATA.denoiser(made), made)
        options = {"rtol": tolerance, "atol": tolerance}
        return ode.follow(field, made, x, 1.0, LAST, **options)

    return run


def errors(name, tolerance=1e-5):
    made = NUMBERED[name]
    high, low = made(1.0), made(LAST)
    x = start(std=float(high.sigma))
    solved = follow(tolerance)(made, x)
    return np.abs(solved.x - DATA.flow(x, high, low)).max(), solved


def test_ends_where_the_exact_flow_does(precision):
    for name in MADE if precision == "float64" else ("ve", "linear"):
        error, solved = errors(name)
        assert error < 10 * 1e-5, name
        assert 60 < solved.evaluations.min() <= solved.evaluations.max() < 200, name
        assert solved.x.dtype == precision


def test_a_tighter_tolerance_is_more_exact_and_costs_more(x64):
    """A step of a method of fifth order has an error in h^5 or h^6: its solution's, or
    that of the fourth-order one beside it. The number of steps grows accordingly."""
    (loose, one), (tight, other) = (errors("linear", tol) for tol in (1e-5, 1e-8))
    assert tight < 0.01 * loose
    ratio = other.evaluations.mean() / one.evaluations.mean()
    assert 4.5 < np.log(1e3) / np.log(ratio) < 7


def test_any_state_in_both_directions_of_time(precision):
    """x' = cos(t) x and y' = t: x = x0 exp(sin t1 - sin t0)."""
    state = {"x": start(3), "y": jnp.arange(3.0)}

    def field(state, t):
        assert state["x"].shape == (1, 2, 2, 1)
        rate = jnp.cos(t).reshape(-1, 1, 1, 1) * state["x"]
        return {"x": rate, "y": t}

    solve = jax.jit(partial(ode.integrate, field, rtol=1e-6, atol=1e-6))
    for t0, t1 in ((0.0, 2.0), (2.0, 0.0), (1.0, 1.0)):
        end, evaluations = solve(state, t0, t1)
        close = {"rtol": 1e-5, "atol": 1e-6}
        scale = np.exp(np.sin(t1) - np.sin(t0))
        np.testing.assert_allclose(end["x"], scale * state["x"], **close)
        shift = (t1**2 - t0**2) / 2
        np.testing.assert_allclose(end["y"], state["y"] + shift, **close)
        assert end["x"].dtype == end["y"].dtype == precision
        assert np.all((evaluations > 0) == (t0 != t1))


def test_each_example_has_its_own_steps(x64):
    """Rates from slow to fast: their costs differ, and are what each costs alone."""
    rates = jnp.array([0.1, 1.0, 10.0, 100.0])

    def field(x, t, rate):
        return -rate[:, None] * x * jnp.cos(t)[:, None]

    @jax.jit
    def run(rates):
        x = jnp.ones([len(rates), 3])
        return ode.integrate(field, x, 0.0, 1.0, rates, **TOLERANCES)

    end, evaluations = run(rates)
    assert np.all(np.diff(evaluations) > 0)
    for i in range(4):
        alone = run(rates[i : i + 1])
        np.testing.assert_allclose(alone.x[0], end[i], rtol=1e-12)
        assert alone.evaluations[0] == evaluations[i]


@cache
def draw():
    """Draws along any grid of at most four steps of "linear", as one program."""
    denoise = DATA.denoiser(MADE["linear"])
    rule = samplers.padded(ode.ode(denoise, STEPS["linear"], **TOLERANCES))
    run = jax.jit(lambda grid, x: samplers.sample(KEY, rule, grid, x.shape, start=x))
    return lambda grid, x: run(jnp.asarray(samplers.pad(np.array(grid), 4)), x)


def test_samples_end_in_the_exact_flow(x64):
    made, x, grid = MADE["linear"], start(), [1000, 500, 1, 0]
    found, near = draw()(grid, x), draw()(grid[:-1], x)
    ends = [made(float(t)) for t in grid]
    # The last step, where the flow is singular, is DDIM's: one of order one.
    assert np.abs(found - DATA.flow(x, ends[0], ends[-1])).max() < 1e-3
    assert np.abs(near - DATA.flow(x, ends[0], ends[-2])).max() < 1e-4
    seen = DATA.denoiser(made)(near, jnp.asarray(1.0)).x0
    np.testing.assert_allclose(found, seen, rtol=1e-9, atol=1e-12)


def test_encoding_and_decoding_gives_the_data_back(x64):
    made, run, x0 = MADE["linear"], draw(), start(std=0.5)
    down = [1000, 500, 1]
    noise = run(down[::-1], x0)
    assert np.abs(noise - DATA.flow(x0, made(1.0), made(1000.0))).max() < 5e-4
    np.testing.assert_allclose(run(down, noise), x0, atol=2e-4)
    # From data themselves the first step is DDIM's, at time 0.
    encoded = run([0, *down[::-1]], x0)
    assert np.all(np.isfinite(encoded))
    assert 0 < np.abs(encoded - noise).max() < 0.1


def test_evaluations_are_counted_and_none_is_needless():
    """Only the solve in a step to noise, only DDIM's one evaluation in that to data."""
    made, calls = continuous.vp(), []

    def denoise(x, t):
        jax.debug.callback(lambda _: calls.append(1), t.ravel())
        return DATA.denoiser(made)(x, t)

    rule, x = ode.ode(denoise, made, **TOLERANCES), start(1)
    run = jax.jit(lambda grid: samplers.sample(KEY, rule, grid, x.shape, start=x))
    jax.block_until_ready(run(jnp.array([1.0, 0.0])))
    jax.effects_barrier()
    # A callback keeps alive the prediction that a Step records; two in all.
    assert len(calls) == 2
    calls.clear()
    jax.block_until_ready(run(jnp.array([1.0, 1e-3])))
    jax.effects_barrier()
    field = sde.flow(DATA.denoiser(made), made)
    solved = ode.follow(field, made, x, 1.0, 1e-3, **TOLERANCES)
    assert len(calls) == solved.evaluations[0] + 1


def test_the_limit_of_steps_is_never_silent(refuses):
    x, field = jnp.ones([3, 2]), lambda x, t, rate: -rate[:, None] * x
    rates = jnp.array([1.0, 1000.0, 1.0])
    limited = partial(ode.integrate, field, max_steps=20, **TOLERANCES)
    with refuses("20, which was not for 1 of 3"):
        limited(x, 0.0, 1.0, rates)
    end, _ = jax.jit(lambda x: limited(x, 0.0, 1.0, rates))(x)
    np.testing.assert_array_equal(np.isnan(end), [[0, 0], [1, 1], [0, 0]])
    made = continuous.vp()
    rule = ode.ode(DATA.denoiser(made), made, max_steps=3)
    x = start(2)
    out = samplers.sample(KEY, rule, np.array([1.0, 1e-3]), x.shape, start=x)
    assert np.all(np.isnan(out))


def test_shard_map_that_checks_is_refused_with_what_to_do(refuses):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")

    def run(x):
        return ode.integrate(lambda x, t: -x, x, 0.0, 1.0).x

    with refuses("one that does"):
        jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)(start(8))


def test_gradients_reach_state_and_parameters(x64):
    def end(x, k):
        solved = ode.integrate(lambda x, t: -k * x, x, 0.0, 1.0, rtol=1e-9, atol=1e-9)
        return solved.x.sum()

    by_x, by_k = jax.jit(jax.grad(end, (0, 1)))(2 * jnp.ones([1, 1]), 0.7)
    np.testing.assert_allclose(by_x, [[np.exp(-0.7)]], rtol=1e-7)
    np.testing.assert_allclose(by_k, -2 * np.exp(-0.7), rtol=1e-7)
