"""The commands of `experiments.edit`, and what each takes."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.trained.weights import Weights


def _file(name: str) -> Any:
    return tyro.conf.arg(metavar=name)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all commands take."""

    how: tyro.conf.OmitArgPrefixes[Sampling] = dataclasses.field(
        default_factory=Sampling
    )
    seed: int = 0
    """Of the noise."""
    which: tyro.conf.OmitArgPrefixes[Weights] = dataclasses.field(
        default_factory=Weights
    )
    out: Path | None = None
    """The picture, FILE.png; edit/COMMAND.png in the run's folder when not given."""


With = tyro.conf.OmitArgPrefixes[Shared]


@dataclasses.dataclass(frozen=True)
class Interpolate:
    """Images between two, mixed after some diffusion steps (Fig. 8, Ho et al. 2020)."""

    first: Annotated[Path, tyro.conf.Positional, _file("A")]
    """An image file."""
    second: Annotated[Path, tyro.conf.Positional, _file("B")]
    """Another."""
    depth: int | None = None
    """Diffusion steps before the mixing, 1 to T; half of T when not given. The more,
    the less is kept of either."""
    count: int = 9
    """Images from A to B, with the reconstructions of both."""
    shared: With = dataclasses.field(default_factory=Shared)


@dataclasses.dataclass(frozen=True)
class CoarseToFine:
    """The same at several depths, one a row (Fig. 9, Ho et al. 2020)."""

    first: Annotated[Path, tyro.conf.Positional, _file("A")]
    """An image file."""
    second: Annotated[Path, tyro.conf.Positional, _file("B")]
    """Another."""
    depths: tuple[int, ...] = ()
    """Diffusion steps before the mixing, 0 (of pixels) to T; nine from T down to 0
    when not given."""
    count: int = 9
    """Images from A to B, with the reconstructions of both."""
    shared: With = dataclasses.field(default_factory=Shared)


@dataclasses.dataclass(frozen=True)
class Slerp:
    """Images between two, on the arc between the noises that ddim draws them from.

    Without --steps and --grid, 200 steps of the quadratic grid.
    """

    first: Annotated[Path, tyro.conf.Positional, _file("A")]
    """An image file."""
    second: Annotated[Path, tyro.conf.Positional, _file("B")]
    """Another."""
    count: int = 9
    """Images from A to B, with the reconstructions of both."""
    shared: With = dataclasses.field(default_factory=Shared)


@dataclasses.dataclass(frozen=True)
class Inpaint:
    """Draws what is white in a mask; the other pixels stay as they are, to the bit."""

    image: Annotated[Path, tyro.conf.Positional, _file("IMAGE")]
    """An image file."""
    mask: Annotated[Path, tyro.conf.Positional, _file("MASK")]
    """An image file of the same size: white is repainted, black is kept."""
    count: int = 8
    """Ways to draw it."""
    resamples: int = 1
    """How often each stretch of the chain is walked (RePaint): the higher, the better
    the new part fits, and as much slower. Not with rules that have a memory."""
    jump: int = 10
    """Steps to go back for it."""
    shared: With = dataclasses.field(default_factory=Shared)


@dataclasses.dataclass(frozen=True)
class Colorize:
    """Draws the colours of an image whose mean over the channels is kept."""

    image: Annotated[Path, tyro.conf.Positional, _file("IMAGE")]
    """An image file, grey or not."""
    count: int = 8
    """Ways to draw them."""
    shared: With = dataclasses.field(default_factory=Shared)


@dataclasses.dataclass(frozen=True)
class Vary:
    """Variations of an image: some diffusion steps, and back again."""

    image: Annotated[Path, tyro.conf.Positional, _file("IMAGE")]
    """An image file."""
    depth: int | None = None
    """Diffusion steps, 1 to T; half of T when not given. The more, the less is kept."""
    count: int = 8
    """Variations."""
    shared: With = dataclasses.field(default_factory=Shared)
