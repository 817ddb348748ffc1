"""The commands of `experiments.edit`, and what each takes."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from diffusion_jax.lab.schema import choices
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.facts import Count, Seed, at_least
from diffusion_jax.lab.schema.sampling import Sampling


def _file(name: str, said: str = "An image file.") -> Any:
    return tyro.conf.arg(metavar=name, help=said)


_A = Annotated[Path, tyro.conf.Positional, _file("A")]
_B = Annotated[Path, tyro.conf.Positional, _file("B", "Another.")]
_Image = Annotated[Path, tyro.conf.Positional, _file("IMAGE")]
_SHOWN = "Images from A to B, with the reconstructions of both."
_Ends = Annotated[int, at_least(2), tyro.conf.arg(help=_SHOWN)]


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all commands take."""

    how: choices.How = Sampling()
    seed: Seed = 0
    """Of the noise."""
    which: choices.Which = Weights()
    out: Path | None = None
    """The picture, FILE.png; in edit/ of the run's folder when not given, named after
    what is asked for. What stands there is replaced if it is a drawing too."""
    overwrite: bool = False
    """Whether `--out FILE` may replace what is no drawing of this project."""


_Shared = tyro.conf.OmitArgPrefixes[Shared]
_MAIN = "seed out overwrite sampler steps grid label guidance raw average step"


@dataclasses.dataclass(frozen=True)
class Interpolate:
    """Images between two, mixed after some diffusion steps (Fig. 8, Ho et al. 2020)."""

    MAIN: ClassVar = f"first second depth count {_MAIN}"
    first: _A
    second: _B
    depth: int | None = None
    """Diffusion steps before the mixing, 1 to T; half of T when not given. The more,
    the less is kept of either."""
    count: _Ends = 9
    shared: _Shared = Shared()


@dataclasses.dataclass(frozen=True)
class CoarseToFine:
    """The same at several depths, one a row (Fig. 9, Ho et al. 2020)."""

    MAIN: ClassVar = f"first second depths count {_MAIN}"
    first: _A
    second: _B
    depths: tuple[int, ...] = ()
    """Diffusion steps before the mixing, 0 (of pixels) to T; nine from T down to 0
    when not given."""
    count: _Ends = 9
    shared: _Shared = Shared()


@dataclasses.dataclass(frozen=True)
class Slerp:
    """Images between two, on the arc between the noises that ddim draws them from.

    Without --steps and --grid, 200 steps of the quadratic grid.
    """

    MAIN: ClassVar = f"first second count {_MAIN}"
    first: _A
    second: _B
    count: _Ends = 9
    shared: _Shared = Shared()


@dataclasses.dataclass(frozen=True)
class Inpaint:
    """Draws what is white in a mask; the other pixels stay as they are, to the bit."""

    MAIN: ClassVar = f"image mask count resamples jump {_MAIN}"
    image: _Image
    mask: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MASK")]
    """An image file of the same size: white is repainted, black is kept."""
    count: Count = 8
    """Ways to draw it."""
    resamples: int = 1
    """How often each stretch of the chain is walked (RePaint): the higher, the better
    the new part fits, and as much slower. Not with rules that have a memory."""
    jump: Count = 10
    """Steps to go back for it."""
    shared: _Shared = Shared()


@dataclasses.dataclass(frozen=True)
class Colorize:
    """Draws the colours of an image, grey or not: its mean over the channels stays."""

    MAIN: ClassVar = f"image count {_MAIN}"
    image: _Image
    count: Count = 8
    """Ways to draw them."""
    shared: _Shared = Shared()


@dataclasses.dataclass(frozen=True)
class Vary:
    """Variations of an image: some diffusion steps, and back again."""

    MAIN: ClassVar = f"image depth count {_MAIN}"
    image: _Image
    depth: int | None = None
    """Diffusion steps, 1 to T; half of T when not given. The more, the less is kept."""
    count: Count = 8
    """Variations."""
    shared: _Shared = Shared()
