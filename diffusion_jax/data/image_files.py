"""Decodes image files into uint8 pixels.

Images that do not fit in memory are a `LazyImages`, which is indexed like an array and
decodes the images that are asked for, in threads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from diffusion_jax.data.image_folders import Files
from diffusion_jax.data.sizes import Size, largest, middle, pixels, resized, sides
from diffusion_jax.errors import DataError, first_of
from diffusion_jax.storage.waiting import Bar

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
        flat = indices.ravel().tolist()
        if flat and not 0 <= min(flat) <= max(flat) < len(self):
            raise IndexError(
                f"indices must be in 0..{len(self) - 1}; got {min(flat)}..{max(flat)}. "
                "Count images from 0."
            )
        out = np.empty((len(flat), *self.shape[1:]), np.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i, image in enumerate(pool.map(self.read, flat)):
                out[i] = image
        return out.reshape(indices.shape + self.shape[1:])


def read_image(path: str | Path, size: Size, channels: int = 3) -> np.ndarray:
    """Returns a file's image as uint8 [H, W, channels].

    Turned upright as its EXIF orientation says, cut to the middle as `crop` does, laid
    on white where transparent, scaled to 8 bits if it has 16, then resampled.

    Args:
      path: anything Pillow reads; of an animation, the first frame.
      size: H and W.
      channels: 3 (RGB) or 1 (grey, ITU-R 601 luma).

    Raises:
      DataError: the file cannot be read; the message names it.
    """
    return _read(str(path), lambda: Path(path), size, channels)


def _read(
    name: str, opened: Callable[[], Path | BinaryIO], size: Size, channels: int
) -> np.ndarray:
    try:
        return decode(opened(), sides(size), channels)[0]
    # Decoders fail in many ways on damaged files.
    except Exception as error:
        raise DataError(
            f"every image must be readable; got {name} ({_reason(error)}). "
            "Remove or repair it, or load with skip_unreadable=True."
        ) from error


def decode(
    file: Path | BinaryIO,
    size: tuple[int, int],
    channels: int,
    *,
    formats: tuple[str, ...] | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns `(pixels uint8 [H, W, channels], the original's height and width)`.

    As `read_image` does it; of the formats of Pillow only some, if they are given.

    Raises:
      Exception: of many kinds, of what cannot be read.
    """
    with Image.open(file, formats=formats) as opened:
        check_bomb(opened)
        _check_transparent(opened)
        upright = ImageOps.exif_transpose(opened)
        image = middle(upright, size)
    image = _convert(image, channels)
    return pixels(resized(image, size)), (upright.height, upright.width)


def _probe(file: Path | BinaryIO) -> tuple[None, tuple[int, int]]:
    """Returns `(None, (height, width))`, from the file's header alone."""
    with Image.open(file) as image:
        check_bomb(image)
        return None, upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns height and width of an image, turned as its header's EXIF says."""
    # That of a PNG would decode the whole image, in case more follows.
    exif = Image.Image.getexif(image)
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def check_bomb(image: Image.Image) -> None:
    """Raises ValueError for an image that is a program, or far too large."""
    # Pillow would run an interpreter on it as soon as pixels are asked for.
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
    """Returns an image of any mode in RGB or grey, 8 bits."""
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
    image_size: Size,
    *,
    channels: int = 3,
    skip_unreadable: bool = False,
    memory_limit: int = 2**31,
) -> tuple[np.ndarray | LazyImages, list[int]]:
    """Returns images, uint8 [N, H, W, channels], and the index of the file of each.

    Within `memory_limit` every file is decoded now. Beyond it only headers are read
    now, and files are decoded as they are asked for.

    Args:
      files: what to read.
      image_size: H and W; of another shape the middle is taken, as `crop` does.
      channels: 3 (RGB) or 1 (grey).
      skip_unreadable: leave out files that cannot be decoded, with a warning; every
        file is then decoded once now, even beyond `memory_limit`.
      memory_limit: bytes of decoded images to hold in memory at most.

    Raises:
      DataError: unreadable ones (the first ten are named).
    """
    size = sides(image_size)
    shape = (*size, channels)
    decoded = partial(decode, size=size, channels=channels)
    total = len(files.names)
    lazy = total * int(np.prod(shape)) > memory_limit
    look = _probe if lazy and not skip_unreadable else decoded
    images = np.empty((0 if lazy else total, *shape), np.uint8)
    kept: list[int] = []
    unreadable: list[str] = []
    own: list[tuple[int, int]] = []
    for place, outcome in enumerate(_in_threads(look, files)):
        if isinstance(outcome, Exception):
            unreadable.append(f"{files.names[place]} ({_reason(outcome)})")
            continue
        image, upright = outcome
        if not lazy:
            images[len(kept)] = image
        kept.append(place)
        own.append(upright)
    _report_unreadable(files.where, unreadable, total, skip_unreadable)
    _report_changed(files.where, own, size)
    if not lazy:
        return images[: len(kept)], kept

    def one(i: int) -> np.ndarray:
        name = f"{files.names[kept[i]]} of {files.where}"
        return _read(name, partial(files.open, kept[i]), size, channels)

    return LazyImages(one, (len(kept), *shape)), kept


def _in_threads(
    function: Callable[[Path | BinaryIO], Any], files: Files
) -> Iterator[Any]:
    """Yields, in order, the function's value of each file or what it raised."""

    def attempt(place: int) -> Any:
        try:
            return function(files.open(place))
        except Exception as error:  # collected, to name every bad file at once
            return error

    total, title = len(files.names), f"reading {files.where}"
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        Bar(None, title, total, unit=" images") as bar,
    ):
        for start in range(0, total, _CHUNK):
            for outcome in pool.map(attempt, range(start, min(start + _CHUNK, total))):
                bar.update()
                yield outcome


def _report_unreadable(
    folder: Path, unreadable: list[str], total: int, skip: bool
) -> None:
    if not unreadable:
        return
    named = first_of(unreadable, _NAMED_AT_MOST)
    message = f"got {len(unreadable)} of {total} in {folder} that are not: {named}"
    if not skip or len(unreadable) == total:
        raise DataError(
            f"every image must be readable; {message}. Remove or repair them, "
            "or give skip_unreadable=True to leave them out."
        )
    warnings.warn(f"left out unreadable images; {message}", stacklevel=3)


def _report_changed(
    folder: Path, own: list[tuple[int, int]], size: tuple[int, int]
) -> None:
    """Warns of images, given by height and width, that were cut or enlarged."""
    kept = [largest(one, size) for one in own]
    lost = [1 - h * w / (a * b) for (h, w), (a, b) in zip(kept, own, strict=True)]
    cut = sum(share > 0 for share in lost)
    if cut:
        warnings.warn(
            f"{cut} of {len(own)} images in {folder} are of another shape than "
            f"{size[0]}x{size[1]}, and lost what is beside their middle, up to "
            f"{max(lost):.1%} of an image",
            stacklevel=3,
        )
    small = sum(h < size[0] or w < size[1] for h, w in kept)
    if small:
        warnings.warn(
            f"{small} of {len(own)} images in {folder} are smaller than "
            f"{size[0]}x{size[1]} pixels and were enlarged, which blurs them",
            stacklevel=3,
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"
    return f"{type(error).__name__}: {str(error)[:200]}"
