"""What a network sees of an image, rounded so that every machine agrees on it.

In float64 two machines, two batch sizes or two compilers differ by about 1e-15. So x0
as the network sees it is rounded to multiples of 2^-12, of which two machines could
only take different ones where it is within their difference of an edge between two.
Such values are listed by who encodes, and looked up by who decodes:

  **Theorem.** Machines whose x0 differ by less than 2^-34 = 5.8e-11 agree on all of it.

An entry is needed once in 2^21 values. (In float32, where x0 differs by 1e-6, it would
be once in a hundred.)
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

BITS = 12
"""A unit of x0 is 2^-12."""
ONE = 1 << BITS
SURE = 2.0**-34
"""Nearer to an edge than this, a value is listed."""

Denoise64 = Callable[[np.ndarray, float], np.ndarray]
"""From x_t [B, ...] and a time to x0 as a network sees it, both float64."""


class Listed(NamedTuple):
    """Values of which another machine could be in doubt, by their places."""

    place: np.ndarray
    """Rising, int64 [n]; how values are counted is up to who calls."""
    value: np.ndarray
    """In units of 2^-12, int64 [n]."""


NONE = Listed(np.zeros(0, np.int64), np.zeros(0, np.int64))


def predict(
    denoise64: Denoise64, x: np.ndarray, t: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns x0 in units of 2^-12, int64 [B, ...], and where it is in doubt, bool.

    x0 is clipped to [-1, 1] first; an x0 within 2^-34 of an edge is in doubt.

    Args:
      denoise64: the network.
      x: noisy images, float64 [B, ...].
      t: their time.

    Raises:
      ValueError: the network gives other than float64, or values that are not finite.

    >>> grid, near = predict(lambda x, t: x, np.array([[0.5, 0.5 / ONE, -2.0]]), 1)
    >>> print(grid, near)
    [[ 2048     0 -4096]] [[False  True False]]
    """
    found = denoise64(x, t)
    if found.dtype != np.float64 or found.shape != x.shape:
        raise ValueError(
            f"denoise64 must give float64 of shape {x.shape}; got {found.dtype} "
            f"{found.shape}. Evaluate the network in float64."
        )
    if not np.isfinite(found).all():
        raise ValueError(
            f"x0 at t = {t} must be finite; got a network that says otherwise. Its "
            "weights are damaged, or x_t is beyond what it was trained on."
        )
    # Each of these is exact: a product with a power of two, the nearest whole number,
    # and a difference of two numbers that are at most 1 apart.
    scaled = np.clip(found, -1, 1) * ONE
    nearest = np.rint(scaled)
    return nearest.astype(np.int64), 0.5 - np.abs(scaled - nearest) < SURE * ONE


def places(starts: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns where each value of images [B, ...] is counted, int64 of that shape.

    The first value of each image is at its start, int64 [B].
    """
    within = np.arange(np.prod(shape[1:], dtype=np.int64)).reshape(1, *shape[1:])
    return np.asarray(starts, np.int64).reshape(-1, *[1] * (len(shape) - 1)) + within


def listed(grid: np.ndarray, near: np.ndarray, starts: np.ndarray) -> Listed:
    """Returns the values in doubt of what `predict` gave, at their `places`."""
    return joined([Listed(places(starts, grid.shape)[near], grid[near])])


def joined(parts: Iterable[Listed]) -> Listed:
    """Returns the entries of several lists as one, by rising place."""
    place, value = (np.concatenate(p) for p in zip(NONE, *parts, strict=True))
    order = np.argsort(place, kind="stable")
    return Listed(place[order], value[order])


def settled(grid: np.ndarray, starts: np.ndarray, known: Listed) -> np.ndarray:
    """Returns the grid of `predict` with what another machine listed for its `places`.

    Raises:
      ValueError: an entry is no neighbour of the value that it replaces, as none
        between two machines with the same network can be.

    >>> theirs = Listed(np.array([7]), np.array([3]))
    >>> print(settled(np.array([[1, 2]]), np.array([6]), theirs))
    [[1 3]]
    """
    if not len(known.place):
        return grid
    where = places(starts, grid.shape)
    at = np.minimum(np.searchsorted(known.place, where), len(known.place) - 1)
    made = np.where(known.place[at] == where, known.value[at], grid)
    apart = np.abs(made - grid)
    if (apart > 1).any():
        raise ValueError(
            "listed values must be at most 1 from those of this machine; got "
            f"{apart.max()}. The file is damaged, or the network is another."
        )
    return made
