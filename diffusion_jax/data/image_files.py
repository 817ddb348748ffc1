"""Images as uint8 pixels: decoded from files, read from a folder.

What does not fit in memory is a `LazyImages`, which decodes the images that are asked
for, in threads; it is indexed like the array that it stands for.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from diffusion_jax.data.sizes import Size, largest, middle, pixels, resized, sides
from diffusion_jax.errors import DataError, first_of

IMAGE_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif"),
    *(".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)

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
    try:
        return _decode(path, sides(size), channels)[0]
    # Decoders fail in many ways on damaged files; each becomes the one typed error.
    except Exception as error:
        raise DataError(
            f"every image must be readable; got {path} ({_reason(error)}). "
            "Remove or repair it, or load with skip_unreadable=True."
        ) from error


def _decode(
    path: str | Path, size: tuple[int, int], channels: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns `(pixels uint8 [H, W, channels], the original's height and width)`."""
    with Image.open(path) as opened:
        _check_bomb(opened)
        _check_transparent(opened)
        upright = ImageOps.exif_transpose(opened)
        image = middle(upright, size)
    image = _convert(image, channels)
    return pixels(resized(image, size)), (upright.height, upright.width)


def _probe(path: str | Path) -> tuple[None, tuple[int, int]]:
    """Returns `(None, height and width)`, from the file's header alone."""
    with Image.open(path) as image:
        _check_bomb(image)
        return None, upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns height and width of an image, turned as its header's EXIF says."""
    # That of a PNG would decode the whole image, in case more follows.
    exif = Image.Image.getexif(image)
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


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


def read_folder(
    folder: str | Path,
    image_size: Size,
    *,
    channels: int = 3,
    skip_unreadable: bool = False,
    memory_limit: int = 2**31,
    progress: bool = True,
) -> np.ndarray | LazyImages:
    """Returns the images under a folder, uint8 [N, H, W, channels].

    In the order of their paths, so the same on every machine; hidden files are left
    out. Within `memory_limit` every file is decoded now. Beyond it only headers are
    looked at and files are decoded as they are asked for.

    Args:
      folder: searched with all its subfolders for `IMAGE_ENDINGS`.
      image_size: H and W; of another shape the middle is taken, as `crop` does.
      channels: 3 (RGB) or 1 (grey).
      skip_unreadable: leave out files that cannot be decoded, with a warning; every
        file is then decoded once now, even beyond `memory_limit`.
      memory_limit: bytes of decoded images to hold in memory at most.
      progress: show a bar on standard error, where that is a terminal.

    Raises:
      DataError: no folder, no images, or unreadable ones (the first ten are named).
    """
    folder = Path(folder)
    files = image_files(folder)
    size = sides(image_size)
    shape = (*size, channels)
    decode = partial(_decode, size=size, channels=channels)
    lazy = len(files) * int(np.prod(shape)) > memory_limit
    look = _probe if lazy and not skip_unreadable else decode
    images = np.empty((0 if lazy else len(files), *shape), np.uint8)
    kept: list[Path] = []
    unreadable: list[str] = []
    own: list[tuple[int, int]] = []
    outcomes = _in_threads(look, files, f"reading {folder}", progress)
    for file, outcome in zip(files, outcomes, strict=True):
        if isinstance(outcome, Exception):
            unreadable.append(f"{file.relative_to(folder)} ({_reason(outcome)})")
            continue
        image, upright = outcome
        if not lazy:
            images[len(kept)] = image
        kept.append(file)
        own.append(upright)
    _report_unreadable(folder, unreadable, len(files), skip_unreadable)
    _report_changed(folder, own, size)
    if not lazy:
        return images[: len(kept)]
    return LazyImages(
        lambda i: read_image(kept[i], size, channels), (len(kept), *shape)
    )


def image_files(folder: Path) -> list[Path]:
    """Returns the paths of a folder's images, in order.

    Links to nothing are among them, to be named with what cannot be read. What else
    is there is warned of, by ending.

    Raises:
      DataError: no folder, or no images in it.
    """
    if not folder.is_dir():
        raise DataError(
            f"a folder of images must exist; got {folder}, which is no folder. "
            "Check the path."
        )
    seen = [
        file
        for file in folder.rglob("*")
        if not any(p.startswith(".") for p in file.relative_to(folder).parts)
        and (file.is_file() or (file.is_symlink() and not file.exists()))
    ]
    files = [file for file in seen if file.suffix.lower() in IMAGE_ENDINGS]
    others = Counter(
        file.suffix.lower() or "no ending"
        for file in seen
        if file.suffix.lower() not in IMAGE_ENDINGS
    )
    if not files:
        raise DataError(
            f"a folder of images must hold files ending in "
            f"{', '.join(IMAGE_ENDINGS)}; got none under {folder}. Check the path, "
            "or convert the images."
        )
    if others:
        counted = ", ".join(f"{n} of {ending}" for ending, n in others.most_common())
        warnings.warn(f"left out files that are no images: {counted}", stacklevel=3)
    # Not by Path, which sorts differently on systems that ignore case.
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _in_threads(
    function: Callable[[Path], Any], files: list[Path], title: str, progress: bool
) -> Iterator[Any]:
    """Yields, in order, the function's value of each file or what it raised."""

    def attempt(file: Path) -> Any:
        try:
            return function(file)
        except Exception as error:  # collected, to name every bad file at once
            return error

    disable = None if progress else True
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(files), desc=title, unit=" images", disable=disable) as bar,
    ):
        for start in range(0, len(files), _CHUNK):
            for outcome in pool.map(attempt, files[start : start + _CHUNK]):
                bar.update()
                yield outcome


def _report_unreadable(
    folder: Path, unreadable: list[str], total: int, skip: bool
) -> None:
    """Raises or warns of unreadable images."""
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
