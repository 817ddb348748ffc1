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
LINEAR, VP = schedule.linear(), continuous.vp()
MADE = {name: truth.schedule for name, truth in SDES.items()}
MADE |= {
    "linear": continuous.interpolate(LINEAR),
    "cosine": continuous.interpolate(schedule.cosine()),
}
NUMBERED = dict(zip(MADE, numbered(MADE.values()), strict=True))
LAST = 1e-3


def start(count=8, std=1.0, seed=2):
    numbers = np.random.default_rng(seed).normal(size=(count, 2, 2, 1))
    return jnp.asarray(std * numbers, float)


@cache
def follow(tolerance):
    options = {"rtol": tolerance, "atol": tolerance}
    return jax.jit(
        lambda made, x: ode.follow(
            sde.flow(DATA.denoiser(made), made), made, x, 1.0, LAST, **options
        )
    )


def errors(name, tolerance=1e-5):
    made = NUMBERED[name]
    x = start(std=float(made(1.0).sigma))
    solved = follow(tolerance)(made, x)
    return np.abs(solved.x - DATA.flow(x, made(1.0), made(LAST))).max(), solved


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


def test_samples_end_in_the_exact_flow_and_encoding_leads_back(x64):
    """All along grids of at most four steps, by one program."""
    made, x, x0 = MADE["linear"], start(), start(std=0.5)
    rule = samplers.padded(ode.ode(DATA.denoiser(made), LINEAR, **TOLERANCES))
    run = jax.jit(lambda grid, x: samplers.sample(KEY, rule, grid, x.shape, start=x))

    def draw(x, *grid):
        return run(jnp.asarray(samplers.pad(np.array(grid), 4)), x)

    def off(found, x, t, s):
        return np.abs(found - DATA.flow(x, made(float(t)), made(float(s)))).max()

    found, near = draw(x, 1000, 500, 1, 0), draw(x, 1000, 500, 1)
    # The last step, where the flow is singular, is DDIM's: one of order one.
    assert off(found, x, 1000, 0) < 1e-3
    assert off(near, x, 1000, 1) < 1e-4
    seen = DATA.denoiser(made)(near, jnp.asarray(1.0)).x0
    np.testing.assert_allclose(found, seen, rtol=1e-9, atol=1e-12)
    noise = draw(x0, 1, 500, 1000)
    assert off(noise, x0, 1, 1000) < 5e-4
    np.testing.assert_allclose(draw(noise, 1000, 500, 1), x0, atol=2e-4)
    # From data themselves the first step is DDIM's, at time 0.
    assert 0 < np.abs(draw(x0, 0, 1, 500, 1000) - noise).max() < 0.1


def test_evaluations_are_counted_and_none_is_needless():
    """Only the solve in a step to noise, only DDIM's one evaluation in that to data."""
    calls, x = [], start(1)
    rule = ode.ode(samplers.counted(DATA.denoiser(VP), calls), VP, **TOLERANCES)
    run = jax.jit(lambda grid: samplers.sample(KEY, rule, grid, x.shape, start=x))
    field = sde.flow(DATA.denoiser(VP), VP)
    solved = ode.follow(field, VP, x, 1.0, LAST, **TOLERANCES).evaluations[0]
    # A callback keeps alive the prediction that a Step records: one more.
    for last, count in ((0.0, 2), (LAST, solved + 1)):
        calls.clear()
        jax.block_until_ready(run(jnp.array([1.0, last])))
        jax.effects_barrier()
        assert len(calls) == count


def test_the_limit_of_steps_is_never_silent(refuses):
    x, field = jnp.ones([3, 2]), lambda x, t, rate: -rate[:, None] * x
    rates = jnp.array([1.0, 1000.0, 1.0])
    limited = partial(ode.integrate, field, max_steps=20, **TOLERANCES)
    with refuses("20, which was not for 1 of 3"):
        limited(x, 0.0, 1.0, rates)
    end, _ = jax.jit(lambda x: limited(x, 0.0, 1.0, rates))(x)
    np.testing.assert_array_equal(np.isnan(end), [[0, 0], [1, 1], [0, 0]])
    rule = ode.ode(DATA.denoiser(VP), VP, max_steps=3)
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
