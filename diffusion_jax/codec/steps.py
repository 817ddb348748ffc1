"""What encoding and decoding share: the network's view of x_t, means, pixels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusion_jax.codec import bins, certified, noise
from diffusion_jax.codec.certified import Denoise64, Listed
from diffusion_jax.codec.profile import Chain, Profile
from diffusion_jax.errors import DataError

MOST_PIXELS = 2**28
"""Of all images of a file together."""
UNIT = 2.0**-noise.BITS
"""Of x_t where it is rounded, and of noise."""

Tick = Callable[[int], object]


def silent(count: int) -> None:
    """Takes how many images went through the network, and shows nothing."""


class View(NamedTuple):
    """A network that every machine reads alike, and what has to be listed for that."""

    profile: Profile
    chain: Chain
    denoise: Denoise64
    batch_size: int
    """Images that it is given at most; others are filled up to a power of two."""
    known: Listed | None = None
    """By who wrote, for who reads; None for who writes."""
    found: list[Listed] | None = None
    """Where who writes collects it."""
    tick: Tick = silent

    def clean(self, x: np.ndarray, place: int, images: np.ndarray) -> np.ndarray:
        """Returns x0 as the network sees it, in units of 2^-12, int64 [B, D].

        It is given x, float64 [B, D], at the time of a place in the chain; the images
        have the numbers [B] in the file.
        """
        size, parts = x.shape[1], []
        starts = (np.asarray(images, np.int64) * len(self.chain.times) + place) * size
        for first in range(0, len(x), self.batch_size):
            part = x[first : first + self.batch_size]
            here = starts[first : first + self.batch_size]
            # Of few sizes, as a network is compiled for each.
            full = min(self.batch_size, 1 << (len(part) - 1).bit_length())
            padded = np.pad(part, ((0, full - len(part)), (0, 0)), "edge")
            shaped = padded.reshape(-1, *self.profile.shape)
            time = int(self.chain.times[place])
            both = certified.predict(self.denoise, shaped, time)
            grid, near = (each.reshape(-1, size)[: len(part)] for each in both)
            if self.known is not None:
                grid = certified.settled(grid, here, self.known)
            if self.found is not None and near.any():
                self.found.append(certified.listed(grid, near, here))
            parts.append(grid)
            self.tick(len(part))
        return np.concatenate(parts)


def mean(chain: Chain, place: int, x: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Returns the mean of p(x_place | x_{place + 1} = x), float64 [B, D].

    x0 as it is seen from x is in units of 2^-12; both are [B, D].
    """
    # In two steps: a machine that multiplies and adds in one rounds once.
    first = np.multiply(np.multiply(clean, 1 / certified.ONE), chain.c0[place])
    return np.add(first, np.multiply(x, chain.ct[place]))


def pixels(profile: Profile, chain: Chain, clean: np.ndarray) -> bins.Pixels:
    """Returns the distribution of pixels by x0 as x_0 shows it, 2^-12 [B, D]."""
    sd = chain.pixel_sd * chain.texture[bins.texture(clean, profile.shape)]
    mean = np.multiply(clean, 1 / certified.ONE)
    return bins.Pixels(mean, sd, profile.middles)


class Split(NamedTuple):
    """Images as numbers of the alphabet, and what is not in it."""

    symbols: np.ndarray
    """int64 [N, D]; where a value is missing, its neighbour's."""
    place: np.ndarray
    """Rising places of the missing values among all N D, int64."""
    value: np.ndarray
    """The missing values, uint8."""


def split(profile: Profile, images: np.ndarray) -> Split:
    """Returns images as numbers of the alphabet.

    Raises:
      DataError: they are not uint8 images of the profile's shape, or too many.
    """
    images = np.asarray(images)
    shape = "x".join(map(str, profile.shape))
    if images.dtype != np.uint8 or images.shape[1:] != profile.shape:
        raise DataError(
            f"images must be uint8 of {shape}, as the network was trained on; got "
            f"{images.dtype} of {'x'.join(map(str, images.shape[1:]))}. None is "
            "resized here, which would lose what a file is to keep: do it before."
        )
    if len(images) < 1 or images.size > MOST_PIXELS:
        raise DataError(
            f"a file must have one image or more, and at most {MOST_PIXELS:,} pixel "
            f"values; got {len(images):,} images of {shape}. Write several files."
        )
    flat = images.reshape(len(images), -1)
    symbols = np.searchsorted(profile.alphabet, flat)
    symbols = np.minimum(symbols, len(profile.alphabet) - 1)
    missing = np.flatnonzero(profile.alphabet[symbols] != flat)
    return Split(symbols, missing, flat.ravel()[missing])


def put_together(profile: Profile, parts: Split) -> np.ndarray:
    """Returns the images that `split` took, uint8 [N, H, W, C]."""
    flat = profile.alphabet[parts.symbols]
    flat.reshape(-1)[parts.place] = parts.value
    return flat.reshape(-1, *profile.shape)
