"""What the rows of `test_transforms` are made of: inputs, and a stand-in network."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import gaussian, schedule

B, T, SHAPE = 8, 20, (2, 2, 1)
LINEAR = schedule.linear(T)
PAIR = "level prev_level"


class Row(NamedTuple):
    """Which public functions it covers, a function of them, and its inputs by name."""

    covers: str
    fn: Callable[..., Any]
    inputs: str
    check_vma: bool = True
    slopes: bool = True
    """Whether its gradient is held to be its slope."""


def each(fn: Callable[..., Any], options: Iterable[Any]) -> Callable[..., Any]:
    """A function of (option, *arrays) with every option, as one function of arrays."""
    return lambda *arrays: {str(option): fn(option, *arrays) for option in options}


def inputs(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
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
        "level": LINEAR(t),
        "prev_level": LINEAR(t - 1),
    }


def network(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.tanh(x) * (1 + 0.01 * t.reshape(-1, 1, 1, 1))


def denoiser(
    kind: str = "v", made: schedule.Schedule = LINEAR, **options: Any
) -> gaussian.Denoiser:
    """One by the stand-in network, twice as wide where it tells a variance."""

    def wide_network(x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.concatenate([network(x, t), 0.1 * x - 2], axis=-1)

    wide = options.get("variance") in ("learned", "range")
    net = wide_network if wide else network
    return gaussian.denoiser(net, made, kind, **options)
