"""Compresses images with a trained network: `python -m experiments.codec COMMAND ...`.

A file is lossless, and decodes on any machine that has the run and its profile,
codec.safetensors in the run's folder. One of the layout progressive may be cut
anywhere; one of the layout archive is smaller where there are many images.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from diffusion_jax.errors import ConfigError, counted
from diffusion_jax.lab.process import entry, flags
from diffusion_jax.lab.schema import choices
from diffusion_jax.lab.schema.checks import of_options
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.facts import Count, Positive, Seed, between

if TYPE_CHECKING:
    from diffusion_jax.lab.coding.coder import Network

# Flax is loaded by the commands, which no mistake in the arguments should wait for.

_Run = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN", help="A run's folder or name."),
]
_File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.ddpx")]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Measures what the codec needs of a run; writes its codec.safetensors."""

    run: choices.Named = None
    images: Count = 1024
    """Training images to measure on."""
    seed: Seed = 0
    """Of their choice, and of the noise in files."""
    which: choices.Which = Weights()


@dataclasses.dataclass(frozen=True)
class Compress:
    """Writes images to one file, without loss."""

    run: _Run
    out: Path
    """The file to write."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Image files, or folders of them, of the size of the run's images."""
    data: bool = False
    """Whether to take the run's own images instead of files."""
    split: Literal["train", "test"] = "train"
    """With --data: those trained on, or the test images or those held out."""
    max_images: Count | None = None
    """With --data: only so many images, drawn at random."""
    layout: Literal["progressive", "archive"] = "progressive"
    """One that may be cut anywhere, or archive, which is smaller for many images."""
    rule: Literal["max", "mrc"] = "max"
    """How noise is chosen in a progressive file: that of the best reconstruction, or a
    sample, by minimal random coding."""
    seed: Seed = 0
    """Of --max-images."""
    batch_size: Count = 64
    """Images at a time, in a progressive file."""
    overwrite: bool = False
    """Whether a file that is there may be replaced."""
    which: choices.Which = Weights()


@dataclasses.dataclass(frozen=True)
class Decompress:
    """Writes the images of a file."""

    file: _File
    """The compressed file; of a progressive one the end may be missing."""
    out: Path
    """FOLDER for one PNG an image, FILE.npz for an array `images`, or FILE.png for one
    picture: of a single image its pixels, of several a grid."""
    run: str | None = None
    """The run that the file was made with; looked for in runs/ when not given."""
    bytes: Count | None = None
    """Look only at so many bytes after the header."""
    rate: Positive | None = None
    """Look only at so many bits a pixel value."""
    show: Literal["mean", "sample", "flow"] = "mean"
    """What stands for bits that are missing: the mean that the network sees, a sample,
    or where the probability flow leads."""
    seed: Seed = 0
    """Of samples."""
    batch_size: Count = 64
    """Images at a time; any number gives the same."""
    overwrite: bool = False
    """Whether a file may be replaced that is no drawing of this project."""
    which: choices.Which = Weights()


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Says what is in a file, and where a cut would leave it."""

    file: _File
    """The compressed file, whole or not."""
    run: str | None = None
    """The run that it was made with; looked for in runs/ when not given."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compares a run's files with those of image formats, in a table and a plot."""

    run: choices.Named = None
    split: Literal["train", "test"] = "train"
    """Images trained on, or the test images or those held out."""
    max_images: Annotated[int, between(1, 2**20)] = 1000
    """Images for sizes without loss, drawn at random."""
    cut_images: Count = 64
    """Of them, those for a file that is cut, and for files with loss of one image."""
    seed: Seed = 0
    """Of the choice."""
    which: choices.Which = Weights()


def main(argv: Sequence[str]) -> int:
    """Does what the arguments ask for; returns the exit code."""
    name, options = parse(argv)
    of_options(options)
    does: Callable[[Any, Sequence[str]], None] = globals()[name]
    does(options, argv)
    return 0


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Returns the name of the command, and its options."""
    return flags.of_several(argv, entry.typed("codec"), __doc__ or "", COMMANDS)


def fit(options: Fit, argv: Sequence[str]) -> None:
    """Measures, and prints what files will take."""
    from diffusion_jax.codec.profile import LAYOUTS
    from diffusion_jax.lab.coding import coder

    network = coder.opened(options.run, options, options.which)
    print(f"{network.run.folder}: {network.told}")
    found = coder.fit(network, count=options.images, seed=options.seed).profile
    size = int(np.prod(found.shape))
    print(f"alphabet: {counted(len(found.alphabet), 'value')}")
    for layout in LAYOUTS:
        chain, bits = found.chain(layout), float(found.about[f"predicted_{layout}"])
        print(
            f"{layout}: {chain.steps} steps down to t = {chain.times[0]}, about "
            f"{bits / 8:.1f} bytes an image, {bits / size:.3f} bits/dim"
        )
    print(f"written: {network.run.folder / coder.NAME}")


def compress(options: Compress, argv: Sequence[str]) -> None:
    """Compresses, and prints the size."""
    from diffusion_jax.codec import container
    from diffusion_jax.lab.coding import coder, files
    from diffusion_jax.lab.process import replaceable
    from diffusion_jax.storage import files as storage

    if options.data == bool(options.files):
        got = "both" if options.data else "neither"
        raise ConfigError(
            f"images must be files or --data; got {got}. Name image files after the "
            "run, or give --data for its own."
        )
    out = options.out
    there = out.is_file() and replaceable.has(out, container.MAGIC)
    if there and not options.overwrite:
        raise ConfigError(
            f"cannot write {out}: a compressed file is there, which may be all that is "
            "left of its images. Name another, or give --overwrite."
        )
    replaceable.check_file(out, overwrite=options.overwrite)
    network = coder.opened(options.run, options, options.which)
    found = coder.load(network)
    images = _images(options, network)
    how = {"rule": options.rule, "batch_size": options.batch_size}
    data = files.compress(found, images, options.layout, **how)
    with storage.replacing(out, durable=True) as file:
        file.write(data)
    print(f"{network.run.folder}: {network.told}")
    size, head = len(data), container.opened(data)
    print(
        f"{counted(len(images), 'image')}, {head.layout}: {size:,} bytes, "
        f"{size / len(images):.1f} an image, {8 * size / images.size:.3f} bits/dim of "
        "the whole file"
    )
    if head.layout == "raw":
        print("note: plain pixels, which are smaller: the network knows no such images")
    elif len(head.place):
        values = counted(len(head.place), "pixel value")
        print(f"note: {values} never seen in training, some 3 bytes each")
    print(f"written: {out}")


def _images(options: Compress, network: "Network") -> np.ndarray:
    """Returns the images to compress, uint8 [N, H, W, C]."""
    from diffusion_jax.data import datasets
    from diffusion_jax.lab.coding import pixels
    from diffusion_jax.lab.wiring import build

    if not options.data:
        return pixels.read(options.files, network.config.data.shape)
    images = build.load_data(network.config, split=options.split).images
    chosen = datasets.choose(len(images), options.max_images, options.seed)
    return np.asarray(images[chosen])


def decompress(options: Decompress, argv: Sequence[str]) -> None:
    """Decompresses, and says whether anything was missing."""
    from diffusion_jax.codec import container
    from diffusion_jax.evaluation import pictures
    from diffusion_jax.lab.coding import coder, files
    from diffusion_jax.lab.drawing import outputs

    if options.bytes is not None and options.rate is not None:
        raise ConfigError(
            "--bytes and --rate must not be given together; got both. Give one."
        )
    out, suffix = options.out, options.out.suffix.lower()
    folder = suffix not in (".npz", ".png")
    if folder:
        outputs.check_folder(out)
    else:
        outputs.check_file(out, overwrite=options.overwrite)
    data = options.file.read_bytes()
    head = container.opened(data)
    name = options.run or coder.of_profile(head.identity)
    if head.layout != "progressive" and (options.bytes or options.rate):
        raise ConfigError(
            f"--bytes and --rate must be of a progressive file; got one of the layout "
            f"{head.layout}, which is read whole. Leave them out."
        )
    network = coder.opened(name, options, options.which)
    found = coder.load(network, head.identity)
    bits = None if options.bytes is None else 8 * options.bytes
    if options.rate is not None:
        bits = int(options.rate * head.number * int(np.prod(found.profile.shape)))
    how = {name: getattr(options, name) for name in ("show", "seed", "batch_size")}
    got = files.decompress(found, data, bits=bits, **how)
    made = _made(options, argv, network)
    if folder:
        outputs.save_each(iter([got.images]), out, made)
    elif suffix == ".npz":
        outputs.save_npz(got.images, out, made)
    else:
        one = len(got.images) == 1
        side = {"side": got.images.shape[1], "gap": 0} if one else {}
        pictures.save(pictures.grid(got.images, **side), out, made)
    print(f"{counted(len(got.images), 'image')}: {out}")
    if got.whole:
        print("lossless: the pixels are those that were compressed, by their CRC-32")
    else:
        left = f"{got.depth.min()} to {got.depth.max()} steps left out"
        print(
            f"lossy: a part of the file, {left}, {got.exact:,} of "
            f"{got.images.size:,} pixel values exact"
        )


def _made(options: Any, argv: Sequence[str], network: "Network") -> dict[str, Any]:
    """Returns how something was made, as JSON has it, to be kept in its file."""
    from diffusion_jax.lab.process import replaceable

    return {
        "command": replaceable.typed("codec", argv),
        "network": network.config.name,
        "weights": network.told,
        "weights_sha256": network.drawable.sha256,
        "seed": options.seed,
    }


def inspect(options: Inspect, argv: Sequence[str]) -> None:
    """Prints what a file says."""
    from diffusion_jax.codec import container
    from diffusion_jax.codec import profile as profiles
    from diffusion_jax.lab.coding import coder, files
    from diffusion_jax.lab.run_folder import runs

    data = options.file.read_bytes()
    identity = container.opened(data).identity
    try:
        folder = Path(options.run or coder.of_profile(identity))
    except ConfigError as error:
        print(*files.in_words(data, None), sep="\n")
        print(f"note: {error}")
        return
    print(f"run       {folder}")
    profile = profiles.load(coder.path_of(runs.find(str(folder)).folder, identity))
    print(*files.in_words(data, profile), sep="\n")


def compare(options: Compare, argv: Sequence[str]) -> None:
    """Prints the table, and writes it with a plot."""
    from diffusion_jax.data import datasets
    from diffusion_jax.evaluation import pictures
    from diffusion_jax.lab.coding import coder
    from diffusion_jax.lab.measure import codec_compared, formats_compared
    from diffusion_jax.lab.run_folder import results
    from diffusion_jax.lab.wiring import build

    pictures.check_plots()
    network = coder.opened(options.run, options, options.which)
    found = coder.load(network)
    print(f"{network.run.folder}: {network.told}")
    if missing := formats_compared.missing():
        print(f"note: {missing}")
    if options.split == "train":
        print("note: these are images that the network was trained on")
    every = build.load_data(network.config, split=options.split).images
    chosen = datasets.choose(len(every), options.max_images, options.seed)
    rest = np.setdiff1d(np.arange(len(every)), chosen)
    images, others = (np.asarray(every[these]) for these in (chosen, rest))
    if options.split == "test":  # what is known before, as the network knows it
        others = np.asarray(build.load_data(network.config).images)
    rng = np.random.default_rng(options.seed)
    few = images[rng.permutation(len(images))[: options.cut_images]]
    result = codec_compared.compare(found, images, few, others)
    print(*codec_compared.table(result.sizes, images[0].size), sep="\n")
    kind = {"train": "training", "test": "test"}[options.split]
    picture = pictures.rate_distortion_compared(
        ("this run, one file\nthat may be cut", result.own),
        result.alone,
        result.together,
        result.shown,
        title=f"{network.config.name}: {kind} images",
    )
    about = {"split": options.split, "images": len(images), "cut_images": len(few)}
    made = _made(options, argv, network) | about
    name = f"codec_{options.split}"
    points = {"own": result.own, "alone": result.alone, "together": result.together}
    numbers: dict[str, Any] = {"bytes_each": dict(result.sizes), "rate_rmse": points}
    path = results.write(network.run, name, made | numbers)
    plot = pictures.save(picture, path.with_suffix(".png"), made)
    print(f"written: {path}\nplot: {plot}")


COMMANDS: dict[str, type] = {
    "fit": Fit,
    "compress": Compress,
    "decompress": Decompress,
    "inspect": Inspect,
    "compare": Compare,
}
"""What each takes; the function of its name does it."""


if __name__ == "__main__":
    entry.guarded(main)
