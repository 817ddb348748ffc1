"""What commands ask of a trained network: the flags they share."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from diffusion_jax.lab.schema.sampling import Sampling


@dataclass(frozen=True)
class Weights:
    """Which weights to use."""

    raw: bool = False
    """Whether to use the last weights instead of their moving average (EMA)."""
    average: float | None = None
    """Which average to use: a decay that the run tracked, such as 0.999, or the length
    of a power-function average, a share of the training up to 0.28, such as 0.08; the
    first that the run tracked when not given."""
    step: int | None = None
    """Checkpoint to use, in training steps; the latest when not given."""
    strict: bool = False
    """Refuse a latest checkpoint that is damaged, instead of taking the newest that
    verifies."""


Named = Annotated[
    str | None,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="RUN",
        help="A run's folder or name (the newest in runs/ when not given).",
    ),
]
Data = Annotated[
    str | None,
    tyro.conf.arg(
        help="The data to compare with, where the network does not name its own: "
        "cifar10, folder:<path>, or what else data.source may be in training."
    ),
]
# Their fields are flags without a prefix.
How = tyro.conf.OmitArgPrefixes[Sampling]
Which = tyro.conf.OmitArgPrefixes[Weights]
