"""Images as uint8 pixels: made square, decoded from files, all of a set read.

What does not fit in memory is a `LazyImages`, which decodes the images that are asked
for, in threads; it is indexed like the array that it stands for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from diffusion_jax.data.image_folders import Files
from diffusion_jax.errors import DataError, first_of

# Files handed to the threads at a time: bounds the decoded images that wait.
_CHUNK = 256
_NAMED_AT_MOST = 10


@dataclass(frozen=True)
class LazyImages:
    """An array of images uint8 [N, H, W, C] that is read as it is indexed.

    Attributes:
      read: from an index in 0..N-1 to that image, uint8 [H, W, C]; called from
        several threads at once.
      shape: (N, H, W, C).
    """

    read: Callable[[int], np.ndarray]
    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        """Returns the images at an integer, a slice or an array of integers."""
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"indices must lie in 0..{len(self) - 1}; got "
                f"{indices.min()}..{indices.max()}. Take them modulo the length."
            )
        flat = indices.ravel().tolist()
        out = np.empty((len(flat), *self.shape[1:]), np.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i, image in enumerate(pool.map(self.read, flat)):
                out[i] = image
        return out.reshape(indices.shape + self.shape[1:])


def fitter(
    shape: Sequence[int | None], image_size: int | None, fit: str | None, what: str
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, int, int]]:
    """Returns `(function of images [..., H, W, C], their new (H, W, C))`.

    Args:
      shape: the images' own (H, W, C); H and W are None where they differ.
      image_size: the side wanted, in pixels; None keeps the images as they are.
      fit: "pad" (or None) centres images in a black square, "crop" cuts the largest
        square from the middle and resamples it.
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
    if image_size is not None and not (isinstance(image_size, int) and image_size > 0):
        raise DataError(
            f"image_size must be a whole number of pixels, 1 or more; got "
            f"{image_size!r}. Give for instance 32."
        )
    if image_size is None and height and width:
        return _same, (height, width, channels or 1)
    if image_size is None:
        raise DataError(
            f"image_size must be given for images of different sizes; got none for "
            f"{what}. Give image_size, and fit='crop'."
        )
    square = (image_size, image_size, channels or 1)
    if (height, width) == square[:2]:
        return _same, square
    if fit == "crop":
        return partial(crop, size=image_size), square
    if not height or height != width:
        raise DataError(
            f"images must be square to be padded; got {own} images in {what}. "
            "Give fit='crop' to cut a square from the middle and resample it."
        )
    if image_size < height:
        raise DataError(
            f"image_size must be at least the images' own size; got image_size="
            f"{image_size} for {own} images in {what}. Give {height} or more, or "
            "fit='crop' to shrink them."
        )
    return partial(pad, size=image_size), square


def _same(images: np.ndarray) -> np.ndarray:
    return images


def pad(images: np.ndarray, size: int) -> np.ndarray:
    """Returns images [..., size, size, C], black around those given in the middle.

    An odd difference puts the larger border at the bottom and right.

    >>> pad(np.ones((1, 2, 2, 1), np.uint8), 4)[0, :, :, 0].tolist()
    [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    borders = [(0, 0)] * (images.ndim - 3)
    for own in images.shape[-3:-1]:
        borders.append(((size - own) // 2, size - own - (size - own) // 2))
    return np.pad(images, [*borders, (0, 0)])


def crop(images: np.ndarray, size: int) -> np.ndarray:
    """Returns uint8 images [..., size, size, C]: the middle square, resampled."""
    if images.ndim > 3:
        return np.stack([crop(image, size) for image in images])
    if images.shape[-1] not in (1, 3):
        raise DataError(
            f"images must have 1 or 3 channels to be resampled; got "
            f"{images.shape[-1]}. Convert them first."
        )
    image = Image.fromarray(images[..., 0] if images.shape[-1] == 1 else images)
    return _pixels(_resize(_middle(image), size))


def _middle(image: Image.Image) -> Image.Image:
    """Returns the largest square from the middle, at whole pixels."""
    side = min(image.size)
    left, top = ((own - side) // 2 for own in image.size)
    return image.crop((left, top, left + side, top + side))


def _resize(image: Image.Image, size: int) -> Image.Image:
    """Returns the image at size x size, filtered over all the pixels it covers.

    Bicubic: Pillow widens the filter as it shrinks, so nothing aliases; Lanczos
    rings more at hard edges, and the statistics FID compares with are made with
    this filter (Parmar et al. 2022).
    """
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _pixels(image: Image.Image) -> np.ndarray:
    array = np.array(image, np.uint8)
    return array if array.ndim == 3 else array[..., np.newaxis]


def read_image(path: str | Path, size: int, channels: int = 3) -> np.ndarray:
    """Returns a file's image as uint8 [size, size, channels].

    Turned upright as its EXIF orientation says, cut to the middle square, laid on
    white where transparent, scaled to 8 bits if it has 16, then resampled.

    Args:
      path: anything Pillow reads; of an animation, the first frame.
      size: pixels a side.
      channels: 3 (RGB) or 1 (grey, ITU-R 601 luma).

    Raises:
      DataError: the file cannot be read; the message names it.
    """
    return _read(str(path), lambda: Path(path), size, channels)


def _read(
    name: str, opened: Callable[[], Path | BinaryIO], size: int, channels: int
) -> np.ndarray:
    """Returns `read_image` of what an image file is opened as."""
    try:
        return _decode(opened(), size, channels)[0]
    # Decoders fail in many ways on damaged files; each becomes the one typed error.
    except Exception as error:
        raise DataError(
            f"every image must be readable; got {name} ({_reason(error)}). "
            "Remove or repair it, or load with skip_unreadable=True."
        ) from error


def _decode(file: Path | BinaryIO, size: int, channels: int) -> tuple[np.ndarray, int]:
    """Returns `(pixels uint8 [size, size, channels], the original's shorter side)`."""
    with Image.open(file) as opened:
        _check_bomb(opened)
        _check_transparent(opened)
        image = _middle(ImageOps.exif_transpose(opened))
    image = _convert(image, channels)
    return _pixels(_resize(image, size)), min(image.size)


def _probe(file: Path | BinaryIO) -> tuple[None, int]:
    """Returns `(None, the shorter side)`, from the file's header alone."""
    with Image.open(file) as image:
        _check_bomb(image)
        return None, min(image.size)


def _check_bomb(image: Image.Image) -> None:
    # For which Pillow starts an interpreter, as soon as pixels are asked for.
    if image.format == "EPS":
        raise ValueError("PostScript, which is a program; it was not run")
    # Pillow raises at twice its limit and only warns at once: here both are errors.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{image.width}x{image.height} pixels, over the limit of {limit} against "
            "decompression bombs, PIL.Image.MAX_IMAGE_PIXELS"
        )


def _check_transparent(image: Image.Image) -> None:
    # Of 16 bits of colour Pillow keeps 8, in which the one colour that stands for
    # nothing is no longer told from its neighbours.
    deep = any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if deep and image.mode == "RGB" and "transparency" in image.info:
        raise ValueError("16 bits of RGB with a colour that is transparent")


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Returns the image in RGB or grey, 8 bits, from whatever mode it is in."""
    if image.mode.startswith("I"):
        # Pillow clips 16 bits to 8 in some releases and shifts in others: divide.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grey values outside 16 bits")
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 65535
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB" if channels == 3 else "L")


def read(
    files: Files,
    image_size: int,
    *,
    channels: int = 3,
    skip_unreadable: bool = False,
    memory_limit: int = 2**31,
    progress: bool = True,
) -> tuple[np.ndarray | LazyImages, list[int]]:
    """Returns images, uint8 [N, image_size, image_size, channels], and which they are.

    The second are their places among the files: all, unless some are left out. Within
    `memory_limit` every file is decoded now. Beyond it only headers are looked at and
    files are decoded as they are asked for.

    Args:
      files: what to read.
      image_size: pixels a side.
      channels: 3 (RGB) or 1 (grey).
      skip_unreadable: leave out files that cannot be decoded, with a warning; every
        file is then decoded once now, even beyond `memory_limit`.
      memory_limit: bytes of decoded images to hold in memory at most.
      progress: show a bar on standard error, where that is a terminal.

    Raises:
      DataError: unreadable ones (the first ten are named).
    """
    shape = (image_size, image_size, channels)
    decode = partial(_decode, size=image_size, channels=channels)
    total = len(files.names)
    lazy = total * int(np.prod(shape)) > memory_limit
    look = _probe if lazy and not skip_unreadable else decode
    images = np.empty((0 if lazy else total, *shape), np.uint8)
    kept: list[int] = []
    unreadable: list[str] = []
    small = 0
    for place, outcome in enumerate(_in_threads(look, files, progress)):
        if isinstance(outcome, Exception):
            unreadable.append(f"{files.names[place]} ({_reason(outcome)})")
            continue
        pixels, side = outcome
        small += side < image_size
        if not lazy:
            images[len(kept)] = pixels
        kept.append(place)
    _report(files.where, unreadable, total, small, image_size, skip_unreadable)
    if not lazy:
        return images[: len(kept)], kept

    def one(i: int) -> np.ndarray:
        name = f"{files.names[kept[i]]} of {files.where}"
        return _read(name, partial(files.open, kept[i]), image_size, channels)

    return LazyImages(one, (len(kept), *shape)), kept


def _in_threads(
    function: Callable[[Path | BinaryIO], Any], files: Files, progress: bool
) -> Iterator[Any]:
    """Yields, in order, the function's value of each file or what it raised."""

    def attempt(place: int) -> Any:
        try:
            return function(files.open(place))
        except Exception as error:  # collected, to name every bad file at once
            return error

    total, title = len(files.names), f"reading {files.where}"
    disable = None if progress else True
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=total, desc=title, unit=" images", disable=disable) as bar,
    ):
        for start in range(0, total, _CHUNK):
            for outcome in pool.map(attempt, range(start, min(start + _CHUNK, total))):
                bar.update()
                yield outcome


def _report(
    where: Path,
    unreadable: list[str],
    total: int,
    small: int,
    image_size: int,
    skip_unreadable: bool,
) -> None:
    """Raises or warns of unreadable images, and warns of ones that were enlarged."""
    if unreadable:
        named = first_of(unreadable, _NAMED_AT_MOST)
        message = f"got {len(unreadable)} of {total} in {where} that are not: {named}"
        if not skip_unreadable or len(unreadable) == total:
            raise DataError(
                f"every image must be readable; {message}. Remove or repair them, "
                "or give skip_unreadable=True to leave them out."
            )
        warnings.warn(f"left out unreadable images; {message}", stacklevel=3)
    if small:
        warnings.warn(
            f"{small} of {total} images in {where} are smaller than {image_size} "
            "pixels and were enlarged, which blurs them",
            stacklevel=3,
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"
    return f"{type(error).__name__}: {str(error)[:200]}"
