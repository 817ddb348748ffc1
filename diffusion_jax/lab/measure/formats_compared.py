"""What the usual image formats make of the same images, without loss and with it.

A format has a header, which of a small image is most of the file. So each is measured
twice: on every image alone, and on all of them in one mosaic, which is the best that it
can do and nothing that one would do in earnest.
"""

import bz2
import importlib
import io
import lzma
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion_jax.errors import DataError

LARGEST = 16_383
"""Pixels of a side at most, of WebP."""
JXL = "pillow_jxl"
QUALITIES = (2, 10, 25, 45, 65, 80, 90, 96)
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG", "optimize": True},
    "WebP": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
    "JPEG XL": {"format": "JXL", "lossless": True, "effort": 9},
}
"""How Pillow is asked to save without loss, in the least bytes."""
LOSSY: dict[str, dict[str, Any]] = {
    "JPEG": {"format": "JPEG", "optimize": True, "subsampling": 0},
    "WebP": {"format": "WEBP", "method": 6},
    "JPEG XL": {"format": "JXL", "effort": 7},
}


class Size(NamedTuple):
    """What images take in some form."""

    name: str
    bytes_each: float
    """The mean of an image."""


class Point(NamedTuple):
    """What images take with loss, and how far they then are from what they were."""

    rate: float
    """In bits/dim."""
    rmse: float
    """Root mean squared error on the scale of 0..255."""


def missing() -> str:
    """Returns what is not compared here and how to have it; "" where all is."""
    if find_spec(JXL) is not None:
        return ""
    return (
        f"JPEG XL is left out: {JXL} is missing. Install it with pip install "
        "'diffusion-jax[codecs]'."
    )


def lossless(images: np.ndarray) -> list[Size]:
    """Returns the sizes of images without loss, each alone and all together.

    Args:
      images: uint8 [N, H, W, C], C 1 or 3.

    Raises:
      DataError: so many or so large that a mosaic has more pixels than WebP takes.
    """
    count, raw, all_in_one = len(images), images.tobytes(), mosaic(images)
    found = [Size("plain pixels", len(raw) / count)]
    for name, how in _known(LOSSLESS).items():
        alone = sum(len(saved(image, **how)) for image in images)
        found.append(Size(f"{name}, each image", alone / count))
    for name, how in _known(LOSSLESS).items():
        found.append(Size(f"{name}, one mosaic", len(saved(all_in_one, **how)) / count))
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    found.append(Size("xz -9e, all pixels", len(packed) / count))
    found.append(Size("bz2 -9, all pixels", len(bz2.compress(raw, 9)) / count))
    return found


def histograms(images: np.ndarray, others: np.ndarray) -> Size:
    """Returns what images take by how often each value is at each pixel of others.

    The ideal length, in which no coder and no table has a share: the least that can be
    had of a model without knowledge of neighbours.

    Args:
      images: uint8 [N, H, W, C].
      others: uint8 [M, H, W, C], of the same kind.
    """
    values = np.unique(np.concatenate([images.ravel(), others.ravel()]))
    seen, coded = (
        np.searchsorted(values, each.reshape(len(each), -1))
        for each in (others, images)
    )
    bits = 0.0
    for d in range(seen.shape[1]):
        counts = np.bincount(seen[:, d], minlength=len(values)) + 0.1
        bits -= np.log2(counts / counts.sum())[coded[:, d]].sum()
    return Size("a histogram a pixel, of others", bits / 8 / len(images))


def lossy(
    images: np.ndarray, few: np.ndarray, qualities: Sequence[int] = QUALITIES
) -> tuple[dict[str, list[Point]], dict[str, list[Point]]]:
    """Returns rates and errors by format: of a few images alone, of all in one mosaic.

    Only the best: points of a rate at which no other, lossless ones with them, is as
    near. Of images of few values those without loss are often smaller than others.

    Args:
      images: uint8 [N, H, W, C], C 1 or 3.
      few: uint8 [M, H, W, C]; each takes a file of its own for each quality.
      qualities: of 0..100, as each format counts them.

    Raises:
      DataError: as `lossless`.
    """
    alone: dict[str, list[Point]] = {}
    together: dict[str, list[Point]] = {}
    all_in_one = mosaic(images)
    for name, how in _known(LOSSY).items():
        ways = [how | {"quality": quality} for quality in qualities]
        ways += [LOSSLESS[name]] if name in LOSSLESS else []
        each, whole = [], []
        for options in ways:
            files = [saved(image, **options) for image in few]
            back = np.stack([opened(file, few.shape[1:]) for file in files])
            each.append(point(few, back, sum(map(len, files))))
            file = saved(all_in_one, **options)
            back = cut(opened(file, all_in_one.shape), images.shape)
            whole.append(point(images, back, len(file)))
        alone[name], together[name] = front(each), front(whole)
    return alone, together


def front(points: Sequence[Point]) -> list[Point]:
    """Returns the points that none is better than in both, by rising rate.

    >>> [p.rmse for p in front([Point(1, 9.0), Point(3, 2.0), Point(2, 0.0)])]
    [9.0, 0.0]
    """
    best: list[Point] = []
    for one in sorted(points):
        if not best or one.rmse < best[-1].rmse:
            best.append(one)
    return best


def point(images: np.ndarray, back: np.ndarray, size: float) -> Point:
    """Returns rate and error of images that came back from so many bytes.

    >>> one = np.zeros([2, 2, 2, 1], np.uint8)
    >>> point(one, one + 3, 4)
    Point(rate=4.0, rmse=3.0)
    """
    apart = back.astype(np.float64) - images
    return Point(8 * size / images.size, float(np.sqrt(np.mean(apart**2))))


def mosaic(images: np.ndarray) -> np.ndarray:
    """Returns images in rows, as square as possible, then black; uint8 [H', W', C].

    Raises:
      DataError: a side is longer than WebP takes, or Pillow would not open it.
    """
    count, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(count * height / width)))
    rows = -(-count // columns)
    sides, most = (rows * height, columns * width), 2 * (Image.MAX_IMAGE_PIXELS or 0)
    if max(sides) > LARGEST or sides[0] * sides[1] > most:
        raise DataError(
            f"images to compare must fit in a mosaic of {LARGEST} pixels a side, and "
            f"of {most:,} in all; got {sides[0]}x{sides[1]}. Give fewer: --max-images "
            "256."
        )
    blank = np.zeros((rows * columns - count, *images.shape[1:]), np.uint8)
    full = np.concatenate([images, blank])
    grid = full.reshape(rows, columns, height, width, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, -1, channels)


def cut(whole: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the images of a mosaic, of the shape that they had.

    >>> images = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4, 1)
    >>> bool((cut(mosaic(images), images.shape) == images).all())
    True
    """
    count, height, width, channels = shape
    rows, columns = whole.shape[0] // height, whole.shape[1] // width
    grid = whole.reshape(rows, height, columns, width, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, *shape[1:])[:count]


def saved(image: np.ndarray, **how: Any) -> bytes:
    """Returns an image, uint8 [H, W, C], as a file, with options of Pillow."""
    if how["format"] == "JXL":
        importlib.import_module(JXL)  # Pillow then knows the format
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, **how)
    return file.getvalue()


def opened(file: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the image of a file, uint8 of this shape, [H, W, C]."""
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("L" if shape[-1] == 1 else "RGB")).reshape(
            shape
        )


def _known(formats: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: how
        for name, how in formats.items()
        if how["format"] != "JXL" or not missing()
    }
