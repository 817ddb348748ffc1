"""Checks arrays of images and labels, and brings them into one form."""

import math
import os
import warnings

import numpy as np

from diffusion_jax.errors import DataError


def as_images(images: np.ndarray, what: str | os.PathLike[str]) -> np.ndarray:
    """Returns images as [N, H, W, C], having checked type and axes.

    Args:
      images: uint8, [N, H, W, C], [N, H, W], or [N, C, H, W] where W is not 1 or 3; C
        is 1 or 3.
      what: the name of the images, for errors.

    Raises:
      DataError: they are none of these.

    >>> as_images(np.zeros([2, 3, 8, 8], np.uint8), "x.npz").shape
    (2, 8, 8, 3)
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        got, advice = f"{images.dtype} of shape {images.shape}", "Give numbers."
        if not images.size:
            advice = "Give one image or more."
        elif images.dtype == np.uint8:
            advice = "Put them along a first axis; a single image is images[None]."
        elif images.dtype.kind in "biuf":
            low, high = float(images.min()), float(images.max())  # NaN, if one is
            got, advice = f"{got}, from {low:g} to {high:g}", _to_uint8(low, high)
        raise DataError(
            f"images in {what} must be uint8 of shape [N, H, W, C] or [N, H, W]; got "
            f"{got}. {advice}"
        )
    if images.ndim == 3:
        images = images[..., np.newaxis]
    elif images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        images = np.ascontiguousarray(np.moveaxis(images, 1, 3))
    _, height, width, channels = images.shape
    if channels not in (1, 3):
        advice = "Convert them to grey or RGB."
        if channels == 4:
            advice = "Of RGBA take images[..., :3]."
        raise DataError(
            f"images in {what} must have 1 or 3 channels; got {height}x{width} with "
            f"{channels}. {advice}"
        )
    return images


def as_uint8(images: np.ndarray, what: str | os.PathLike[str]) -> np.ndarray:
    """Returns images of any type as uint8, where their scale is unambiguous.

    Args:
      images: uint8; whole numbers in 0..255, some above 1; or floats in [0, 1], or in
        [-1, 1] with some below 0, which are rounded to nearest, with a warning.
      what: the name of the images, for errors.

    Raises:
      DataError: they are none of these.
    """
    if images.dtype == np.uint8 or images.ndim < 3 or not images.size:
        return images  # `as_images` says what is wrong, if anything
    floats, got, scale = images.dtype.kind == "f", f"{images.dtype}", None
    low = high = math.nan
    if images.dtype.kind in "fiu":
        low, high = float(images.min()), float(images.max())
        got += f" from {low:g} to {high:g}"
    if floats and 0 <= low < 0.5 and high <= 1:
        scale, shift, said = 255.0, 0.0, "[0, 1]"
    elif floats and -1 <= low < 0 and high <= 1:
        scale, shift, said = 127.5, 127.5, "[-1, 1]"
    elif low >= 0 and 1 < high <= 255 and all((i == np.rint(i)).all() for i in images):
        return images.astype(np.uint8)
    if scale is None:
        raise DataError(
            f"images in {what} must be uint8, whole numbers in 0..255, or floats in "
            f"[0, 1] or [-1, 1]; got {got}. {_to_uint8(low, high)}"
        )
    warnings.warn(
        f"images in {what} are {images.dtype} in {said}: rounded to 0..255",
        stacklevel=3,
    )
    rounded = np.empty(images.shape, np.uint8)
    for one, image in zip(rounded, images, strict=True):
        one[...] = np.rint(image.astype(np.float32) * scale + shift)
    return rounded


def as_labels(
    labels: np.ndarray | None, num_images: int, what: str | os.PathLike[str]
) -> np.ndarray | None:
    """Returns labels as int32 [N], after checking that each image has one."""
    if labels is None:
        return None
    fits = labels.dtype.kind in "iu" and labels.shape == (num_images,)
    if not fits or labels.min() < -(2**31) or labels.max() >= 2**31:
        raise DataError(
            f"labels in {what} must be {num_images} whole numbers below 2**31, one an "
            f"image; got {labels.dtype} of shape {labels.shape}. Make them int32, "
            "those of names by np.unique(names, return_inverse=True)[1]."
        )
    return labels.astype(np.int32)


def _to_uint8(low: float, high: float) -> str:
    """Returns advice on converting images with values in a range to uint8."""
    if not math.isfinite(low + high):
        return "Find out where they stopped being finite."
    if 0 <= low <= high <= 1:
        return (
            "If they are scaled to [0, 1]: np.round(images * 255.0).astype(np.uint8)."
        )
    if -1 <= low <= high <= 1:
        return (
            "If they are scaled to [-1, 1]: "
            "np.round((images + 1) * 127.5).astype(np.uint8)."
        )
    if 0 <= low <= high <= 255:
        return "Convert them: np.round(images).astype(np.uint8)."
    return "Scale them to 0..255, then np.round(images).astype(np.uint8)."
