"""A tree of parameters as one vector, so that an optimizer step is a few operations.

Over a tree, Adam, a moving average and a norm are one operation for each of its leaves,
a thousand in all that a GPU has to start. Over a vector they are one each.

`pack` and `unpack` convert a tree. `pack_all` and `unpack_all` convert all trees like
the parameters in a larger state, such as the moments of Adam: checkpoints have trees.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Shapes = tuple[tuple[int, ...], ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["vector"],
    meta_fields=["structure", "shapes"],
)
@dataclasses.dataclass(frozen=True)
class Flat:
    """A tree of arrays of one type as a vector, [N]; itself a tree, of one leaf."""

    vector: jax.Array
    structure: jax.tree_util.PyTreeDef = dataclasses.field(repr=False)
    shapes: Shapes = dataclasses.field(repr=False)
    """Of the leaves, in the order of the structure."""


def pack(tree: PyTree, multiple: int = 1) -> Flat:
    """Returns a tree of arrays of one type as a vector.

    Kernels of convolutions, [height, width, in, out], are stored with `out` first, as
    cuDNN takes them, so that none is transposed when the vector is cut.

    Args:
      tree: the arrays; of NumPy arrays the vector is one too.
      multiple: number of devices that share the vector, which is filled up with zeros
        to a multiple of it.

    Raises:
      ValueError: leaves of several types, or none.

    >>> flat = pack({"w": jnp.ones([2, 3]), "b": jnp.zeros(3)})
    >>> flat.vector
    Array([0., 0., 0., 1., 1., 1., 1., 1., 1.], dtype=float32)
    >>> jax.tree.map(jnp.shape, unpack(flat))
    {'b': (3,), 'w': (2, 3)}
    """
    leaves, structure = jax.tree.flatten(tree)
    types = {str(leaf.dtype) for leaf in leaves}
    if len(types) != 1:
        raise ValueError(
            "the leaves of a tree to pack must be of one type; got "
            f"{', '.join(sorted(types)) or 'no leaves'}. Cast them, or leave it a tree."
        )
    shapes = tuple(tuple(leaf.shape) for leaf in leaves)
    return Flat(_join(leaves, multiple), structure, shapes)


def unpack(flat: Flat) -> PyTree:
    """Returns the tree of a vector.

    Its derivative packs the cotangents in one pass. That of slices would sum as many
    vectors of full length as there are leaves.
    """
    leaves = _cut(flat.vector, flat.shapes)
    return jax.tree.unflatten(flat.structure, leaves)


def pack_all(
    state: PyTree, like: PyTree, pack: Callable[[PyTree], Flat] = pack
) -> PyTree:
    """Returns a state in which each tree of the structure of `like` is a vector.

    Args:
      state: the state.
      like: the parameters, or a tree of their structure.
      pack: `pack`, or a compiled form of it: one program for all trees.
    """
    structure: Any = jax.tree.structure(like)

    def is_like(part: PyTree) -> bool:
        return bool(jax.tree.structure(part) == structure)

    return jax.tree.map(
        lambda part: pack(part) if is_like(part) else part, state, is_leaf=is_like
    )


def unpack_all(state: PyTree, unpack: Callable[[Flat], PyTree] = unpack) -> PyTree:
    """Returns a state in which each vector is a tree again, with an `unpack` to use."""

    def is_flat(part: PyTree) -> bool:
        return isinstance(part, Flat)

    return jax.tree.map(
        lambda part: unpack(part) if is_flat(part) else part, state, is_leaf=is_flat
    )


def of_tree(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a loss whose first argument is packed, from one that takes a tree."""
    return lambda flat, *rest: loss_fn(unpack(flat), *rest)


def _join(leaves: list[Any], multiple: int) -> Any:
    turned = (x.transpose(3, 0, 1, 2) if x.ndim == 4 else x for x in leaves)
    pieces: list[Any] = [x.ravel() for x in turned]
    missing = -sum(leaf.size for leaf in leaves) % multiple
    if missing:
        pieces.append(np.zeros(missing, pieces[0].dtype))
    # NumPy arrays by NumPy: a program would take an argument for each.
    host = all(isinstance(piece, np.ndarray) for piece in pieces)
    return np.concatenate(pieces) if host else jnp.concatenate(pieces)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cut(vector: jax.Array, shapes: Shapes) -> list[jax.Array]:
    leaves, start = [], 0
    for shape in shapes:
        part = jax.lax.slice(vector, (start,), (start + math.prod(shape),))
        start += math.prod(shape)
        if len(shape) == 4:
            height, width, inputs, outputs = shape
            part = part.reshape(outputs, height, width, inputs).transpose(1, 2, 3, 0)
        leaves.append(part.reshape(shape))
    return leaves


def _cut_forward(vector: jax.Array, shapes: Shapes) -> tuple[list[jax.Array], int]:
    return _cut(vector, shapes), len(vector)


def _cut_backward(
    shapes: Shapes, size: int, cotangents: list[jax.Array]
) -> tuple[jax.Array]:
    # As long as the vector, which may end in zeros. A barrier, or XLA would read the
    # pieces in place of one vector.
    return (jax.lax.optimization_barrier(_join(cotangents, size)),)


_cut.defvjp(_cut_forward, _cut_backward)
