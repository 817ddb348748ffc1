"""Initial weights: how a kernel is drawn, and all of a network without compiling it.

XLA takes longer to compile the program that draws the weights of a network, which has
hundreds of small pieces, than to run it. `params` draws them one by one from a handful
of programs, and gives what the network's `init` does, to the bit.
"""

import contextvars
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import LazyRng

_noted: contextvars.ContextVar[dict[int, tuple[Any, "Noted"]]]
_noted = contextvars.ContextVar("noted")
REST = {"bias": 0.0, "scale": 1.0}
"""Initial values of parameters that are not drawn, by their names."""


@dataclasses.dataclass(frozen=True)
class Noted:
    """An initialiser that tells `params` which parameters it has drawn.

    Its parameter must be the first of its module: `params` relies on that.
    """

    init: nn.initializers.Initializer

    def __call__(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> Any:
        """Returns what `init` does."""
        value = self.init(key, shape, dtype)
        if (noted := _noted.get(None)) is not None:
            noted[id(value)] = value, self  # held, so that no other gets its id
        return value


@dataclasses.dataclass(frozen=True)
class Kernel(Noted):
    """Draws a kernel, [..., in, out], uniformly, of variance scale / mean fan."""

    scale: float


def kernel(scale: float = 1.0) -> Kernel:
    """Returns the initialiser of a kernel with a scale of its variance."""
    init = nn.initializers.variance_scaling(scale, "fan_avg", "uniform")
    return Kernel(init, scale)


class _Leaf(NamedTuple):
    names: tuple[str, ...]
    shape: tuple[int, ...]
    init: Noted | None


def params(net: nn.Module, key: jax.Array, *inputs: Any) -> Any:
    """Returns `net.init(key, *inputs)["params"]`, as NumPy arrays.

    Args:
      net: a network whose initialisers are `Noted`, but for scales, which begin at 1,
        and biases, at 0.
      key: of the seed.
      *inputs: of the network, or `jax.ShapeDtypeStruct` of them.

    Raises:
      KeyError: a parameter that begins otherwise.
    """
    plan, structure = _plan(net, inputs)
    return jax.tree.unflatten(structure, [_draw(key, leaf) for leaf in plan])


def shapes(net: nn.Module, *inputs: Any) -> Any:
    """Returns the shapes of `params`, as `jax.ShapeDtypeStruct`."""
    plan, structure = _plan(net, inputs)
    leaves = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in plan]
    return jax.tree.unflatten(structure, leaves)


def _plan(net: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[_Leaf], Any]:
    shape = jax.ShapeDtypeStruct
    like = (None if x is None else shape(x.shape, x.dtype) for x in inputs)
    return _planned(net, *like)


@functools.cache
def _planned(net: nn.Module, *inputs: Any) -> tuple[list[_Leaf], Any]:
    inits: list[Noted | None] = []

    def init(*inputs: Any) -> Any:
        noted: dict[int, tuple[Any, Noted]] = {}
        context = contextvars.copy_context()
        context.run(_noted.set, noted)
        made = context.run(net.init, jax.random.key(0), *inputs)["params"]
        leaves = jax.tree.leaves(made)
        inits.extend(noted.get(id(leaf), (leaf, None))[1] for leaf in leaves)
        return made

    leaves, structure = jax.tree.flatten_with_path(jax.eval_shape(init, *inputs))
    plan = [
        _Leaf(tuple(part.key for part in path), leaf.shape, init)
        for (path, leaf), init in zip(leaves, inits, strict=True)
    ]
    return plan, structure


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
    # The first numbers of a key are the same however many are drawn, so that a few
    # sizes, and programs, are enough for all kernels.
    enough = 4 ** math.ceil(math.log(max(size, 2**12), 4))
    return np.asarray(_uniform(key, enough))[:size].reshape(leaf.shape) * width


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key: jax.Array, size: int) -> jax.Array:
    return jax.random.uniform(key, (size,), jnp.float32, minval=-1)
