"""Checkpoints come back as they were, or say why not."""

import functools
import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.training import averages, parallel, state


def tree():
    return {
        "w": jnp.arange(16.0).reshape(8, 2),
        "half": jnp.ones(3, jnp.bfloat16),
        "count": jnp.array(7),
        "key": jax.random.key(3),
    }


def raw(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf))
    return np.asarray(leaf)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(raw(x), raw(y))


def on(devices):
    return parallel.replicated(parallel.make_mesh(devices))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_state_comes_back_on_any_number_of_devices(tmp_path, devices):
    with checkpoint.open_folder(tmp_path / "c") as folder:
        checkpoint.save(folder, 5, jax.device_put(tree(), on(8)), {"note": [1.5]})
        checkpoint.wait(folder)
    with checkpoint.open_folder(tmp_path / "c", read_only=True) as folder:
        like = jax.eval_shape(tree)
        restored, meta, *_ = checkpoint.restore(folder, like, on(devices))
    assert_same(restored, tree())
    assert meta == {"note": [1.5]}
    assert restored["w"].sharding.num_devices == devices


def test_saves_leave_nothing_in_memory(tmp_path):
    """A leaf that is left five objects of would show."""
    state, blocks = {f"w{i}": jnp.ones(4) * i for i in range(30)}, []
    with checkpoint.open_folder(tmp_path / "c", keep=1) as folder:
        for step in range(1, 13):
            checkpoint.save(folder, step, state, {})
            checkpoint.wait(folder)
            gc.collect()
            blocks.append(sys.getallocatedblocks())
    assert np.median(np.diff(blocks[4:])) < 150


@functools.cache
def made(devices, fsdp):
    """A first state, where its leaves are put, and the step of training."""
    params = {"w": jnp.ones([32, 64]) / 10, "b": jnp.zeros(64)}
    optimizer = optax.adam(1e-2)
    first = state.init(jax.random.key(0), params, optimizer)
    mesh = parallel.make_mesh(devices, fsdp)

    def loss(params, batch, key):
        out = batch @ params["w"] + params["b"][None]
        # Short sums: their order, which is the devices', moves the last bit alone.
        return ((out - 0.5) ** 2).mean(axis=1).mean()

    step = state.make_step(
        parallel.gathered(loss, mesh), optimizer, averages=[averages.exponential(0.9)]
    )
    placed = parallel.state_sharding(first, mesh)
    return first, placed, parallel.data_parallel(step, mesh)


def trained(mesh, steps, now=None):
    """The state after some steps, from another if one is given, and its loss."""
    first, placed, step = made(*mesh)
    if now is None:
        now = jax.device_put(jax.tree.map(jnp.copy, first), placed)
    rows = np.random.default_rng(1).normal(size=(8, 32)).astype(np.float32)
    for _ in range(steps):
        now, metrics = step(now, rows)
    return now, float(metrics["loss"])


@pytest.mark.parametrize(
    ("wrote", "reads"),
    [
        ((8, 4), [(1, 1), (2, 2), (4, 1)]),
        ((4, 1), [(2, 2), (8, 4)]),
        ((1, 1), [(8, 4)]),
    ],
    ids=str,
)
def test_training_goes_on_from_any_mesh_on_any_other(tmp_path, wrote, reads):
    now, _ = trained(wrote, 3)
    with checkpoint.open_folder(tmp_path / "c") as folder:
        checkpoint.save(folder, 3, now, {})
        checkpoint.wait(folder)
    _, expected = trained(wrote, 4)
    for mesh in reads:
        first, placed, _ = made(*mesh)
        like = jax.eval_shape(lambda first=first: first)
        with checkpoint.open_folder(tmp_path / "c", read_only=True) as folder:
            found = checkpoint.restore(folder, like, placed).state
        assert_same(found, now)
        assert jax.tree.map(lambda x: x.sharding, found) == placed
        cut = [not x.is_fully_replicated for x in jax.tree.leaves(found.params)]
        assert any(cut) == (mesh[1] > 1)
        _, loss = trained(mesh, 1, found)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def restored(folder, like, step=None):
    return checkpoint.restore(folder, jax.eval_shape(lambda: like), on(1), step).state


def test_newest_is_restored_and_old_ones_go(tmp_path):
    with checkpoint.open_folder(tmp_path, keep=2) as folder:
        for step in (1, 2, 3):
            checkpoint.save(folder, step, {"w": jnp.full(2, float(step))}, {})
        checkpoint.wait(folder)
        like = {"w": jnp.zeros(2)}
        assert restored(folder, like)["w"].tolist() == [3.0, 3.0]
        assert folder.steps() == [2, 3]
        assert restored(folder, like, 2)["w"].tolist() == [2.0, 2.0]


def test_saved_values_are_those_of_the_moment(tmp_path):
    # The arrays are used up by the next step at once, as in training.
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    with checkpoint.open_folder(tmp_path) as folder:
        x = jnp.zeros(1000)
        checkpoint.save(folder, 1, {"x": x}, {})
        for _ in range(5):
            x = bump(x)
        checkpoint.wait(folder)
        found = restored(folder, {"x": jnp.zeros(1000)})
    assert float(jnp.abs(found["x"]).max()) == 0.0


def test_a_step_is_saved_once_and_none_before_the_latest(tmp_path):
    with checkpoint.open_folder(tmp_path) as folder:
        for value in (0.0, 1.0):
            checkpoint.save(folder, 5, {"x": jnp.full(2, value)}, {})
        checkpoint.wait(folder)
        assert restored(folder, {"x": jnp.zeros(2)})["x"].tolist() == [0.0, 0.0]
        with pytest.raises(checkpoint.CheckpointError, match=r"must be newer.*got 5"):
            checkpoint.save(folder, 4, {"x": jnp.zeros(2)}, {})


def test_missing_folder_and_missing_step_are_named(tmp_path):
    with (
        pytest.raises(checkpoint.CheckpointError, match=r"must be at .*none"),
        checkpoint.open_folder(tmp_path / "none", read_only=True),
    ):
        pass
    with (
        checkpoint.open_folder(tmp_path) as folder,
        pytest.raises(checkpoint.CheckpointError, match=r"got none\."),
    ):
        checkpoint.restore(folder, {}, on(1))
