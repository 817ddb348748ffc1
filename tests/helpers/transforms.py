"""What the rows of `test_transforms` are made of: inputs, and a stand-in network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import schedule

B, T, SHAPE = 8, 20, (2, 2, 1)


class Row(NamedTuple):
    """A function, the inputs it takes by name, and which public functions it covers."""

    covers: str
    fn: Callable[..., Any]
    inputs: str
    case: str = ""
    check_vma: bool = True

    @property
    def id(self) -> str:
        return f"{self.covers.split()[0]}{self.case and '-'}{self.case}"


def inputs(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    made = schedule.linear(T)
    t = np.array([1, 2, 3, 5, 8, 13, 17, 20])[::-1].copy()
    arrays = {
        "x0": rng.uniform(-0.9, 0.9, (B, *SHAPE)),
        "x": rng.normal(size=(B, *SHAPE)),
        "y": rng.normal(size=(B, *SHAPE)),
        "log": rng.uniform(-3, 0, (B, *SHAPE)),
        "u": rng.uniform(0.1, 0.9, B),
    }
    return {
        **{name: jnp.asarray(a, jnp.float64) for name, a in arrays.items()},
        "t": jnp.asarray(t),
        "keys": jax.random.split(jax.random.key(seed), B),
        "index": jnp.arange(B) + 100 * seed,
        "level": made(t),
        "prev_level": made(t - 1),
    }


def network(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.tanh(x) * (1 + 0.01 * t.reshape(-1, 1, 1, 1))


def wide_network(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.concatenate([network(x, t), 0.1 * x - 2], axis=-1)
