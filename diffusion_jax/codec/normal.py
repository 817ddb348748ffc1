"""The normal distribution function in whole numbers, alike everywhere."""

import functools

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
    low, rise = _lines()
    place = np.minimum(np.maximum(x, -_REACH), _REACH) + _REACH
    cell = np.minimum(place >> _CELL, len(low) - 1)
    made: np.ndarray = low[cell] + (rise[cell] * (place - (cell << _CELL)) >> _CELL)
    return made


@functools.cache
def _lines() -> tuple[np.ndarray, np.ndarray]:
    """Returns where each line between two points begins, and its rise."""
    table = tables.load("normal_cdf").astype(np.int64)
    return table[:-1], np.diff(table)
