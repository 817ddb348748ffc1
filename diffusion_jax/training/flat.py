"""A tree of parameters as one vector, so that an optimizer step is a few operations.

An update of Adam, a moving average and a norm over a tree are an operation for each
of its leaves, a thousand in all, each of which a GPU has to be told to start. Over a
vector they are one each.

`pack` and `unpack` go between the two. `pack_all` and `unpack_all` do so wherever trees
like the parameters stand in a larger state: what is stored on disk then does not depend
on how a run keeps its parameters.
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
    structure: jax.tree_util.PyTreeDef
    shapes: Shapes
    """Of the leaves, in the order of the structure."""

    def __repr__(self) -> str:
        """Returns a few words: in full, the structure would fill pages."""
        size = sum(math.prod(shape) for shape in self.shapes)
        return f"Flat({size:,} numbers of {len(self.shapes)} arrays)"


def pack(tree: PyTree, multiple: int = 1) -> Flat:
    """Returns a tree of arrays of one type as a vector.

    Kernels of convolutions, [height, width, in, out], are stored with `out` first, as
    cuDNN wants them: the vector is then cut into kernels without turning any.

    Args:
      tree: the arrays; a vector of NumPy's is made of NumPy's.
      multiple: of which the length of the vector is one, by zeros at its end: the
        devices that share it have equal parts.

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

    Its derivative packs the tree of cotangents in one pass. That of slices would add
    up as many vectors of full length as there are leaves.
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
      pack: as `pack`; compiled, it is one program for all trees.
    """
    structure: Any = jax.tree.structure(like)

    def is_like(part: PyTree) -> bool:
        return bool(jax.tree.structure(part) == structure)

    return jax.tree.map(
        lambda part: pack(part) if is_like(part) else part,
        state,
        is_leaf=is_like,
    )


def unpack_all(state: PyTree, unpack: Callable[[Flat], PyTree] = unpack) -> PyTree:
    """Returns a state in which each vector is a tree again; unpack as in `pack_all`."""

    def is_flat(part: PyTree) -> bool:
        return isinstance(part, Flat)

    return jax.tree.map(
        lambda part: unpack(part) if is_flat(part) else part, state, is_leaf=is_flat
    )


def of_tree(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a loss of packed parameters, its first argument, from one of a tree."""
    return lambda flat, *rest: loss_fn(unpack(flat), *rest)


def _join(leaves: list[Any], multiple: int) -> Any:
    pieces: list[Any] = [_turn(leaf).ravel() for leaf in leaves]
    missing = -sum(leaf.size for leaf in leaves) % multiple
    if missing:
        pieces.append(np.zeros(missing, pieces[0].dtype))
    # Those of NumPy stay there: a program would have an argument for each.
    host = all(isinstance(piece, np.ndarray) for piece in pieces)
    return np.concatenate(pieces) if host else jnp.concatenate(pieces)


def _turn(leaf: jax.Array) -> jax.Array:
    return leaf.transpose(3, 0, 1, 2) if leaf.ndim == 4 else leaf


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
    # As long as the vector, which may end in zeros. Behind a barrier, for whoever reads
    # it to find one vector, not its pieces.
    return (jax.lax.optimization_barrier(_join(cotangents, size)),)


_cut.defvjp(_cut_forward, _cut_backward)
