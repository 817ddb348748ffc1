"""Draws images from a trained network: `python -m experiments.sample [RUN]`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.drawing import draws, figures
from diffusion_jax.lab.process import entry, hosts
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import sampling
from diffusion_jax.lab.schema.checks import (
    require_positive,
    require_seed,
    with_sampling,
)
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.trained import extras, weights
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.lab.wiring import chains
from diffusion_jax.training import parallel


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw, and where it goes."""

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = (
        None
    )
    """A run's folder or name; the newest in runs/ when not given."""
    count: int = 64
    """Images to draw."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture of all, one PNG an image, or an array `images` (uint8) in a file."""
    out: Path | None = None
    """File (grid, npz) or folder (png); inside the run's folder when not given."""
    columns: int | None = None
    """Images a row of a grid; as square as possible when not given."""
    how: tyro.conf.OmitArgPrefixes[Sampling] = dataclasses.field(
        default_factory=Sampling
    )
    seed: int = 0
    """Of the noise; image i of a seed is the same whatever the count."""
    batch_size: int = 64
    """Images at a time."""
    which: tyro.conf.OmitArgPrefixes[Weights] = dataclasses.field(
        default_factory=Weights
    )
    figure: Literal["progressive", "shared", "quality"] | None = None
    """Draw a figure of the paper instead: how x0 as the network sees it comes into
    being (Fig. 6), samples that share x_t and then part (Fig. 7), or how far x0 is from
    the data along the chain (Fig. 10; takes --count of some hundreds)."""
    strip: bool = True
    """Whether to draw, with a grid, how the first images came out of noise."""


def main(argv: Sequence[str]) -> int:
    """Draws what the arguments ask for; returns the exit code."""
    options = tyro.cli(
        Options, args=argv, prog="python -m experiments.sample", description=__doc__
    )
    require_positive(options, "count", "columns", "batch_size")
    require_seed(options.seed)
    parallel.split_cpu()  # before JAX looks for devices, as the checks of hosts do
    run = runs.find(options.run)
    if options.figure is not None and jax.process_count() > 1:
        raise ConfigError(
            "a figure must be drawn on one host; got --figure "
            f"{options.figure} on {jax.process_count()}. Draw it with --hosts 1."
        )
    hosts.check_same("the options", repr(options))
    hosts.check_shared(run.folder)
    config = with_sampling(runs.read_config(run), options.how)
    parallel.persistent_cache(run.cache)
    params, step, kind = extras.load(config, run, options.which)
    how = sampling.describe(chains.describe_sampling(config))
    print(f"{run.folder}: {weights.describe(kind, step)}, {how}")

    if options.figure is not None:
        return draw_figure(config, params, run, options)
    size, key = min(options.batch_size, options.count), jax.random.key(options.seed)
    draw = chains.make_draw(config, size, parallel.make_mesh())
    batches = draws.in_batches(draw, params, key, options.count, size)
    if not hosts.first():
        for _ in batches:  # drawn by all, and kept by the first
            pass
        return 0
    out = options.out or run.folder / "draw" / default_name(options)
    if options.format == "png":
        draws.save_each(batches, out)
    else:
        drawn = np.concatenate(list(batches))
        if options.format == "npz":
            draws.save_npz(drawn, out)
        else:
            pictures.save(pictures.grid(drawn, columns=options.columns), out)
    print(f"{options.count} images: {out}")
    if options.format == "grid" and options.strip:
        path = out.with_name(f"{out.stem}_denoising.png")
        rows = min(8, options.count)
        if jax.process_count() > 1:  # the first host draws these alone
            params = jax.tree.map(np.asarray, params)
        end, seen = figures.chain(config, params, count=rows, seed=options.seed)
        print(f"denoising: {pictures.save(figures.strip(end, seen.x_t), path)}")
    return 0


def draw_figure(config: Config, params: Any, run: runs.Run, options: Options) -> int:
    """Draws a figure of the paper; returns the exit code."""
    folder = run.folder / "draw"
    if options.figure == "quality":
        figures.quality(config, params, folder, count=options.count, seed=options.seed)
        print(f"plot: {folder / 'quality.png'}")
        return 0
    rows = min(8, options.count)
    if options.figure == "shared":
        picture = figures.shared(config, params, count=rows, seed=options.seed)
    else:
        end, seen = figures.chain(config, params, count=rows, seed=options.seed)
        picture = figures.strip(end, seen.x0)
    out = options.out or folder / f"{options.figure}.png"
    print(f"{options.figure}: {pictures.save(picture, out)}")
    return 0


def default_name(options: Options) -> str:
    """Returns the file or folder that a drawing goes to."""
    name = f"seed{options.seed}_{options.count}"
    return {"grid": f"{name}.png", "npz": f"{name}.npz", "png": name}[options.format]


if __name__ == "__main__":
    entry.guarded(main, several=True)
