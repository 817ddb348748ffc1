"""Parameters as one vector: the same tree, step and checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import same

from diffusion_jax.training import averages, flat, state

rng = np.random.default_rng(0)
TREE = {
    "conv": {"kernel": rng.normal(size=(3, 3, 2, 5)), "bias": rng.normal(size=5)},
    "scalar": rng.normal(size=()),
    "dense": [rng.normal(size=(5, 4)), rng.normal(size=(1, 0, 2))],
}
TREE = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), TREE)
SIZE = 3 * 3 * 2 * 5 + 5 + 1 + 20
X = jnp.asarray(rng.normal(size=(4, 6, 6, 2)), jnp.float32)


def loss(tree, x, key=None):
    form = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(
        x, tree["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=form
    )
    out = jnp.tanh(out + tree["conv"]["bias"][None, None, None]) @ tree["dense"][0]
    return jnp.square(out).mean() * jnp.exp(tree["scalar"]) + tree["dense"][1].sum()


@pytest.mark.parametrize("multiple", [1, 8, SIZE, 1000])
def test_a_tree_comes_back_to_the_bit_from_a_vector_that_can_be_cut(multiple):
    packed = flat.pack(TREE, multiple)
    assert packed.vector.shape == (-(-SIZE // multiple) * multiple,)
    assert not packed.vector[SIZE:].any()
    # Kernels of convolutions are stored with their outputs first.
    kernel = TREE["conv"]["kernel"].transpose(3, 0, 1, 2)
    np.testing.assert_array_equal(packed.vector[5:95], kernel.ravel())
    same(jax.jit(flat.unpack)(packed), TREE)
    grad = jax.grad(flat.of_tree(lambda tree: tree["scalar"]))(packed)
    assert grad.vector.shape == packed.vector.shape
    assert float(grad.vector.sum()) == 1


def test_the_gradient_is_joined_once_and_not_added_up():
    # Derived from slices, it would be a sum of vectors that are padded with zeros.
    jaxpr = str(jax.make_jaxpr(jax.grad(flat.of_tree(loss)))(flat.pack(TREE), X))
    assert jaxpr.count("concatenate") == 1
    assert f"f32[{SIZE}] = add_any" not in jaxpr
    assert "= pad[" not in jaxpr


def test_steps_are_those_of_the_tree():
    optimizer = state.tf_adam(1e-2, eps=1e-8)
    options = {
        "averages": [averages.exponential(0.9), averages.power(0.1)],
        "clip_norm": 0.05,
        "accumulate": 2,
    }
    plain = jax.jit(state.make_step(loss, optimizer, **options))
    packed = jax.jit(state.make_step(flat.of_tree(loss), optimizer, **options))
    one = state.init(jax.random.key(0), TREE, optimizer, averages=2)
    two = flat.pack_all(one, one.params)
    for number in range(5):
        one, metrics = plain(one, X + number)
        two, others = packed(two, X + number)
        for name, value in metrics.items():
            np.testing.assert_allclose(others[name], value, rtol=1e-5)
    # Clipped: so the norm of the vector is in what is compared.
    assert metrics["grad_norm"] > 0.05
    sizes = {x.ndim for x in jax.tree.leaves(two._replace(key=jnp.zeros(())))}
    assert sizes == {0, 1}
    again = flat.unpack_all(two)
    assert jax.tree.structure(again) == jax.tree.structure(one)
    pair = (jax.tree.leaves(x._replace(key=0)) for x in (again, one))
    for x, y in zip(*pair, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7)


def test_leaves_of_several_types_are_refused(refuses):
    with refuses("bfloat16, float32"):
        flat.pack({"a": jnp.zeros(2), "b": jnp.zeros(2, jnp.bfloat16)})
    with refuses("no leaves"):
        flat.pack({})
