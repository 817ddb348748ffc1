"""Intervals of 2^24 that values take: of Gaussians on a grid, and of pixels.

Everything is integers, or float64 multiplied and added in separate steps: the same on
every machine. A distribution p that codes what it did not draw gives each value at
least 1 of 2^24. One that codes only what it drew itself, q, must not: each value out of
the way would be drawn once in a thousand images, and is dear to p.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusion_jax.codec import normal
from diffusion_jax.codec.ranges import BITS

TOTAL = 1 << BITS
LARGEST = 8
"""Values on a grid are at most so large."""
FINE = 20
"""Bits after the point of what the normal distribution is asked."""
_FRACTION, _MOST = 30, LARGEST * 2.0**FINE
_Z = np.linspace(-LARGEST, LARGEST, 4097)
_PHI = normal.cdf_fixed((_Z * 2**FINE).astype(np.int64)) / 2**_FRACTION


class Grid(NamedTuple):
    """Gaussians on the multiples of a power of two."""

    mean: np.ndarray
    sd: np.ndarray
    """Standard deviation; broadcasts against the mean."""
    delta: float
    """The distance of two values, 2^-k."""
    leak: bool
    """Whether every value has at least 1 of 2^24."""

    @property
    def most(self) -> int:
        """Returns the largest value in units of delta."""
        return int(LARGEST / self.delta)

    def edge(self, k: np.ndarray) -> np.ndarray:
        """Returns where the interval of value k delta begins, int64."""
        below = np.multiply(np.subtract(k, 0.5), self.delta)
        found = _phi(np.subtract(below, self.mean), self.sd)
        found = np.where(k <= -self.most, 0, found)
        found = np.where(k > self.most, 1 << _FRACTION, found)
        count = 2 * self.most + 1 if self.leak else 0
        return ((TOTAL - count) * found >> _FRACTION) + self.leak * (k + self.most)

    def interval(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns start and length of the intervals of values k delta."""
        return _interval(self.edge, k)

    def find(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the values at positions, as k, and start and length of theirs."""
        near = np.rint(_guess(at, self.mean, self.sd) / self.delta)
        guess = np.clip(near, -self.most, self.most).astype(np.int64)
        return search(self.edge, at, guess, -self.most, self.most + 1)


def search(
    edge: Callable[[np.ndarray], np.ndarray],
    at: np.ndarray,
    guess: np.ndarray,
    low: int,
    high: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns k with edge(k) <= at < edge(k + 1), edge(k), and their distance.

    The edges rise from 0 at `low` to 2^24 at `high`, and k is guessed to begin with.
    """
    a, b, step = guess, guess + 1, 1
    start, stop = edge(np.stack([a, b]))
    while True:
        under, over = at < start, at >= stop
        if not (under | over).any():
            break
        a, b = (
            np.where(under, np.maximum(a - step, low), np.where(over, b, a)),
            np.where(over, np.minimum(b + step, high), np.where(under, a, b)),
        )
        (start, stop), step = edge(np.stack([a, b])), 2 * step
    while (b - a > 1).any():
        middle = (a + b) >> 1
        between = edge(middle)
        left = at < between
        a, start = np.where(left, a, middle), np.where(left, start, between)
        b, stop = np.where(left, middle, b), np.where(left, between, stop)
    return a, start, stop - start


class Pixels(NamedTuple):
    """Pixels of an alphabet, seen as Gaussian about what the network believes."""

    mean: np.ndarray
    """What it believes, in [-1, 1]."""
    sd: np.ndarray
    """Standard deviation of its error; broadcasts against the mean."""
    middles: np.ndarray
    """Between two neighbours of the alphabet, [A - 1]."""

    def edge(self, j: np.ndarray) -> np.ndarray:
        """Returns where the interval of value number j begins, int64."""
        count = len(self.middles) + 1
        middles = np.concatenate([[0.0], self.middles, [0.0]])
        found = _phi(np.subtract(middles[j], self.mean), self.sd)
        found = np.where(j <= 0, 0, np.where(j >= count, 1 << _FRACTION, found))
        return ((TOTAL - count) * found >> _FRACTION) + j

    def interval(self, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns start and length of the intervals of values number j."""
        return _interval(self.edge, j)

    def find(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the numbers of the values at positions, and their intervals."""
        guess = np.searchsorted(self.middles, _guess(at, self.mean, self.sd))
        return search(self.edge, at, guess, 0, len(self.middles) + 1)


def texture(clean: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns how uneven what is seen is about each pixel, in 0..31, int64 [B, D].

    That is the number of bits of 9 sum g^2 - (sum g)^2 over the 3x3 pixels about it:
    one more where the variance is twice as large. A network errs little where an image
    is flat, and much in patterns and at edges. What is seen is in units of 2^-12.

    >>> print(texture(np.array([[0, 0, 0, 4096]]), (1, 4, 1)))
    [[ 0  0 29 29]]
    """
    height, width, _ = shape
    full = np.asarray(clean, np.int64).reshape(-1, *shape)
    full = np.pad(full, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    parts = [full[:, i : i + height, j : j + width] for i, j in np.ndindex(3, 3)]
    near = np.stack(parts)
    uneven = 9 * np.square(near).sum(axis=0) - np.square(near.sum(axis=0))
    return np.frexp(uneven.astype(np.float64))[1].reshape(clean.shape)


def _interval(
    edge: Callable[[np.ndarray], np.ndarray], k: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    start, stop = edge(np.stack([k, k + 1]))
    return start, stop - start


def _phi(distance: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Returns the normal distribution at distance / deviation, in units of 2^-30."""
    z = np.multiply(np.divide(distance, sd), 2.0**FINE)
    z = np.minimum(np.maximum(z, -_MOST), _MOST)
    return normal.cdf_fixed(np.rint(z).astype(np.int64))


def _guess(at: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Returns about where a Gaussian has a position: it saves most of a search."""
    return mean + np.interp((at + 0.5) / TOTAL, _PHI, _Z) * sd
