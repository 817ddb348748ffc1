"""Trains the classifier that judges samples: `python -m experiments.train_classifier`.

For the data of an experiment with labels. It goes to <output>/.classifiers/ and is used
by eval_fid where there are no Inception weights, or no use for them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from diffusion_jax.errors import raise_unknown
from diffusion_jax.lab.measure import judges
from diffusion_jax.lab.process import entry
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import Count, Seed
from diffusion_jax.lab.wiring import build
from experiments.configs import EXPERIMENTS


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train on."""

    experiment: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT")
    ] = "digits"
    """The experiment whose data are to be classified."""
    output: str = "runs"
    """Folder of all runs."""
    path: str | None = None
    """Where the data are, when they are not in the usual place."""
    steps: Count = 1500
    """Updates to make."""
    seed: Seed = 0
    """Of the initial weights, the held-out images and the order of the others."""


def main(argv: Sequence[str]) -> int:
    """Trains the classifier anew; returns the exit code."""
    options = entry.parse(Options, argv, "train_classifier", __doc__)
    if options.experiment not in EXPERIMENTS:
        raise_unknown("the experiment", options.experiment, tuple(EXPERIMENTS))
    config: Config = EXPERIMENTS[options.experiment].config
    config = dataclasses.replace(
        config,
        output=options.output,
        data=dataclasses.replace(config.data, path=options.path),
    )
    dataset = build.load_data(config)
    made = judges.train(config, dataset, steps=options.steps, seed=options.seed)
    print(f"accuracy {made.accuracy:.2%} on held-out images: {made.path}")
    return 0


if __name__ == "__main__":
    entry.guarded(main)
