"""Dropout by bits of the device's own generator."""

import math

import jax
import jax.numpy as jnp


def dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Returns x with a share of its values set to 0 and the others scaled up, as x is.

    The bits are those of XLA's RngBitGenerator. That is several times cheaper than
    threefry, but which values are dropped is not the same on every kind of device or
    version of the compiler, under `jax.vmap`, or with other shapes.

    A value has 16 bits of its own: it is kept with a probability of k / 65536, the
    nearest to 1 - rate, and then divided by that, so that the mean is x.

    Args:
      key: one key, of any generator.
      x: values of any shape.
      rate: share to drop, at least 0 and below 1.

    >>> x = jnp.ones([4, 1000])
    >>> y = dropout(jax.random.key(0), x, 0.25)
    >>> 0.2 < (y == 0).mean() < 0.3, f"{y.max():.4f}"
    (Array(True, dtype=bool), '1.3333')
    """
    chosen, keep = mask(key, x.shape, rate)
    # Each value is rounded by itself: a factor that is rounded would move them all.
    scaled = x.astype(jnp.promote_types(x.dtype, jnp.float32)) / keep
    return jnp.where(chosen, scaled.astype(x.dtype), 0)


def mask(
    key: jax.Array, shape: tuple[int, ...], rate: float
) -> tuple[jax.Array, float]:
    """Returns which values `dropout` keeps, and the probability that one is kept.

    Args:
      key, rate: as in `dropout`.
      shape: of the values, any.
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"the rate of dropout must be at least 0 and below 1; got {rate}. The "
            "paper uses 0.1 for CIFAR-10, and none for larger images."
        )
    kept = max(1, round((1 - rate) * 2**16))
    bits = _bits(key, math.prod(shape)).reshape(shape)
    # Not bits < kept, which may be 65536: that has 17 bits.
    return bits <= jnp.uint16(kept - 1), kept / 2**16


def _bits(key: jax.Array, count: int) -> jax.Array:
    """Returns `count` random numbers of 16 bits, [count]: two of each that is drawn."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    # The generator has a key of four words; that of threefry has two.
    words = jnp.resize(key, (4,))
    generator = jax.random.wrap_key_data(words, impl="rbg")
    drawn = jax.random.bits(generator, (-(-count // 2),), jnp.uint32)
    return jax.lax.bitcast_convert_type(drawn, jnp.uint16).reshape(-1)[:count]
