"""Brings images to one size: padded, or cropped and resampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image

from diffusion_jax.errors import DataError

Size = int | Sequence[int]
"""Pixels a side of square images, or height and width."""


def fitter(
    shape: Sequence[int | None], image_size: Size | None, fit: str | None, what: str
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, int, int]]:
    """Returns `(function of images [..., H, W, C], their new (H, W, C))`.

    Args:
      shape: the images' own (H, W, C); H and W are None where they differ.
      image_size: the size wanted, in pixels; None keeps the images as they are.
      fit: "pad" (or None) centres images on black, "crop" takes the largest centred
        crop of the aspect ratio wanted and resamples it.
      what: the name of the images, for errors.

    Raises:
      DataError: they cannot become that size in that way.
    """
    height, width, channels = shape
    own = f"{height}x{width}" if height and width else "differently sized"
    if fit not in (None, "pad", "crop"):
        raise DataError(
            f"fit must be 'pad' or 'crop'; got {fit!r}. Give 'pad' for a black "
            "border, 'crop' to cut and resample."
        )
    if image_size is None and height and width:
        return _same, (height, width, channels or 1)
    if image_size is None:
        raise DataError(
            f"image_size must be given for images of different sizes; got none for "
            f"{what}. Give image_size, and fit='crop'."
        )
    size = sides(image_size)
    fitted = (*size, channels or 1)
    if (height, width) == size:
        return _same, fitted
    if fit == "crop":
        return partial(crop, size=size), fitted
    if not (height and width):
        raise DataError(
            f"images must be of one size to be padded; got {own} images in {what}. "
            "Give fit='crop' to cut them to one shape and resample them."
        )
    if size[0] < height or size[1] < width:
        least = height if height == width else f"{height} {width}"
        raise DataError(
            f"image_size must be at least the images' own size; got image_size="
            f"{image_size} for {own} images in {what}. Give {least} or more, or "
            "fit='crop' to shrink them."
        )
    return partial(pad, size=size), fitted


def sides(size: Size) -> tuple[int, int]:
    """Returns height and width of a size.

    Raises:
      DataError: it is neither a side nor two, in whole pixels.

    >>> sides(8), sides((8, 16))
    ((8, 8), (8, 16))
    """
    both = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(both) != 2 or not all(isinstance(n, int) and n > 0 for n in both):
        raise DataError(
            f"image_size must be a whole number of pixels, 1 or more, or two, height "
            f"and width; got {size!r}. Give for instance 32."
        )
    return both


def _same(images: np.ndarray) -> np.ndarray:
    return images


def pad(images: np.ndarray, size: Size) -> np.ndarray:
    """Returns images [..., H, W, C] of a size: those given, centred on black.

    An odd difference puts the larger border at the bottom and right.

    >>> pad(np.ones((1, 2, 2, 1), np.uint8), 4)[0, :, :, 0].tolist()
    [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    borders = [(0, 0)] * (images.ndim - 3)
    for own, side in zip(images.shape[-3:-1], sides(size), strict=True):
        borders.append(((side - own) // 2, side - own - (side - own) // 2))
    return np.pad(images, [*borders, (0, 0)])


def crop(images: np.ndarray, size: Size) -> np.ndarray:
    """Returns uint8 images [..., H, W, C] of a size: their `middle`, resampled."""
    if images.ndim > 3:
        return np.stack([crop(image, size) for image in images])
    if images.shape[-1] not in (1, 3):
        raise DataError(
            f"images must have 1 or 3 channels to be resampled; got "
            f"{images.shape[-1]}. Convert them first."
        )
    image = Image.fromarray(images[..., 0] if images.shape[-1] == 1 else images)
    return pixels(resized(middle(image, sides(size)), sides(size)))


def middle(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Returns the largest centred crop with the aspect ratio of a size."""
    height, width = largest((image.height, image.width), size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def largest(own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) of the largest crop with the aspect ratio of a size.

    >>> largest((100, 150), (8, 8)), largest((100, 150), (8, 16))
    ((100, 100), (75, 150))
    """
    (height, width), (h, w) = own, size
    if height * w <= width * h:
        return height, max(1, round(height * w / h))
    return max(1, round(width * h / w)), width


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Returns an image resampled to a size, without aliasing.

    Bicubic: Pillow widens the filter as it shrinks, so nothing aliases; Lanczos
    rings more at hard edges, and the statistics FID compares with are made with
    this filter (Parmar et al. 2022).
    """
    height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an image, uint8 [H, W, C]."""
    array = np.array(image, np.uint8)
    return array if array.ndim == 3 else array[..., np.newaxis]
