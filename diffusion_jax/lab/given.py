"""Checks what a notebook passes in, before any work: options, images, labels, keys."""

import dataclasses
import hashlib
import operator
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.checkpoints.checkpoint import CheckpointError
from diffusion_jax.data import arrays, datasets
from diffusion_jax.errors import ConfigError, DataError, raise_unknown
from diffusion_jax.lab.schema import json_fields, latents
from diffusion_jax.lab.schema.config import GIVEN, Config, Data, Net, to_dict


@contextmanager
def in_python() -> Iterator[None]:
    """Names Python arguments where errors from within name flags of commands."""
    try:
        yield
    except (ConfigError, CheckpointError, DataError) as error:
        error.args = (_in_python(str(error)),)
        raise


def _in_python(said: str) -> str:
    """Returns the text of an error with arguments in place of flags.

    >>> _in_python("eta must be 0; got 1. Change it with --eta.")
    'eta must be 0; got 1. Change it: eta=...'
    >>> _in_python("... Give labels, or --net.classes 0.")
    '... Give labels, or net.classes 0.'
    """
    if said.startswith("RUN must"):
        said = "where" + said.removeprefix("RUN")
        said = re.sub(r"python -m \S+ \S+ OUT\S* --download", "download=True", said)
    said = said.replace("with --name NAME", "by another name in config")
    said = said.replace("by --force", "by force=True")
    said = re.sub(
        r"Change it with --([\w.-]+)\.$",
        lambda found: f"Change it: {found[1].replace('-', '_')}=...",
        said,
    )
    # The flags of a whole command stay.
    return re.sub(
        r"python -m .*|--([a-z][\w.-]*\w)",
        lambda found: found[1].replace("-", "_") if found[1] else found[0],
        said,
    )


def config_of(value: Any) -> Config:
    """Returns a configuration whose values all have their field's type.

    Raises:
      ConfigError: it is no configuration, or a value has another type.
    """
    if not isinstance(value, Config):
        raise ConfigError(
            f"config must be a lab.Config; got a {type(value).__name__}. Begin with "
            "that of a network, dataclasses.replace(trained.config, name='mine'), or "
            "with lab.Config()."
        )
    found: Config = options(to_dict(value), Config)
    return found


def options(values: Mapping[str, Any], cls: Any) -> Any:
    """Returns a dataclass with some fields given and the others at their defaults.

    Raises:
      ConfigError: a value of another type than its field's.
      ValueError: no such option.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))
    if unknown := values.keys() - names:
        raise_unknown("the option", min(unknown), names)
    found, wrong = json_fields.read(_plain(values), cls)
    if wrong:
        name, must, got = (
            re.sub(r"\b(true|false|null)\b", lambda word: _PYTHON[word[0]], said)
            for said in wrong[0]
        )
        raise ConfigError(f"{name} must be {must}; got {got}. Change it: {name}=...")
    return found


_PYTHON = {"true": "True", "false": "False", "null": "None"}


def _plain(value: Any) -> Any:
    """Returns a value with paths as text and scalars of arrays as Python numbers."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray | jax.Array) and not value.ndim:
        return value.item()
    return value


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """Returns an argument as an int; ConfigError if it is none or too small."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ConfigError(
            f"{name} must be a whole number, {least} or more; got {value!r}. Change "
            f"it: {name}=..."
        )
    return number


def dataset(images: Any, labels: Any, config: Config) -> datasets.Dataset:
    """Returns images, uint8 [N, H, W, C], and labels, int32 [N] or None.

    Raises:
      ConfigError, DataError: they are no such arrays, or labels are given though the
        network has no classes.
    """
    found = arrays.as_images(_array("images", images), "the call")
    known = None if labels is None else _array("labels", labels)
    if known is not None and known.shape != found.shape[:1]:
        advice = "Give as many."
        if known.shape == (len(found), 1):
            advice = "Give labels[:, 0]."
        elif known.ndim == 2:
            advice = "Of one-hot rows take np.argmax(labels, axis=1)."
        raise DataError(
            f"labels must be one whole number for each of {len(found)} images; got "
            f"shape {known.shape}. {advice}"
        )
    known = arrays.as_labels(known, len(found), "the call")
    if known is not None and not config.net.classes:
        raise ConfigError(
            f"labels must be left out where net.classes is 0; got {len(known)}. Leave "
            f"them out, or say how many classes there are: net=lab.Net(classes="
            f"{max(0, int(known.max())) + 1})."
        )
    return datasets.Dataset(found, known, "images")


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, str | os.PathLike):
        raise ConfigError(
            f"{name} must be an array; got {os.fspath(value)!r}. Files are named in "
            "the configuration: data=lab.Data(source='folder:PATH', image_size=32, "
            "channels=3)."
        )
    if isinstance(value, datasets.Dataset):
        raise ConfigError(
            f"{name} must be an array; got a Dataset. Give its parts: "
            "images=dataset.images, labels=dataset.labels."
        )
    try:
        return np.asarray(value)
    except (ValueError, TypeError):
        raise ConfigError(
            f"{name} must be one array; got a {type(value).__name__} of several "
            "shapes. Make them alike, and np.stack them."
        ) from None


def data_of(config: Config, images: Any, given: Any, labels: Any) -> Data:
    """Returns the data section of the configuration for images in memory.

    Args:
      config: the configuration.
      images: uint8 [N, H, W, C].
      given: the same images, as the caller gave them.
      labels: int32 [N] or None.

    Raises:
      ConfigError: nobody can tell which axis is which, or all are black.
    """
    count, height, width, channels = images.shape
    if np.ndim(given) == 3 and not isinstance(given, list | tuple):
        if count == 3:
            raise ConfigError(
                f"images must be [N, H, W, C]; got {images.shape[:3]}, which is three "
                "grey ones, or one in colours with its channels first. Give "
                "images[..., None], or images.transpose(1, 2, 0)[None]."
            )
        if width in (1, 3, 4):
            raise ConfigError(
                f"images must be [N, H, W, C]; got {height}x{width} with 1. Of a "
                "single image give images[None]."
            )
    if images.max() <= 1:
        raise ConfigError(
            "images must be in 0..255, from black to white; got all of 0 and 1. Of "
            "masks give images * 255."
        )
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes())
    if labels is not None:
        digest.update(labels.tobytes())
    return dataclasses.replace(
        config.data,
        source=f"{GIVEN}{digest.hexdigest()[:16]}",
        path=None,
        image_size=(height, width),
        channels=channels,
    )


def label_of(net: Net, label: ArrayLike | None, count: int) -> jax.Array | None:
    """Returns the labels that a network is given, [count]; None without classes."""
    if label is None and net.classes and not net.label_dropout:
        raise ConfigError(
            f"label must be given, in 0..{net.classes - 1}; got none, which this "
            "network was never told. Give one for all, or one an image."
        )
    if label is not None and not net.classes:
        raise ConfigError(
            "label must be left out with a network without classes; got "
            f"{label!r}. Train one with net.classes."
        )
    if not net.classes:
        return None
    known = jnp.asarray(net.classes if label is None else label)  # the last row: none
    fits = known.dtype.kind in "iu" and known.shape in ((), (count,))
    if fits and label is not None and not isinstance(known, jax.core.Tracer):
        values = np.asarray(known)  # under jit an array of JAX would be traced
        fits = bool(((values >= 0) & (values < net.classes)).all())
    if not fits:
        raise ConfigError(
            f"label must be whole numbers in 0..{net.classes - 1}, one for all or one "
            f"for each of {count} images; got {label!r}. Give one class, say 0."
        )
    return jnp.broadcast_to(known, (count,))


def check_key(key: Any) -> None:
    """Raises ConfigError for anything but one key of jax.random."""
    if not (
        isinstance(key, jax.Array)
        and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and key.ndim == 0
    ):
        raise ConfigError(
            f"key must be one key of jax.random; got {key!r}. Give jax.random.key(0)."
        )


def check_shape(
    config: Config, shape: tuple[int, ...], name: str, of: tuple[int, ...] = ()
) -> None:
    """Raises ConfigError for images [N, ...] of another shape than the network's.

    Or than `of`, where that is given.
    """
    wanted = of or config.data.shape
    if tuple(shape) != wanted:
        raise ConfigError(
            f"{name} must be of shape [N, {', '.join(map(str, wanted))}], what the "
            f"network was trained on; got [N, {', '.join(map(str, shape))}]. Resize "
            "them, or load another network."
        )


def noisy(config: Config, x_t: Any, t: Any) -> tuple[jax.Array, jax.Array]:
    """Returns noisy images, [B, H, W, C], and their times, [B] or [], as arrays.

    Raises:
      ConfigError: images of another shape or type, or not one time or one an image.
    """
    check_shape(config, np.shape(x_t)[1:], "x_t", latents.seen(config))
    found, times = jnp.asarray(x_t), jnp.asarray(t)
    if times.shape not in ((), found.shape[:1]):
        raise ConfigError(
            f"t must be one time for all or one for each of {len(found)} images; got "
            f"shape {times.shape}. Give one, or as many."
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ConfigError(
            "x_t must be floating-point images, scaled to [-1, 1] and noised; got "
            f"{found.dtype}. Of uint8 images: x / 127.5 - 1, then gaussian.q_sample."
        )
    return found, times
