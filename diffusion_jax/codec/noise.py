"""Standard normal noise in whole numbers, any row of it at once, alike everywhere.

The bits are those of Philox, whose stream NumPy has frozen (NEP 19), as it has not that
of its normal numbers. Sixteen bits are a number, by `normal.load("normal_quantile")`.
"""

import functools

import numpy as np

from diffusion_jax.codec import normal

BITS = 20
"""A unit is 2^-20."""
ONE = 1 << BITS
BLOCK = 16
"""Numbers of one block of Philox: four words of 64 bits. A row begins with a block."""


def rows(
    seed: int, step: int, chunk: int, first: int, count: int, width: int
) -> np.ndarray:
    """Returns rows first..first + count - 1 of a table of noise, int32 [count, width].

    In units of 2^-20, within +-4.5. Each (seed, step, chunk) has a table of its own of
    2^64 rows; a row depends on its number and on the width's multiple of 16 alone.

    Args:
      seed: in 0..2^64 - 1.
      step: in 0..2^32 - 1.
      chunk: in 0..2^32 - 1.
      first: the first row.
      count: how many.
      width: numbers of a row.

    >>> print(rows(0, 1, 2, 3, 2, 4))
    [[ -257458   472770   601511 -1148709]
     [ -847319   508659   -45113  -142716]]
    """
    blocks = -(-width // BLOCK)
    key = np.array([seed, step << 32 | chunk], np.uint64)
    counter = [first * blocks, 0, 0, 0]
    words = np.random.Philox(key=key, counter=counter).random_raw(count * blocks * 4)
    index = words.astype("<u8").view("<u2").reshape(count, -1)[:, :width]
    return _quantile()[index]


@functools.cache
def _quantile() -> np.ndarray:
    """Returns the normal number of each value of 16 bits, int32 [65536]."""
    upper = normal.load("normal_quantile")
    return np.concatenate([-upper[::-1], upper])
