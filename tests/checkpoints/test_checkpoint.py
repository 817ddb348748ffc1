"""Checkpoints come back as they were, or say why not."""

import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.training import parallel


def tree():
    return {
        "w": jnp.arange(4096.0).reshape(64, 64),
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


@pytest.mark.parametrize(
    ("wrote", "reads"),
    [((8, 1), [(1, 1)]), ((8, 4), [(2, 2), (4, 1)]), ((4, 1), [(8, 4)])],
    ids=str,
)
def test_state_comes_back_from_any_mesh_on_any_other(tmp_path, wrote, reads):
    like = jax.eval_shape(tree)
    with checkpoint.open_folder(tmp_path / "c") as folder:
        placed = parallel.state_sharding(like, parallel.make_mesh(*wrote))
        state = jax.device_put(tree(), placed)
        checkpoint.save(folder, 5, state, {"note": [1.5]})
        checkpoint.wait(folder)
    for mesh in reads:
        placed = parallel.state_sharding(like, parallel.make_mesh(*mesh))
        with checkpoint.open_folder(tmp_path / "c", read_only=True) as folder:
            found = checkpoint.restore(folder, like, placed)
        assert_same(found.state, tree())
        assert found.meta == {"note": [1.5]}
        assert jax.tree.map(lambda x: x.sharding, found.state) == placed
        assert found.state["w"].is_fully_replicated == (mesh[1] == 1)


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


def test_folders_and_steps_that_are_not_there_are_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(checkpoint.CheckpointError, match=r"got .*Not a directory"),
        checkpoint.open_folder(tmp_path / "file" / "c"),
    ):
        pass
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
