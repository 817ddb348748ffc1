"""Draws images from a trained network: `python -m experiments.sample [RUN]`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from diffusion_jax.errors import ConfigError, counted
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.drawing import draws, exact, figures, outputs
from diffusion_jax.lab.process import entry, hosts, progress, replaceable
from diffusion_jax.lab.schema import choices, sampling
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import Count, Seed
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.trained import opening, weights
from diffusion_jax.lab.wiring import chains
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.training import parallel


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw, and where it goes."""

    MAIN: ClassVar = (
        "run count format out columns seed batch_size sampler steps grid eta "
        "order label guidance classifier_guidance raw average step figure strip"
    )
    run: choices.Named = None
    count: Count = 64
    """Images to draw."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture of all, one PNG an image, or an array `images` (uint8) in a file."""
    out: Path | None = None
    """File (grid, npz) or folder (png); inside the run's folder when not given, named
    after the options. An earlier drawing there is replaced."""
    overwrite: bool = False
    """Whether `--out FILE` may replace what is no drawing of this project."""
    columns: Count | None = None
    """Images a row of a grid; when not given as square as possible, or a column a class
    where all classes are drawn."""
    how: choices.How = Sampling()
    seed: Seed = 0
    """Of the noise: that of image i is the same whatever the count, and the image too
    but for rounding, which now and then moves a pixel by one of its 256 values."""
    batch_size: Count = 64
    """Images at a time."""
    which: choices.Which = Weights()
    figure: Literal["progressive", "shared", "quality"] | None = None
    """Draw a figure of the paper instead: the predicted x0 along the chain (Fig. 6),
    samples that share x_t and then differ (Fig. 7), or the distance of the predicted x0
    from the data along the chain (Fig. 10; takes --count of some hundreds)."""
    strip: bool = True
    """Whether to draw, beside a grid, the denoising of its first images."""
    exact: bool = False
    """Draw by ddpm or ddim in whole numbers, with the network in float64: the same
    pixels on every machine, for every batch size and number of devices. Beside the
    picture goes a .json that makes certain of it; a strip is not drawn."""
    listed: Path | None = None
    """That .json of another machine, to draw by `--exact` what it drew."""


def main(argv: Sequence[str]) -> int:
    """Draws what the arguments ask for; returns the exit code."""
    options = entry.parse(Options, argv, "sample", __doc__)
    parallel.split_cpu()  # before JAX looks for devices, as the checks of hosts do
    check(options)
    which, how = options.which, options.how
    run, config = opening.opened(options.run, options, which=which, how=how)
    out = options.out or run.folder / "draw" / default_name(options)
    if options.exact:
        exact.check(config)
    check_out(options, out)
    drawable, step, kind = opening.load(config, run, which)
    said = sampling.describe(chains.describe_sampling(config))
    told = weights.describe(kind, step)
    print(f"{run.folder}: {told}, {said}")

    made = outputs.about("sample", argv, config, drawable, told, options.seed)
    if options.figure is not None:
        return draw_figure(config, drawable, out, options, made)
    count, size = options.count, options.batch_size
    if options.exact:
        batches = exact.in_batches(
            config,
            drawable,
            made,
            record_of(out, options),
            count=count,
            batch_size=size,
            given=options.listed,
        )
    else:
        key = jax.random.key(options.seed)
        batches = draws.in_batches(config, drawable, key, count, size)
    if not hosts.first():
        for _ in batches:  # all hosts draw, the first one saves
            pass
        return 0
    if options.format == "png":
        outputs.save_each(batches, out, made)
    else:
        drawn = np.concatenate(list(batches))
        if options.format == "npz":
            outputs.save_npz(drawn, out, made)
        else:
            classes = chains.count_classes(config, drawable)
            picture = pictures.by_class(drawn, classes, columns=options.columns)
            pictures.save(picture, out, made)
    print(f"{counted(count, 'image')}: {out}")
    if options.format == "grid" and options.strip and not options.exact:
        if jax.process_count() > 1:  # the first host draws these alone
            drawable = jax.tree.map(np.asarray, drawable)
        rows, seed = min(8, count), options.seed
        with progress.clock("drawing the denoising of the first images"):
            end, seen = figures.chain(config, drawable, count=rows, seed=seed)
        strip = pictures.save(figures.strip(end, seen.t, seen.x_t), strip_of(out), made)
        print(f"denoising: {strip}")
    return 0


def check(options: Options) -> None:
    """Raises ConfigError where options do not go together."""
    hosts_, figure = jax.process_count(), options.figure
    if (figure is not None or options.exact) and hosts_ > 1:
        said = "an exact drawing" if options.exact else "a figure"
        flag = "--exact" if options.exact else f"--figure {figure}"
        raise ConfigError(
            f"{said} must be drawn on one host; got {flag} on {hosts_}. Draw it with "
            "--hosts 1."
        )
    if options.exact and figure is not None:
        raise ConfigError(
            f"exact must be left out with a figure; got --figure {figure}. Only plain "
            "drawings are exact."
        )
    if options.listed is not None and not options.exact:
        raise ConfigError(
            f"listed must come with --exact; got --listed {options.listed} alone. "
            "Give both."
        )


def draw_figure(
    config: Config, drawable: Drawable, out: Path, options: Options, made: Any
) -> int:
    """Draws a figure of the paper; returns the exit code."""
    count, seed = options.count, options.seed
    if options.figure == "quality":
        figures.quality(config, drawable, out, made, count=count, seed=seed)
        print(f"plot: {out}")
        return 0
    rows, said = min(8, count), f"drawing the figure {options.figure}"
    if options.figure == "shared":
        with progress.clock(said):
            picture = figures.shared(config, drawable, count=rows, seed=seed)
    else:
        with progress.clock(said):
            end, seen = figures.chain(config, drawable, count=rows, seed=seed)
        picture = figures.strip(end, seen.t, seen.x0)
    print(f"{options.figure}: {pictures.save(picture, out, made)}")
    return 0


def default_name(options: Options) -> str:
    """Returns the name of the file or folder of a drawing."""
    end = outputs.other_than_usual(options.how, options.which)
    end += "_exact" * options.exact
    if options.figure is not None:
        return f"{options.figure}{end}.png"
    name = f"seed{options.seed}_{options.count}{end}"
    return {"grid": f"{name}.png", "npz": f"{name}.npz", "png": name}[options.format]


def strip_of(out: Path) -> Path:
    """Returns the path of the strip that shows the denoising of the first images."""
    return out.with_name(f"{out.stem}_denoising.png")


def record_of(out: Path, options: Options) -> Path:
    """Returns where the file goes that makes certain of an exact drawing."""
    return out.with_name(f"{out.name if options.format == 'png' else out.stem}.json")


def check_out(options: Options, out: Path) -> None:
    """Raises ConfigError where a file that is no drawing would be replaced."""
    if options.exact or options.figure == "quality":  # which have numbers beside them
        numbers, mark = record_of(out, options), exact.MARK
        if numbers == out:
            raise ConfigError(
                f"--out must not end in .json, as the numbers beside the drawing do; "
                f"got {out}. Give another name."
            )
        replaceable.check_file(numbers, mark, overwrite=options.overwrite)
    if options.figure is None and options.format == "png":
        return outputs.check_folder(out)
    strip = options.strip and not options.exact
    if options.figure is None and options.format == "grid" and strip:
        outputs.check_file(strip_of(out), overwrite=options.overwrite)
    return outputs.check_file(out, overwrite=options.overwrite)


if __name__ == "__main__":
    entry.guarded(main, several=True)
