"""Reads data sets that tensorflow-datasets has prepared, without TensorFlow.

Only what is on this machine is read: nothing here downloads or prepares.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data.image_files import LazyImages
from diffusion_jax.data.sizes import Size, fitter
from diffusion_jax.errors import DataError
from diffusion_jax.storage.waiting import Bar


def tfds_folder(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder in which tensorflow-datasets keeps what it prepared.

    That is `data_dir`, else `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
      DataError: it is an address of a remote store.
    """
    folder = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR", ""))
    if "://" in folder:
        raise DataError(
            f"the tensorflow-datasets folder must be on this machine; got {folder}. "
            "Copy it here, and give its path as data_dir."
        )
    return Path(folder or "~/tensorflow_datasets").expanduser()


def read_tfds(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: Size | None = None,
    fit: str | None = None,
    memory_limit: int = 2**31,
) -> tuple[np.ndarray | LazyImages, np.ndarray | None]:
    """Returns `(images uint8 [N, H, W, C], labels int32 [N] or None)`.

    Args:
      name: as in `tfds.builder`: "cifar10", "lsun/bedroom", "cifar10:3.0.2". It must
        have a uint8 feature `image`; an integer feature `label` is read if there.
      split: any split expression: "train", "test[:10%]".
      data_dir: see `tfds_folder`.
      image_size: see `sizes.fitter`, also for `fit`.
      memory_limit: bytes of images to hold in memory; more are read as asked for.

    Raises:
      DataError: it was not prepared in random-access form, or has no such feature.
    """
    folder = tfds_folder(data_dir)
    builder = _builder(name, folder)
    features = builder.info.features
    shape = _image_shape(features, name)
    fit_image, fitted = fitter(shape, image_size, fit, f"tfds:{name}")
    source = _source(builder, split, name, folder)
    labelled = "label" in features and np.issubdtype(
        features["label"].np_dtype, np.integer
    )
    shape_of_all = (len(source), *fitted)
    images = LazyImages(lambda i: fit_image(source[i]["image"]), shape_of_all)
    lazy = math.prod(shape_of_all) > memory_limit
    if lazy and not labelled:
        return images, None
    # Labels are always held in memory; a pass for them alone need not decode images.
    seen = _source(builder, split, name, folder, skip_images=True) if lazy else source
    held = np.empty((0 if lazy else len(source), *fitted), np.uint8)
    labels = np.empty(len(source), np.int32)
    for i in Bar(range(len(source)), f"reading {name}", unit=" images"):
        example = seen[i]
        if not lazy:
            held[i] = fit_image(example["image"])
        if labelled:
            labels[i] = example["label"]
    return images if lazy else held, labels if labelled else None


def _builder(name: str, folder: Path) -> Any:
    """Returns the tfds builder of a name, without using the network."""
    _, _, version = name.partition(":")
    if version and not re.fullmatch(r"[\d.*]+", version):
        # A prefix such as huggingface: or kaggle: makes tfds go to the network.
        raise DataError(
            f"a tfds name must be like cifar10, lsun/bedroom or cifar10:3.0.2; got "
            f"{name!r}. Prepare the data set with tfds first, then name it so."
        )
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=str(folder))
    except Exception as error:
        # Its text lists hundreds of names; the first line says what happened.
        got = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _not_prepared(name, folder, got) from error


def _source(
    builder: Any, split: str, name: str, folder: Path, *, skip_images: bool = False
) -> Any:
    """Returns the random-access source of a split's examples."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()} if skip_images else None
    try:
        return builder.as_data_source(split, decoders=decoders)
    except ValueError as error:
        raise DataError(
            f"split must name a part of {name}, as in 'train' or 'test[:10%]'; got "
            f"{split!r}: {error} Give one of those."
        ) from error
    except Exception as error:
        got = f"{type(error).__name__}: {str(error)[:200]}"
        if isinstance(error, NotImplementedError):
            got = f"nothing at {builder.data_path}"
            if builder.data_path.exists():
                got = f"another format at {builder.data_path}, which needs TensorFlow"
        raise _not_prepared(name, folder, got) from error


def _not_prepared(name: str, folder: Path, got: str) -> DataError:
    return DataError(
        f"tfds:{name} must be prepared in array_record form under {folder}; got "
        f"{got}. Prepare it once, where there is a network and TensorFlow: "
        f"tfds.builder({name!r}, data_dir={str(folder)!r}, "
        "file_format='array_record').download_and_prepare(). Reading needs neither."
    )


def _image_shape(features: Any, name: str) -> tuple[int | None, ...]:
    """Returns (H, W, C) of the feature `image`, None where it varies."""
    names = list(features) if hasattr(features, "keys") else []
    image = features["image"] if "image" in names else None
    shape = getattr(image, "shape", None)
    if image is None or image.np_dtype != np.uint8 or shape is None or len(shape) != 3:
        raise DataError(
            f"tfds:{name} must have a feature named image, uint8 of shape [H, W, C]; "
            f"got features {', '.join(names) or features}. Choose a data set of "
            "images, or export its images to a folder."
        )
    return tuple(shape)
