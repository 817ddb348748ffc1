"""Dropout's mask: 16 random bits a value, and one bit to keep."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p


def mask(
    key: jax.Array, shape: tuple[int, ...], rate: float
) -> tuple[jax.Array, float]:
    """Returns which values dropout keeps, packed, and the probability that one is kept.

    Each is kept with a probability of k / 65536, the nearest to 1 - rate. Divided by
    that, what is kept has the mean of the values, exactly. Eight values share four
    words of the generator, which takes longer than all else that dropout does, and one
    byte, which the backward pass reads again.

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


# A network has many masks of few shapes: as a program each shape is traced once.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _mask(key: jax.Array, shape: tuple[int, ...], kept: int) -> jax.Array:
    size = *shape[:-1], -(-shape[-1] // 8)
    place = jnp.arange(math.prod(size), dtype=jnp.uint32).reshape(size)
    packed = jnp.zeros(size, jnp.uint8)
    for drawing in range(2):
        # Both words that a place is turned into, of which `jax.random.bits` gives one.
        words = threefry2x32_p.bind(
            *jax.random.bits(key, (2,), jnp.uint32),
            place,
            jnp.full_like(place, drawing),
        )
        for n, word in enumerate(words):
            for half, bits in enumerate((word & 0xFFFF, word >> 16)):
                chosen = (bits < kept).astype(jnp.uint8)
                packed |= chosen << (4 * drawing + 2 * n + half)
    # A barrier, or each value of a byte would draw all of its words.
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
