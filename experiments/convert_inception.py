"""Converts Inception weights: `python -m experiments.convert_inception IN OUT`.

IN is the released graph (classify_image_graph_def.pb, or inception-2015-12-05.tgz), the
PyTorch file of pytorch-fid (where PyTorch is installed), or safetensors. OUT is a
.safetensors file that loads fastest and needs nothing else.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro

from diffusion_jax.errors import ConfigError
from diffusion_jax.interop import inception_weights
from diffusion_jax.lab.process import entry


@dataclasses.dataclass(frozen=True)
class Options:
    """From where, and to where."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """The weights as they were published."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The .safetensors file to write."""


def main(argv: Sequence[str]) -> int:
    """Converts, and prints what was read and written; returns the exit code."""
    options = tyro.cli(
        Options,
        args=argv,
        prog="python -m experiments.convert_inception",
        description=__doc__,
    )
    if options.out.suffix != ".safetensors":
        raise ConfigError(
            f"OUT must end in .safetensors; got {options.out}. That is the one format "
            "that is written."
        )
    weights = inception_weights.load(options.source)
    print(f"{options.source}: {weights.format}, SHA-256 {weights.sha256}")
    parameters, statistics = (
        sum(leaf.size for leaf in jax.tree.leaves(weights.variables[kind]))
        for kind in ("params", "batch_stats")
    )
    print(f"{parameters:,} parameters, {statistics:,} statistics")
    digest = inception_weights.save(weights.variables, options.out)
    print(f"{options.out}: safetensors, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    entry.guarded(main)
