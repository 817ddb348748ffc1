"""Features of a network's inputs: embeddings of time, fine detail of images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def time_embedding(
    t: jax.Array,
    channels: int,
    *,
    shift: int = 1,
    cosine_first: bool = False,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Returns the sinusoidal embedding of time, [B, channels], as typed by `dtype`.

    [sin(t f_k), cos(t f_k)], f_k = 10000^(-k / (half - shift)), half = channels // 2
    (Sec. 3.5, Vaswani et al. 2017); an odd number of channels ends with a zero.

    Args:
      t: times as the network counts them, [B]; DDPM's are 0..T-1.
      channels: at least 4.
      shift: 1 as in the official code, where the slowest frequency is 1e-4, or 0.
      cosine_first: whether the cosines come before the sines.
      dtype: of all that is computed.

    >>> print(time_embedding(jnp.zeros([1]), 4))
    [[0. 0. 1. 1.]]
    """
    half = channels // 2
    frequency = np.exp(-np.log(10000.0) * np.arange(half) / (half - shift))
    phase = t.astype(dtype)[:, None] * frequency.astype(dtype)[None, :]
    halves = [jnp.sin(phase), jnp.cos(phase)]
    embedding = jnp.concatenate(halves[::-1] if cosine_first else halves, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, channels % 2)))


def fourier_features(
    x: jax.Array, powers: Sequence[int], *, dtype: Any = jnp.float32
) -> jax.Array:
    """Returns [sin(2^n pi x), cos(2^n pi x)], [B, H, W, 2 C N], as typed by `dtype`.

    App. C, Kingma et al. 2021, whose n are 7 and 8: they show the last bits of a pixel.
    All sines come before all cosines, and of either all n of a channel together.

    Args:
      x: images, [B, H, W, C].
      powers: the whole numbers n, [N].
      dtype: of all that is computed.

    >>> print(fourier_features(jnp.full([1, 1, 1, 1], 0.25), (0, 3)).round(3))
    [[[[0.707 0.    0.707 1.   ]]]]
    """
    scale = np.exp2(np.asarray(powers)).astype(dtype)
    turns = x.astype(dtype)[..., None] * scale.reshape(*[1] * x.ndim, -1)
    # Whole turns are dropped before the product with pi, which would round them.
    phase = jnp.pi * (turns - 2 * jnp.round(turns / 2))
    phase = phase.reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
