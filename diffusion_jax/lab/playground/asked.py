"""What the page may ask for, read and checked before anything is computed."""

import dataclasses
import io
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import numpy as np
from PIL import Image

from diffusion_jax.data import image_files
from diffusion_jax.errors import ConfigError, DataError
from diffusion_jax.lab.schema import facts, json_fields, sampling
from diffusion_jax.lab.schema.checks import with_sampling
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import Count, Entries, Must, Seed, Whole, between
from diffusion_jax.lab.schema.sampling import Grid, Order, RuleName, Sampling

IMAGES, PIXELS = 64, 2**20
"""Most images of an answer, and most pixels of all of them."""
FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 16 * 10**6
"""Of an image file."""
_Id = Annotated[str, Must("of at most 64 characters", lambda v: len(v) <= 64)]
_Ids = Annotated[tuple[str, ...], Entries(2)]
_Many = Annotated[int, between(1, IMAGES)]

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class How:
    """A way to sample: those fields of `Sampling` that cannot take for ever."""

    sampler: RuleName | None = None
    steps: Count | None = None
    grid: Grid | None = None
    variance: Literal["small", "large"] | None = None
    eta: Annotated[float | None, between(0, 1)] = None
    order: Order | None = None
    label: Whole | None = None
    guidance: Annotated[float | None, between(0, 100)] = None


@dataclass(frozen=True)
class Denoise:
    """Images from noise."""

    how: How = How()
    seed: Seed = 0
    count: _Many = 16
    counted: bool = False
    """Whether to say the network evaluations of an image."""


@dataclass(frozen=True)
class Interpolate:
    """Images between two, mixed at a depth or on the arc between their encodings."""

    images: _Ids = ()
    depth: Count | None = None
    arc: bool = False
    how: How = How()
    seed: Seed = 0
    count: Annotated[int, between(2, IMAGES)] = 9


@dataclass(frozen=True)
class Inpaint:
    """The part of an image that a mask names, drawn anew."""

    image: _Id = ""
    mask: Annotated[tuple[int, ...], Entries(2**16)] = ()
    """Numbers of the pixels to draw, row by row from 0."""
    resamples: Annotated[int, between(1, 20)] = 1
    how: How = How()
    seed: Seed = 0
    count: _Many = 4


@dataclass(frozen=True)
class Compress:
    """An image in the fewest bytes, byte by byte."""

    image: _Id = ""
    nearest: bool = False
    """Whether to round each pixel to a value that the training images have: others
    take some bytes more each."""


@dataclass(frozen=True)
class Resume:
    """What was stopped, from where it was."""

    job: _Id = ""


KINDS = (Denoise, Interpolate, Inpaint, Compress, Resume)


def read(text: bytes, kind: type[Asked]) -> Asked:
    """Returns what was asked for.

    The text is JSON, an object with fields of `kind`, which is one of KINDS.

    Raises:
      ValueError: it is no such object, or a value is out of its bounds.

    >>> read(b'{"count": 65}', Denoise)
    Traceback (most recent call last):
    diffusion_jax.errors.ConfigError: count must be from 1 to 64; got 65. Change it.
    """
    values = json_fields.parse(text.decode("utf-8"))
    found, wrong = json_fields.read(values, kind, hint="Leave it out.")
    for name, must, got in wrong or facts.problems(found):
        raise ConfigError(f"{name} must be {must}; got {got}. Change it.")
    answer: Asked = found
    return answer


def decoded(data: bytes, config: Config) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns an image in the shape of the run's data, and its own height and width.

    The file is PNG, JPEG or WebP, of at most 16 million pixels.

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


def sampled(config: Config, how: How, count: int) -> Config:
    """Returns the configuration with the way to sample, for so many images.

    Raises:
      ConfigError: it does not fit the network, or there are too many pixels.
    """
    height, width, _ = config.data.shape
    most = max(1, PIXELS // (height * width))
    if count > most:
        raise ConfigError(
            f"count must be at most {most} for images of {height}x{width}; got "
            f"{count}. Ask for fewer."
        )
    given = Sampling(**dataclasses.asdict(how))
    changed = with_sampling(config, given)
    sample = changed.sample
    if sampling.RULES[sample.sampler].grid is None:
        raise ConfigError(
            f"the sampler must take steps, which can be watched; got {sample.sampler}. "
            "Use ddim."
        )
    if sample.variance == "analytic" or sample.classifier_guidance:
        raise ConfigError(
            "the way to sample must be that of the network alone; got an analytic "
            "variance or classifier guidance. Choose another sampler."
        )
    return changed
