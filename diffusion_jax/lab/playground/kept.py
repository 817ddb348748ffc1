"""Keeps the last few of something by names that nobody can guess, in memory alone."""

import io
import secrets
from collections import OrderedDict
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from diffusion_jax.data import image_files
from diffusion_jax.errors import ConfigError, DataError
from diffusion_jax.lab.schema.config import Config

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 16 * 10**6

T = TypeVar("T")


class Kept(Generic[T]):
    """The newest of some values; the oldest go."""

    def __init__(self, most: int, what: str) -> None:
        """Keeps `most` of what is called `what` in messages."""
        self.most, self.what = most, what
        self.values: OrderedDict[str, T] = OrderedDict()

    def put(self, value: T, name: str = "") -> str:
        """Returns the name of a value, a new one where none is given."""
        name = name or secrets.token_urlsafe(12)
        self.values[name] = value
        self.values.move_to_end(name)
        while len(self.values) > self.most:
            self.values.popitem(last=False)
        return name

    def get(self, name: str) -> T:
        """Returns a value that is still there.

        Raises:
          ConfigError: there is none of the name.
        """
        if name not in self.values:
            raise ConfigError(
                f"{self.what} must be among the last {self.most}; got another. Give "
                "it again."
            )
        self.values.move_to_end(name)
        return self.values[name]


def decoded(data: bytes, config: Config) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns an image in the shape of the run's data, and its own height and width.

    Args:
      data: a file, PNG, JPEG or WebP, of at most 16 million pixels.
      config: of the run.

    Raises:
      DataError: it is no such file.
    """
    height, width, channels = config.data.shape
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as head:
            pixels = head.width * head.height
        if pixels > MOST_PIXELS:
            raise ValueError(f"{pixels:,} pixels, over the limit of {MOST_PIXELS:,}")
        return image_files.decode(
            io.BytesIO(data), (height, width), channels, formats=FORMATS
        )
    except Exception as error:  # decoders fail in many ways
        why = str(error) if type(error) is ValueError else type(error).__name__
        raise DataError(
            f"the image must be a PNG, JPEG or WebP file that can be read; got "
            f"{len(data):,} bytes that are not ({why[:200]}). Convert it to PNG."
        ) from error
