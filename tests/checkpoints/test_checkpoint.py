"""Checkpoints come back as they were, or say why not."""

import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.checkpoints import checkpoint, manifest
from diffusion_jax.training import parallel


def tree():
    return {
        "w": jnp.arange(4096.0).reshape(64, 64),
        "half": jnp.ones(3, jnp.bfloat16),
        "count": jnp.array(7),
        "key": jax.random.key(3),
    }


def on(devices):
    return parallel.replicated(parallel.make_mesh(devices))


def bits(state):
    leaves = jax.tree.leaves(jax.tree.map(manifest.stored, state))
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves]


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
    for mesh in reads:
        placed = parallel.state_sharding(like, parallel.make_mesh(*mesh))
        with checkpoint.open_folder(tmp_path / "c", read_only=True) as folder:
            found = checkpoint.restore(folder, like, placed)
        assert bits(found.state) == bits(tree())
        assert found.meta == {"note": [1.5]}
        assert jax.tree.map(lambda x: x.sharding, found.state) == placed
        assert found.state["w"].is_fully_replicated == (mesh[1] == 1)


def test_saves_leave_nothing_in_memory(tmp_path):
    """A leaf that is left five objects of would show."""
    state, blocks = {f"w{i}": jnp.ones(4) * i for i in range(30)}, []
    gc.freeze()  # what is there already need not be looked through
    with checkpoint.open_folder(tmp_path / "c", keep=1) as folder:
        for step in range(1, 13):
            checkpoint.save(folder, step, state, {})
            checkpoint.wait(folder)
            gc.collect()
            blocks.append(sys.getallocatedblocks())
    assert np.median(np.diff(blocks[4:])) < 150


def test_newest_is_restored_and_old_ones_go(tmp_path):
    """As it was when it was saved, though the next step uses its arrays up at once."""
    bump, x = jax.jit(lambda x: x + 1, donate_argnums=0), jnp.zeros(1000)
    with checkpoint.open_folder(tmp_path, keep=2) as folder:

        def values(step=None):
            like = jax.eval_shape(lambda: jnp.zeros(1000))
            return set(checkpoint.restore(folder, like, on(1), step).state.tolist())

        for step in (1, 2, 3):
            x = bump(x)
            checkpoint.save(folder, step, x, {})
            for _ in range(9):
                x = bump(x)
        checkpoint.save(folder, 3, x, {})  # a step is saved once
        checkpoint.wait(folder)
        assert folder.steps() == [2, 3]
        assert (values(), values(2)) == ({21.0}, {11.0})
        with pytest.raises(
            checkpoint.CheckpointError, match=r"checkpoint 1 must be newer"
        ):
            checkpoint.save(folder, 1, x, {})


def test_folders_and_steps_that_are_not_there_are_named(tmp_path):
    def refused(path, said, **options):
        with (
            pytest.raises(checkpoint.CheckpointError, match=said),
            checkpoint.open_folder(path, **options) as folder,
        ):
            checkpoint.restore(folder, {}, on(1))

    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "c", r"got .*Not a directory")
    refused(tmp_path / "none", r"must be at .*none", read_only=True)
    refused(tmp_path, r"got none\.")
