"""The adaptive solver against exact flows, and what it costs."""

import builtins
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from continuous_oracles import SDES, exact_denoiser, exact_flow, gaussian_image
from jax.sharding import AxisType, PartitionSpec

from diffusion_jax import continuous, ode, samplers, schedule, sde

pytestmark = pytest.mark.optimised

DATA = gaussian_image()
KEY = jax.random.key(0)
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}
ENDS = {
    **{name: (truth.schedule, 1.0, 1e-3) for name, truth in SDES.items()},
    "linear": (continuous.interpolate(schedule.linear()), 1000.0, 1.0),
    "cosine": (continuous.interpolate(schedule.cosine()), 1000.0, 1.0),
}


def start(count=8, std=1.0, seed=2):
    numbers = np.random.default_rng(seed).normal(size=(count, 2, 2, 1))
    return jnp.asarray(std * numbers, float)


def level(made, t):
    return float(made(t).alpha), float(made(t).sigma)


def follow(name, x, **options):
    made, first, last = ENDS[name]
    field = sde.flow(exact_denoiser(DATA, made), made)
    return jax.jit(lambda x: ode.follow(field, made, x, first, last, **options))(x)


def errors(name, **options):
    made, first, last = ENDS[name]
    x = start(std=level(made, first)[1])
    truth = exact_flow(DATA, x, level(made, first), level(made, last))
    solved = follow(name, x, **options)
    return np.abs(solved.x - truth).max(), solved


@pytest.mark.parametrize("name", ENDS)
def test_ends_where_the_exact_flow_does(name, x64):
    error, solved = errors(name, **TOLERANCES)
    assert error < 10 * 1e-5
    assert 60 < solved.evaluations.min() <= solved.evaluations.max() < 200
    assert solved.x.dtype == jnp.float64


@pytest.mark.parametrize("name", ["ve", "linear"])
def test_single_precision_is_enough_for_the_usual_tolerance(name):
    error, solved = errors(name, **TOLERANCES)
    assert error < 10 * 1e-5
    assert solved.x.dtype == jnp.float32


@pytest.mark.parametrize("name", ["linear"])
def test_a_tighter_tolerance_is_more_exact_and_costs_more(name, x64):
    """A step of a method of fifth order has an error in h^5 or h^6: its solution's, or
    that of the fourth-order one beside it. The number of steps grows accordingly."""
    found = [errors(name, rtol=tol, atol=tol) for tol in (1e-3, 1e-6, 1e-9)]
    size = np.array([error for error, _ in found])
    assert np.all(size[1:] < 0.01 * size[:-1]), size
    cost = np.array([solved.evaluations.mean() for _, solved in found])
    order = np.log(1e3) / np.log(cost[2] / cost[1])
    assert 4.5 < order < 7, cost


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 2.0), (2.0, 0.0), (1.0, 1.0)])
def test_any_state_in_both_directions_of_time(t0, t1, precision):
    """x' = cos(t) x and y' = t: x = x0 exp(sin t1 - sin t0)."""
    state = {"x": start(3), "y": jnp.arange(3.0)}

    def field(state, t):
        assert state["x"].shape == (1, 2, 2, 1)
        rate = jnp.cos(t).reshape(-1, 1, 1, 1) * state["x"]
        return {"x": rate, "y": t}

    end, evaluations = ode.integrate(field, state, t0, t1, rtol=1e-6, atol=1e-6)
    close = {"rtol": 1e-5, "atol": 1e-6}
    scale = np.exp(np.sin(t1) - np.sin(t0))
    np.testing.assert_allclose(end["x"], scale * state["x"], **close)
    shift = (t1**2 - t0**2) / 2
    np.testing.assert_allclose(end["y"], state["y"] + shift, **close)
    assert end["x"].dtype == end["y"].dtype == precision
    assert np.all((evaluations > 0) == (t0 != t1))


def test_evaluations_are_counted(x64):
    """The field is called as often as is said."""
    calls = []

    def field(x, t):
        jax.debug.callback(lambda _: calls.append(1), t)
        return -x * jnp.sin(10 * t)[:, None]

    alone = jax.jit(lambda x: ode.integrate(field, x, 0.0, 2.0, rtol=1e-4, atol=1e-4))
    _, evaluations = jax.block_until_ready(alone(jnp.ones([1, 1])))
    jax.effects_barrier()
    assert len(calls) == evaluations[0] > 50


def test_each_example_has_its_own_steps(x64):
    """Rates from slow to fast: their costs differ, and are what each costs alone."""
    rates = jnp.array([0.1, 1.0, 10.0, 100.0])

    def field(x, t, rate):
        return -rate[:, None] * x * jnp.cos(t)[:, None]

    def run(rates):
        x = jnp.ones([len(rates), 3])
        return ode.integrate(field, x, 0.0, 1.0, rates, **TOLERANCES)

    end, evaluations = jax.jit(run)(rates)
    assert np.all(np.diff(evaluations) > 0)
    for i in range(4):
        alone = jax.jit(run)(rates[i : i + 1])
        np.testing.assert_allclose(alone.x[0], end[i], rtol=1e-12)
        assert alone.evaluations[0] == evaluations[i]


@pytest.mark.parametrize("name", ["linear"])
def test_an_example_does_not_depend_on_its_batch(name, x64):
    x = start(6)
    whole, evaluations = follow(name, x, **TOLERANCES)
    assert len(set(evaluations.tolist())) > 1
    for i in (0, 3, 5):
        alone = follow(name, x[i : i + 1], **TOLERANCES)
        # In float32 a rounding may decide whether a step is taken, by the processor.
        np.testing.assert_allclose(alone.x[0], whole[i], rtol=1e-9)


RULES = {
    "vp": (continuous.vp(), [1.0, 0.4, 1e-3, 0.0], 1.0),
    "ve": (continuous.ve(), [1.0, 0.4, 0.0], 50.0),
    "linear": (schedule.linear(), [1000, 500, 1, 0], 1.0),
}


@pytest.mark.parametrize("name", RULES)
def test_samples_end_in_the_exact_flow(name, x64):
    made, grid, std = RULES[name]
    real = continuous.interpolate(made) if name == "linear" else made
    rule = ode.ode(exact_denoiser(DATA, real), made, **TOLERANCES)
    x = start(std=std)
    grid = np.array(grid)
    found = samplers.sample(KEY, rule, grid, x.shape, start=x)
    before = level(real, grid[0])
    truth = exact_flow(DATA, x, before, level(real, grid[-1]))
    # The last step, where the flow is singular, is DDIM's: one of order one.
    assert np.abs(found - truth).max() < (1e-4 if name == "ve" else 1e-3)
    if name != "ve":
        near = samplers.sample(KEY, rule, grid[:-1], x.shape, start=x)
        truth = exact_flow(DATA, x, before, level(real, grid[-2]))
        assert np.abs(near - truth).max() < 1e-4
        last = samplers.ddim(exact_denoiser(DATA, real), real)
        jump = samplers.sample(
            KEY, last, grid[-2:].astype(float), x.shape, start=jnp.asarray(near)
        )
        np.testing.assert_allclose(jump, found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["linear"])
def test_encoding_and_decoding_gives_the_data_back(name, x64):
    made, grid, _ = RULES[name]
    real = continuous.interpolate(made) if name == "linear" else made
    rule = ode.ode(exact_denoiser(DATA, real), made, **TOLERANCES)
    x0 = start(std=0.5)
    down = np.array(grid)[:-1]
    noise = samplers.sample(KEY, rule, down[::-1].copy(), x0.shape, start=x0)
    truth = exact_flow(DATA, x0, level(real, down[-1]), level(real, down[0]))
    assert np.abs(noise - truth).max() < 5e-4
    again = samplers.sample(KEY, rule, down, x0.shape, start=noise)
    np.testing.assert_allclose(again, x0, atol=2e-4)
    # From data themselves the first step is DDIM's, at time 0.
    rising = np.array(grid)[::-1].copy()
    encoded = samplers.sample(KEY, rule, rising, x0.shape, start=x0)
    assert np.all(np.isfinite(encoded))
    assert 0 < np.abs(encoded - noise).max() < 0.1


def test_x0_of_a_trajectory_is_what_the_network_saw(x64):
    made = continuous.vp()
    denoise = exact_denoiser(DATA, made)
    rule, x = ode.ode(denoise, made), start(3)
    grid = np.array([1.0, 0.5, 1e-3, 0.0])
    end, path = samplers.trajectory(KEY, rule, grid, x.shape, (0, 1, 2), start=x)
    for k in range(3):
        seen = denoise(path.x_t[k], jnp.asarray(grid[k])).x0
        np.testing.assert_allclose(path.x0[k], seen, rtol=1e-9)
    np.testing.assert_array_equal(
        end, samplers.sample(KEY, rule, grid, x.shape, start=x)
    )


def test_nothing_is_evaluated_needlessly():
    """Only the solve in a step to noise, only DDIM's one evaluation in that to data."""
    made, calls = continuous.vp(), []

    def denoise(x, t):
        jax.debug.callback(lambda _: calls.append(1), t.ravel())
        return exact_denoiser(DATA, made)(x, t)

    rule, x = ode.ode(denoise, made, **TOLERANCES), start(1)
    samplers.sample(KEY, rule, np.array([1.0, 0.0]), x.shape, start=x)
    jax.effects_barrier()
    # A callback keeps alive the prediction that a Step records; two in all.
    assert len(calls) == 2
    calls.clear()
    samplers.sample(KEY, rule, np.array([1.0, 1e-3]), x.shape, start=x)
    jax.effects_barrier()
    field = sde.flow(exact_denoiser(DATA, made), made)
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
    rule = ode.ode(exact_denoiser(DATA, made), made, max_steps=3)
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
    """Of x0 exp(-k) in both."""

    def end(x, k):
        field = lambda x, t: -k * x  # noqa: E731
        options = {"rtol": 1e-9, "atol": 1e-9}
        return jax.jit(lambda x: ode.integrate(field, x, 0.0, 1.0, **options).x.sum())(
            x
        )

    by_x, by_k = jax.grad(end, (0, 1))(2 * jnp.ones([1, 1]), 0.7)
    np.testing.assert_allclose(by_x, [[np.exp(-0.7)]], rtol=1e-7)
    np.testing.assert_allclose(by_k, -2 * np.exp(-0.7), rtol=1e-7)


def test_second_call_compiles_nothing():
    traces, counts, made = [], [], continuous.vp()

    def denoise(x, t):
        traces.append(1)
        return exact_denoiser(DATA, made)(x, t)

    rule = ode.ode(denoise, made)
    for seed in (0, 1, 2):
        samplers.sample(
            jax.random.key(seed), rule, np.array([1.0, 1e-3, 0.0]), (2, 2, 2, 1)
        )
        counts.append(len(traces))
    assert counts == [counts[0]] * 3
    assert counts[0] > 0


def test_without_diffrax_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def broken(name, *args, **options):
        if name == "diffrax":
            raise ImportError("No module named 'diffrax'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match=r"must .*; got No module.*\[ode\]"):
        ode.integrate(lambda x, t: -x, jnp.ones([1, 1]), 0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "got"),
    [({"rtol": 0.0}, "0.0"), ({"atol": -1.0}, "-1.0"), ({"max_steps": 0}, "0")],
)
def test_bad_options_are_refused(options, got, refuses):
    with refuses(got):
        ode.integrate(lambda x, t: -x, jnp.ones([1, 1]), 0.0, 1.0, **options)
    with refuses(got):
        ode.ode(None, continuous.vp(), **options)


@pytest.mark.parametrize("grid", [[1.0, 2.0, 0.5], [1.5, 0.5]])
def test_a_grid_that_it_cannot_walk_is_refused(grid, refuses):
    made = continuous.vp()
    rule = ode.ode(exact_denoiser(DATA, made), made)
    with refuses("2. " if len(grid) == 3 else "1.5"):
        samplers.sample(KEY, rule, np.array(grid), (1, 2, 2, 1))
