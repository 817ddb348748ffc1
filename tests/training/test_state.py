"""The training step against closed-form truth on problems with known gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import hurt

from diffusion_jax.training import averages, parallel, state

LAST, SGD = averages.exponential(0.0), optax.sgd(1.0)
EACH = {"clip_each": True, "accumulate": 2}


def quadratic(params, batch, key):
    """Mean over the batch of |w - x|^2 / 2: its gradient is w - mean(x)."""
    return 0.5 * jnp.square(params["w"][None] - batch["x"]).sum(-1).mean()


def linear(params, batch, key):
    """Its gradient is mean(x)."""
    return (params["w"][None] * batch["x"]).sum(-1).mean()


def run(loss_fn, optimizer, batches, w=(0.0, 0.0), memory=(), **options):
    """The state after a step for each batch, and the metrics of all."""
    options = {"averages": [LAST], "clip_norm": None, **options}
    step = jax.jit(state.make_step(loss_fn, optimizer, **options))
    count = len(options["averages"])
    now = state.init(
        jax.random.key(0), {"w": jnp.array(w)}, optimizer, averages=count, memory=memory
    )
    seen = []
    for rows in batches:
        now, metrics = step(now, {"x": jnp.array(rows, jnp.float32)})
        seen.append(metrics)
    return now, seen


def cause_of(metrics):
    return state.CAUSES[int(metrics["cause"])]


STEEP, FLAT = [3.0, 4.0], [0.3, 0.4]  # gradients of norm 5 and 0.5
CLIPPED = [
    ([STEEP, STEEP], {}, [0.6, 0.8], 5.0),
    ([FLAT, FLAT], {}, FLAT, 0.5),  # not scaled up
    # Examples 0 and 2 go to the first part, 1 and 3 to the second.
    ([STEEP, FLAT] * 2, {}, [0.6, 0.8], 2.75),
    ([STEEP, FLAT] * 2, EACH, [0.45, 0.6], 0.75),
]


@pytest.mark.parametrize(("rows", "options", "moved", "norm"), CLIPPED)
def test_the_whole_gradient_is_clipped_or_officially_that_of_each_part(
    rows, options, moved, norm
):
    now, (seen,) = run(quadratic, SGD, [rows], clip_norm=1.0, **options)
    np.testing.assert_allclose(now.params["w"], moved, rtol=1e-6)
    np.testing.assert_allclose(seen["grad_norm"], norm, rtol=1e-6)
    loss = np.square(rows).sum(axis=1).mean() / 2
    np.testing.assert_allclose(seen["loss"], loss, rtol=1e-6)


def test_accumulated_gradient_is_that_of_the_whole_batch():
    batches = [np.random.default_rng(0).normal(size=(8, 2))] * 3
    whole, a = run(quadratic, optax.adam(0.1), batches)
    for parts in (2, 8):
        cut, b = run(quadratic, optax.adam(0.1), batches, accumulate=parts)
        np.testing.assert_allclose(cut.params["w"], whole.params["w"], rtol=1e-5)
        np.testing.assert_allclose(b[-1]["loss"], a[-1]["loss"], rtol=1e-6)


def test_average_with_ramp_weighs_as_its_formula_says():
    decay, rows = 0.7, np.random.default_rng(1).normal(size=(30, 2)).astype(np.float32)
    average = start = np.array([100.0, 50.0])
    means = [averages.exponential(decay, ramp=True), LAST]
    now, _ = run(linear, SGD, rows[:, None], start, averages=means)
    for n, w in enumerate(start - np.cumsum(rows.astype(np.float64), axis=0)):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * w
    np.testing.assert_allclose(now.ema_params["w"], average, rtol=1e-5)
    np.testing.assert_array_equal(now.averages[1]["w"], now.params["w"])


def test_key_is_folded_with_the_step_and_never_changes():
    def noisy(params, batch, key):
        return params["w"].sum() * 0 + jax.random.normal(key)

    now, seen = run(noisy, optax.sgd(0.1), [[[0.0, 0.0]]] * 3)
    key = jax.random.key(0)
    expected = [jax.random.normal(jax.random.fold_in(key, n)) for n in range(3)]
    np.testing.assert_array_equal([m["loss"] for m in seen], expected)
    assert jnp.array_equal(jax.random.key_data(now.key), jax.random.key_data(key))
    assert int(now.step) == 3


def test_tensorflow_adam_is_the_papers_last_form():
    grads = np.random.default_rng(2).normal(size=(5, 3))
    for eps in (1e-8, 1e-1):
        optimizer, w = state.tf_adam(0.01, eps=eps), jnp.zeros(3)
        memory, (m, v, truth) = optimizer.init(w), np.zeros((3, 3))
        for n, grad in enumerate(grads, start=1):
            updates, memory = optimizer.update(jnp.array(grad, jnp.float32), memory, w)
            w = optax.apply_updates(w, updates)
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            rate = 0.01 * np.sqrt(1 - 0.999**n) / (1 - 0.9**n)
            truth = truth - rate * m / (np.sqrt(v) + eps)
        np.testing.assert_allclose(w, truth, rtol=2e-4)


def test_learning_rate_rises_from_zero_and_falls_to_zero():
    constant = state.learning_rate(2e-4, warmup=5000)
    steps = np.array([0, 1, 2500, 5000, 800_000])
    expected = 2e-4 * np.minimum(steps / 5000, 1)
    np.testing.assert_allclose([constant(n) for n in steps], expected, atol=1e-10)
    falling = state.learning_rate(1.0, warmup=10, decay_steps=110)
    rates = [falling(n) for n in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="accumulate must be at least 1; got 0"):
        state.make_step(quadratic, SGD, averages=[LAST], accumulate=0)
    now = state.init(jax.random.key(0), {"w": jnp.zeros(2)}, SGD)
    step = state.make_step(quadratic, SGD, averages=[LAST, LAST])
    with pytest.raises(ValueError, match="as many as those of the state, 1; got 2"):
        step(now, {"x": jnp.ones((1, 2))})


@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_remembers_what_it_saw_of_the_whole_batch_in_order(parts):
    def loss(params, batch, key, memory):
        each = 0.5 * jnp.square(params["w"][None] - batch["x"]).sum(-1)
        return (each * (1 + memory["count"])).mean(), {"x": batch["x"], "each": each}

    def remember(memory, seen):
        return {"count": memory["count"] + 1, **seen}

    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    memory = {"count": jnp.zeros(()), "x": jnp.zeros((4, 2)), "each": jnp.zeros(4)}
    options = {"accumulate": parts, "memory": memory, "remember": remember}
    now, seen = run(loss, optax.sgd(0.1), [rows] * 2, **options)
    np.testing.assert_array_equal(now.memory["x"], rows)
    assert float(now.memory["count"]) == 2
    # The second step's loss knew of the first: it counts twice.
    twice = 2 * now.memory["each"].mean()
    np.testing.assert_allclose(seen[1]["loss"], twice, rtol=1e-6)


def fragile(params, batch, key, memory):
    """A quadratic whose examples can go wrong in the ways of state.CAUSES."""
    bad = batch["bad"]
    w = hurt(params["w"], (bad == 3).any())
    each = jnp.square(w[None] - batch["x"]).mean(-1)
    # The rate is 1e30: what is scaled by less stays finite, the rest does not.
    each = each * jnp.where(bad == 4, 1e14, 1e-31)
    each = jnp.where(bad == 2, jnp.inf, each)
    return each.mean(), {"each": each}


def remember(memory, seen):
    return {"sum": memory["sum"] + seen["each"].sum(), "count": memory["count"] + 1}


# By name: strategy, devices, devices that share a copy, micro-batches.
SPREADS = {
    "micro": ("mesh", 1, 1, 4),
    "mesh": ("mesh", 8, 1, 1),
    "fsdp": ("mesh", 8, 4, 1),
    "pmap": ("pmap", 8, 1, 1),
    "shard_map": ("shard_map", 8, 1, 1),
}


@pytest.mark.parametrize("spread", SPREADS)
def test_a_single_example_gone_wrong_skips_the_step_on_every_device(spread):
    strategy, devices, fsdp, parts = SPREADS[spread]
    mesh = parallel.make_mesh(devices, fsdp)
    optimizer = optax.sgd(1e30, momentum=0.9)
    step = state.make_step(
        parallel.gathered(fragile, mesh),
        optimizer,
        averages=[averages.exponential(0.5)],
        clip_norm=None,
        accumulate=parts,
        axis_name=None if strategy == "mesh" else parallel.AXIS,
        remember=remember,
    )
    params = {"a": jnp.zeros(()), "w": jnp.zeros(2048)}
    memory = {"sum": jnp.zeros(()), "count": jnp.zeros(())}
    now = state.init(jax.random.key(0), params, optimizer, memory=memory)
    now = parallel.place(now, parallel.state_sharding(now, mesh))
    compiled = parallel.data_parallel(step, mesh, strategy=strategy)
    x = np.random.default_rng(0).normal(size=(8, 2048)).astype(np.float32)

    def bits(one):
        one = one._replace(step=0, key=jax.random.key_data(one.key))
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(one)]

    # And once more without anything wrong.
    for number, cause in enumerate((*state.CAUSES, ""), 1):
        before, code = bits(now), state.CAUSES.index(cause)
        batch = {"x": x.copy(), "bad": np.zeros(8, np.int32)}
        batch["bad"][5] = code
        if cause == "batch":
            batch["x"][5, 7] = np.nan
        now, metrics = compiled(now, batch)
        assert cause_of(metrics) == cause
        assert int(metrics["skipped"]) == bool(cause)
        assert int(now.step) == number
        assert (bits(now) == before) == bool(cause)
        if cause == "gradient":
            assert int(metrics["tensor"]) == 1  # of w
            assert np.isfinite(metrics["loss"])
        if cause == "update":
            assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert int(now.memory["count"]) == 2
    kept = (now.params, now.averages, now.opt_state, now.memory)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))


def beyond(number):
    return lambda *given: quadratic(*given) + number


SKIPPED = [
    ("loss", beyond(np.nan), SGD, [[1.0, 2.0]], {}),
    ("loss", beyond(np.inf), SGD, [[1.0, 2.0]], {}),
    ("loss", beyond(-np.inf), SGD, [[1.0, 2.0]], {}),
    # Adam without epsilon, and a gradient of 0: 0 / 0.
    ("update", quadratic, optax.adam(0.1, eps=0.0), [[1.0, 0.0]], {}),
    # Clipped by itself to 1 / inf of its size, it would vanish among the others.
    ("gradient", linear, SGD, [[1e25, 0.0], [0.0, 0.5]], EACH | {"clip_norm": 1.0}),
]


@pytest.mark.parametrize(("cause", "loss", "optimizer", "rows", "options"), SKIPPED)
def test_a_step_is_skipped_for_what_is_not_finite_alone(
    cause, loss, optimizer, rows, options
):
    now, (metrics,) = run(loss, optimizer, [rows], **options)
    assert cause_of(metrics) == cause
    finite = {k: bool(np.isfinite(metrics[k])) for k in ("loss", "grad_norm")}
    assert finite == {"loss": cause != "loss", "grad_norm": cause != "gradient"}
    np.testing.assert_array_equal(now.params["w"], [0.0, 0.0])
    if cause == "update":
        unchecked, _ = run(loss, optimizer, [rows], check_update=False)
        assert np.isnan(unchecked.params["w"]).any()
