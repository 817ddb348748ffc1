"""The normal distribution function in whole numbers, alike everywhere."""

import numpy as np

from diffusion_jax.codec import tables

BITS = 30
"""A unit of probability is 2^-30."""
ONE = 1 << BITS
_REACH, _CELL = 8 << 20, 12


def cdf_fixed(x: np.ndarray) -> np.ndarray:
    """Returns the probability that a standard normal number is below x, int64.

    In units of 2^-30, from a table at 4,097 points of [-8, 8] and straight lines
    between them: within 5e-7 of the truth, never falling, 0 from -8 down and 2^30 from
    8 up.

    Args:
      x: int64 of any shape, in units of 2^-20.

    >>> print(cdf_fixed(np.array([-9 << 20, 0, 1 << 20, 8 << 20])) / ONE)
    [0.         0.5        0.84134475 1.        ]
    """
    table = tables.load("normal_cdf").astype(np.int64)
    place = np.clip(x, -_REACH, _REACH) + _REACH
    cell = np.minimum(place >> _CELL, len(table) - 2)
    low, rest = table[cell], place - (cell << _CELL)
    made: np.ndarray = low + ((table[cell + 1] - low) * rest >> _CELL)
    return made
