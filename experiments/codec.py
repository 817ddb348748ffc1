"""Compresses images with a trained network: `python -m experiments.codec COMMAND ...`.

A file is lossless, and decodes on any machine that has the run and its profile,
codec.safetensors in the run's folder. One of the layout progressive may be cut
anywhere; one of the layout archive is smaller where there are many images.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from diffusion_jax.codec import container
from diffusion_jax.codec import profile as profiles
from diffusion_jax.codec.profile import Chain
from diffusion_jax.errors import ConfigError, counted, raise_unknown
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.coding import coder, files, pixels
from diffusion_jax.lab.coding.files import Layout
from diffusion_jax.lab.drawing import outputs
from diffusion_jax.lab.measure import bound, codec_compared, formats_compared
from diffusion_jax.lab.process import entry, flags, replaceable
from diffusion_jax.lab.run_folder import results, runs
from diffusion_jax.lab.schema import choices
from diffusion_jax.lab.schema.checks import of_options
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.facts import Count, Positive, Seed, between
from diffusion_jax.lab.wiring import build
from diffusion_jax.storage import files as storage

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
    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Image files, or folders of them, of the size of the run's images."""
    out: Path | None = None
    """The file to write; FIRST.ddpx beside the first, or in codec/ of the run's folder
    when not given."""
    data: bool = False
    """Whether to take the run's own images instead of files."""
    split: Literal["train", "test"] = "train"
    """With --data: those trained on, or the test images or those held out."""
    max_images: Count | None = None
    """With --data: only so many images, drawn at random."""
    layout: Layout = "progressive"
    """One that may be cut anywhere, or archive, which is smaller for many images."""
    rule: Literal["max", "mrc", "orc"] = "max"
    """How noise is chosen in a progressive file: that of the best reconstruction, or a
    sample, by minimal random coding or by ordered random coding."""
    seed: Seed = 0
    """Of --max-images, and of what is random in a file."""
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
    options = parse(argv)
    of_options(options)
    dict(COMMANDS.values())[type(options)](options, argv)
    return 0


def parse(argv: Sequence[str]) -> Any:
    """Returns the options of the command that is named first.

    Raises:
      ConfigError: no such command.
      SystemExit: `--help`, or a flag that does not exist or has another type.
    """
    command, *rest = argv or ["--help"]
    prog, kinds = (
        entry.typed("codec"),
        {name: kind for name, (kind, _) in COMMANDS.items()},
    )
    if flags.asked([command]):
        print(flags.overview(prog, __doc__ or "", kinds))
        raise SystemExit(0)
    if command not in kinds:
        raise_unknown("the command", command, tuple(kinds))
    kind, prog = kinds[command], f"{prog} {command}"
    return flags.read(kind, args=rest, prog=prog, description=kind.__doc__)


def fit(options: Fit, argv: Sequence[str]) -> None:
    """Measures, and prints what files will take."""
    network = coder.opened(options.run, options, options.which)
    print(f"{network.run.folder}: {network.told}")
    found = coder.fit(network, count=options.images, seed=options.seed).profile
    size = int(np.prod(found.shape))
    print(f"alphabet: {counted(len(found.alphabet), 'value')}")
    for layout in ("progressive", "archive"):
        chain: Chain = getattr(found, layout)
        bits = float(found.about[f"predicted_{layout}"])
        print(
            f"{layout}: {chain.steps} steps down to t = {chain.times[0]}, about "
            f"{bits / 8:.1f} bytes an image, {bits / size:.3f} bits/dim"
        )
    print(f"written: {network.run.folder / coder.NAME}")


def compress(options: Compress, argv: Sequence[str]) -> None:
    """Compresses, and prints the size."""
    if options.data == bool(options.files):
        got = "both" if options.data else "neither"
        raise ConfigError(
            f"images must be files or --data; got {got}. Name image files after the "
            "run, or give --data for its own."
        )
    out = options.out or _default_out(options)
    if (
        not options.overwrite
        and out.is_file()
        and replaceable.has(out, container.MAGIC)
    ):
        raise ConfigError(
            f"cannot write {out}: a compressed file is there, which may be all that is "
            "left of its images. Name another, or give --overwrite."
        )
    replaceable.check_file(out, overwrite=options.overwrite)
    network = coder.opened(options.run, options, options.which)
    found = coder.load(network)
    if options.data:
        dataset = build.load_data(network.config, split=options.split)
        chosen = bound.choose(len(dataset.images), options.max_images, options.seed)
        images = np.asarray(dataset.images[chosen])
    else:
        images = pixels.read(options.files, found.profile.shape)
    packed = files.compress(
        found,
        images,
        layout=options.layout,
        rule=options.rule,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    with storage.replacing(out, durable=True) as file:
        file.write(packed.data)
    print(f"{network.run.folder}: {network.told}")
    size = len(packed.data)
    print(
        f"{counted(len(images), 'image')}, {packed.layout}: {size:,} bytes, "
        f"{size / len(images):.1f} an image, {packed.bits_per_dim:.3f} bits/dim of "
        "the whole file"
    )
    if packed.layout == "raw":
        print("note: plain pixels, which are smaller: the network knows no such images")
    elif packed.outside:
        values = counted(packed.outside, "pixel value")
        print(f"note: {values} never seen in training, some 3 bytes each")
    print(f"written: {out}")


def _default_out(options: Compress) -> Path:
    if options.files:
        first = options.files[0].resolve()
        return first.with_name((first.name if first.is_dir() else first.stem) + ".ddpx")
    count = "" if options.max_images is None else f"_{options.max_images}"
    return (
        runs.find(options.run).folder
        / "codec"
        / f"{options.split}{count}_{options.layout}.ddpx"
    )


def decompress(options: Decompress, argv: Sequence[str]) -> None:
    """Decompresses, and says whether anything was missing."""
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
    name = coder.of_file(options.file, data, options.run)
    head = container.opened(data)
    if head.layout != "progressive" and (options.bytes or options.rate):
        raise ConfigError(
            f"--bytes and --rate must be of a progressive file; got one of the layout "
            f"{head.layout}, which is read whole. Leave them out."
        )
    network = coder.opened(name, options, options.which)
    found = coder.load(network, head.identity)
    bits = None if options.bytes is None else 8 * options.bytes
    if options.rate is not None:
        size = files.number(data, found.profile) * int(np.prod(found.profile.shape))
        bits = int(options.rate * size)
    got = files.decompress(
        found,
        data,
        bits=bits,
        show=options.show,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    made = outputs.about(
        "codec", argv, network.config, network.drawable, network.told, options.seed
    )
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


def inspect(options: Inspect, argv: Sequence[str]) -> None:
    """Prints what a file says."""
    data = options.file.read_bytes()
    try:
        folder = Path(coder.of_file(options.file, data, options.run))
    except ConfigError as error:
        print(*files.in_words(data, None), sep="\n")
        print(f"note: {error}")
        return
    print(f"run       {folder}")
    identity = container.opened(data).identity
    profile = profiles.load(coder.path_of(runs.find(str(folder)).folder, identity))
    print(*files.in_words(data, profile), sep="\n")


def compare(options: Compare, argv: Sequence[str]) -> None:
    """Prints the table, and writes it with a plot."""
    pictures.check_plots()
    network = coder.opened(options.run, options, options.which)
    found = coder.load(network)
    print(f"{network.run.folder}: {network.told}")
    if missing := formats_compared.missing():
        print(f"note: {missing}")
    if options.split == "train":
        print("note: these are images that the network was trained on")
    every = build.load_data(network.config, split=options.split).images
    chosen = bound.choose(len(every), options.max_images, options.seed)
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
    made = {
        "command": replaceable.typed("codec", argv),
        "network": network.config.name,
        "weights": network.told,
        "weights_sha256": network.drawable.sha256,
        "seed": options.seed,
        "split": options.split,
        "images": len(images),
        "cut_images": len(few),
    }
    name = f"codec_{options.split}"
    points = {"own": result.own, "alone": result.alone, "together": result.together}
    numbers: dict[str, Any] = {"bytes_each": dict(result.sizes), "rate_rmse": points}
    path = results.write(network.run, name, made | numbers)
    plot = pictures.save(picture, path.with_suffix(".png"), made)
    print(f"written: {path}\nplot: {plot}")


COMMANDS: dict[str, tuple[type, Callable[[Any, Sequence[str]], None]]] = {
    "fit": (Fit, fit),
    "compress": (Compress, compress),
    "decompress": (Decompress, decompress),
    "inspect": (Inspect, inspect),
    "compare": (Compare, compare),
}
"""By their names: what each takes and does."""


if __name__ == "__main__":
    entry.guarded(main)
