"""The mask of dropout: drawn from 16 random bits a value, kept as one bit."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p


def mask(
    key: jax.Array, shape: tuple[int, ...], rate: float
) -> tuple[jax.Array, float]:
    """Returns the packed mask of what dropout keeps, and the probability to be kept.

    That probability is k / 65536, the nearest to 1 - rate. Kept values divided by it
    have the mean of all, exactly. Eight values share four words of the generator, which
    takes longer than all else in dropout, and one byte for the backward pass.

    Args:
      key: one key, of any generator.
      shape: of the values, [..., C].
      rate: share to drop, at least 0 and below 1.

    Returns:
      uint8 [..., ceil(C / 8)], for `unpacked`, and the probability.

    >>> packed, keep = mask(jax.random.key(0), (4, 1000), 0.25)
    >>> print(keep, packed.shape, abs(unpacked(packed, 1000).mean() - keep) < 0.03)
    0.75 (4, 125) True
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"the rate of dropout must be at least 0 and below 1; got {rate}. The "
            "paper uses 0.1 for CIFAR-10, and none for larger images."
        )
    kept = max(1, round((1 - rate) * 2**16))
    return _mask(key, shape, kept), kept / 2**16


# A network has many masks of few shapes: with a jit, each shape is traced once.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _mask(key: jax.Array, shape: tuple[int, ...], kept: int) -> jax.Array:
    size = *shape[:-1], -(-shape[-1] // 8)
    place = jnp.arange(math.prod(size), dtype=jnp.uint32).reshape(size)
    packed = jnp.zeros(size, jnp.uint8)
    for drawing in range(2):
        # Both words that the generator makes of a place; `jax.random.bits` has one.
        words = threefry2x32_p.bind(
            *jax.random.bits(key, (2,), jnp.uint32),
            place,
            jnp.full_like(place, drawing),
        )
        for n, word in enumerate(words):
            for half, bits in enumerate((word & 0xFFFF, word >> 16)):
                chosen = (bits < kept).astype(jnp.uint8)
                packed |= chosen << (4 * drawing + 2 * n + half)
    # A barrier, or each of the eight values of a byte would draw its words anew.
    return jax.lax.optimization_barrier(packed)


def unpacked(packed: jax.Array, channels: int) -> jax.Array:
    """Returns True where a value is kept, [..., channels].

    Args:
      packed: what `mask` returned.
      channels: of the values.
    """
    bits = packed[..., None] >> jnp.arange(8, dtype=jnp.uint8)[(None,) * packed.ndim]
    whole = (bits & 1).reshape(*packed.shape[:-1], -1)
    return whole[..., :channels] == 1
