"""Images of files as they are, to the bit, or not at all."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from diffusion_jax.data import image_files, image_folders
from diffusion_jax.errors import DataError, first_of

_EXACT = ("1", "L", "P", "LA", "RGB", "RGBA", "PA")
"""Modes of Pillow that RGBA holds without loss."""


def read(paths: Sequence[Path], shape: tuple[int, int, int]) -> np.ndarray:
    """Returns the images of files and folders, in order, uint8 [N, H, W, C].

    Nothing is resized, cut or rounded. Colours of a palette, and grey in three
    channels, are the same pixels in another form.

    Raises:
      DataError: none are there, or one cannot be had in that shape without loss.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [path / name for name in image_folders.find(path).names]
        else:
            found.append(path)
    images, wrong = [], []
    for path in found:
        try:
            images.append(_exact(path, shape))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as why:
            wrong.append(f"{path} ({why})")
    if wrong or not images:
        size = "x".join(map(str, shape[:2]))
        kind = "grey" if shape[2] == 1 else "RGB"
        raise DataError(
            f"every image must be {size} in {kind} with 8 bits, as the network was "
            f"trained on; got {first_of(wrong) or 'none'}. Nothing is changed here, "
            "which would lose what a file is to keep: convert them first."
        )
    return np.stack(images)


def _exact(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns the pixels of a file; an error says why they cannot be had."""
    height, width, channels = shape
    with Image.open(path) as opened:
        image_files.check_bomb(opened)
        if getattr(opened, "n_frames", 1) > 1:
            raise ValueError("several frames")
        size = image_files.upright_size(opened)
        if size != (height, width):
            raise ValueError(f"{size[0]}x{size[1]} pixels")
        deep = any("16" in str(tile[3]) for tile in getattr(opened, "tile", ()))
        if opened.mode not in _EXACT or deep:
            raise ValueError(f"mode {opened.mode}{', 16 bits' * deep}")
        pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGBA"))
    if pixels[..., 3].min() < 255:
        raise ValueError("transparent pixels")
    colours = pixels[..., :3]
    if channels == 1 and (colours != colours[..., :1]).any():
        raise ValueError("colours")
    return np.array(colours[..., :channels])
