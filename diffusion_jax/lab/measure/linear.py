"""What linear methods reach with as many numbers: the least to ask of a network."""

from typing import NamedTuple

import numpy as np

LARGEST, MOST = 4096, 20_000
"""Numbers of an image beyond which no covariance is computed, and images it is of."""


class Linear(NamedTuple):
    """What principal components make of images."""

    components: int
    psnr_of_all: float
    """Of PCA: of the mean squared error, in dB."""
    bits_per_dim: float
    """Of probabilistic PCA, of images with uniform noise as wide as a value."""
    images: int
    """That both are fitted to."""


def principal(fitted: np.ndarray, seen: np.ndarray, count: int) -> Linear | None:
    """Returns what PCA and probabilistic PCA (Tipping and Bishop 1999) reach.

    The density is that of the normal distribution of `count` components and one
    variance for the rest; its noise is exact, so that nothing is drawn.

    Args:
      fitted: images that both are fitted to, uint8 [N, ...].
      seen: images that both are measured on, uint8 [M, ...].
      count: components.

    Returns:
      None where images have more than `LARGEST` numbers, or no more than `count`.

    >>> images = np.random.default_rng(0).integers(0, 256, [500, 4], np.uint8)
    >>> 8 < principal(images, images, 2).bits_per_dim < 8.5  # of uniform values: 8
    True
    """
    size = int(np.prod(fitted.shape[1:]))
    if not count < size <= LARGEST:
        return None
    x, y = (a.reshape(len(a), size) / 127.5 - 1.0 for a in (fitted, seen))
    mean, width = x.mean(axis=0), 1 / 127.5
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    found = np.square((y - mean) @ vectors).mean(axis=0)
    error = found[count:].sum() / size
    rest = values[count:].mean()
    model = np.concatenate([values[:count], np.full(size - count, rest)])
    model, found = model + width**2 / 12, found + width**2 / 12
    nats = 0.5 * (np.log(2 * np.pi * model) + found / model).sum()
    bits = nats / size / np.log(2) - np.log2(width)
    return Linear(count, float(10 * np.log10(4 / error)), float(bits), len(x))
