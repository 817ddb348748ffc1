"""What the page may ask for, read from JSON and checked before anything is computed."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema import facts, json_fields, sampling
from diffusion_jax.lab.schema.checks import with_sampling
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import Count, Entries, Must, Seed, Whole, between
from diffusion_jax.lab.schema.sampling import Grid, Order, RuleName, Sampling

IMAGES, PIXELS = 64, 2**20
"""Most images of an answer, and most pixels of all of them."""
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
class Vary:
    """An image, noised to a depth and drawn again from there."""

    image: _Id = ""
    depth: Count | None = None
    how: How = How()
    seed: Seed = 0
    count: _Many = 8


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
class Colorize:
    """The colours of an image."""

    image: _Id = ""
    how: How = How()
    seed: Seed = 0
    count: _Many = 8


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


KINDS = (Denoise, Vary, Interpolate, Inpaint, Colorize, Compress, Resume)


def read(text: bytes, kind: type[Asked]) -> Asked:
    """Returns what was asked for.

    Args:
      text: JSON, an object with fields of `kind`.
      kind: one of KINDS.

    Raises:
      ValueError: it is no such object, or a value is out of its bounds.

    >>> read(b'{"count": 65}', Denoise)
    Traceback (most recent call last):
    diffusion_jax.errors.ConfigError: count must be from 1 to 64; got 65. Change it.
    """
    found, wrong = json_fields.read(json_fields.parse(text.decode("utf-8")), kind)
    problems = wrong or facts.problems(found)
    for name, must, got in problems:
        raise ConfigError(f"{name} must be {must}; got {got}. Change it.")
    answer: Asked = found
    return answer


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


def typed(how: How) -> list[str]:
    """Returns the flags of a way to sample.

    >>> typed(How(sampler="ddim", steps=10))
    ['--sampler', 'ddim', '--steps', '10']
    """
    said = []
    for name, value in dataclasses.asdict(how).items():
        if value is not None:
            said += [f"--{name}", f"{value:g}" if name == "guidance" else str(value)]
    return said
