"""First weights: how a kernel is drawn, and all of a network without compiling it.

XLA takes longer for the program that draws the weights of a network, hundreds of small
pieces, than for all of the drawing. `params` draws them one by one on the host from a
handful of programs, and gives what `init` of the network does to the bit.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import LazyRng

_noted: contextvars.ContextVar[dict[int, tuple[Any, "Noted"]] | None]
_noted = contextvars.ContextVar("noted", default=None)
REST = {"bias": 0.0, "scale": 1.0}
"""What parameters that are not drawn begin with, by their names."""


@dataclasses.dataclass(frozen=True)
class Noted:
    """An initialiser by which `params` knows what it is to draw.

    Its parameter is to be the first of its module: `params` counts on that.
    """

    init: nn.initializers.Initializer

    def __call__(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> Any:
        """Returns what `init` does."""
        value = self.init(key, shape, dtype)
        if (noted := _noted.get()) is not None:
            noted[id(value)] = value, self  # held, for its id to stay its own
        return value


@dataclasses.dataclass(frozen=True)
class Kernel(Noted):
    """That of every kernel, [..., in, out]: uniform, of variance scale / mean fan."""

    scale: float


def kernel(scale: float = 1.0) -> Kernel:
    """Returns the initialiser of a kernel, by the scale of its variance."""
    init = nn.initializers.variance_scaling(scale, "fan_avg", "uniform")
    return Kernel(init, scale)


class _Leaf(NamedTuple):
    """A parameter before it is drawn."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    init: Noted | None


def params(net: nn.Module, key: jax.Array, *inputs: Any) -> Any:
    """Returns `net.init(key, *inputs)["params"]`, NumPy arrays.

    Args:
      net: which draws by `Noted` initialisers; scales begin at 1, biases at 0.
      key: of the seed.
      *inputs: of the network; `jax.ShapeDtypeStruct` are enough.

    Raises:
      KeyError: a parameter that begins otherwise.
    """
    plan, structure = _plan(net, inputs)
    return jax.tree.unflatten(structure, [_draw(key, leaf) for leaf in plan])


def shapes(net: nn.Module, *inputs: Any) -> Any:
    """Returns `jax.ShapeDtypeStruct` in place of the arrays of `params`."""
    plan, structure = _plan(net, inputs)
    leaves = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in plan]
    return jax.tree.unflatten(structure, leaves)


def _plan(net: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[_Leaf], Any]:
    like = [None if x is None else (x.shape, x.dtype) for x in inputs]
    return _planned(net, tuple(like))


@functools.cache
def _planned(net: nn.Module, like: tuple[Any, ...]) -> tuple[list[_Leaf], Any]:
    inits: list[Noted | None] = []

    def init(*inputs: Any) -> Any:
        with _noting() as noted:
            made = net.init(jax.random.key(0), *inputs)["params"]
        leaves = jax.tree.leaves(made)
        inits.extend(noted.get(id(leaf), (leaf, None))[1] for leaf in leaves)
        return made

    inputs = [x if x is None else jax.ShapeDtypeStruct(*x) for x in like]
    leaves, structure = jax.tree.flatten_with_path(jax.eval_shape(init, *inputs))
    plan = [
        _Leaf(tuple(part.key for part in path), leaf.shape, init)
        for (path, leaf), init in zip(leaves, inits, strict=True)
    ]
    return plan, structure


@contextlib.contextmanager
def _noting() -> Iterator[dict[int, tuple[Any, Noted]]]:
    noted: dict[int, tuple[Any, Noted]] = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def _draw(key: jax.Array, leaf: _Leaf) -> Any:
    *modules, name = leaf.names
    if leaf.init is None:
        return np.full(leaf.shape, REST[name], np.float32)
    # What Flax gives to the initialiser of the first parameter of a module.
    key = LazyRng.create(key, *modules, 1).as_jax_rng()
    if not isinstance(leaf.init, Kernel):
        return np.asarray(jax.jit(leaf.init, static_argnums=1)(key, leaf.shape))
    *window, inputs, outputs = leaf.shape
    fan = math.prod(window) * (inputs + outputs) / 2
    width = np.sqrt(3 * np.float32(leaf.init.scale / fan), dtype=np.float32)
    size = math.prod(leaf.shape)
    # Numbers from a key begin alike, however many are drawn: a few sizes do for all.
    enough = 4 ** math.ceil(math.log(max(size, 2**12), 4))
    return np.asarray(_uniform(key, enough))[:size].reshape(leaf.shape) * width


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key: jax.Array, size: int) -> jax.Array:
    return jax.random.uniform(key, (size,), jnp.float32, minval=-1)
