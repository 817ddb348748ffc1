"""Measures how far samples are from data: `python -m experiments.eval_fid [RUN]`.

Draws samples with the averaged weights (EMA), rounds them to uint8, and compares their
features with those of the real images. With the weights of the Inception network that
is FID; without them it is the same distance in the features of a small classifier,
called fd_<data>_classifier.
"""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from PIL import Image

from diffusion_jax import errors
from diffusion_jax.data import datasets, image_files, image_folders
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import metrics, moments, pictures
from diffusion_jax.lab.drawing import draws
from diffusion_jax.lab.measure import extractors, reference
from diffusion_jax.lab.process import entry, hosts, progress
from diffusion_jax.lab.run_folder import results, runs
from diffusion_jax.lab.schema import choices, sampling
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import MOST_SEED, Count, Seed
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.trained import opening, weights
from diffusion_jax.lab.training import initial
from diffusion_jax.lab.wiring import build, chains, learning
from diffusion_jax.training import parallel

PRECISION, INCEPTION = "precision, recall, density, coverage", "Inception score"
NEIGHBOURS = 12
"""Samples that are shown with their nearest training images."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to evaluate, and how."""

    MAIN: ClassVar = (
        "run extractor weights download reference samples data count seeds seed "
        "batch_size sampler steps grid label guidance raw average step "
        "untrained"
    )
    run: choices.Named = None
    extractor: Literal["auto", "inception", "classifier"] = "auto"
    """Whose features are compared; auto is Inception where its weights are at hand."""
    weights: str | None = None
    """File of the Inception weights: .pb, .tgz, .safetensors or .pth."""
    download: bool = False
    """Whether the Inception weights may be downloaded (95 MB, once)."""
    preprocessing: Literal["tensorflow", "pytorch-fid"] = "tensorflow"
    """How images are enlarged for Inception: as the original code or as pytorch-fid."""
    reference: Path | None = None
    """Statistics of the real images (.npz with mu and sigma) in place of the data."""
    samples: str | None = None
    """npz:FILE or folder:FOLDER of samples to evaluate in place of the run's own."""
    count: Count | None = None
    """Samples; 50,000, but as many as training images where there are fewer."""
    seeds: Count = 1
    """Sets of samples to evaluate, with seeds following each other: the error bar."""
    seed: Seed = 0
    """Of the first set."""
    how: choices.How = Sampling()
    batch_size: Count = 64
    """Images at a time, over all devices."""
    which: choices.Which = Weights()
    data: choices.Data = None
    untrained: bool = False
    """Whether to use the weights that training began with, as a yardstick."""


def main(argv: Sequence[str]) -> int:
    """Prints and writes the numbers; returns the exit code."""
    options = entry.parse(Options, argv, "eval_fid", __doc__)
    check(options)
    parallel.split_cpu()  # before JAX looks for devices, as the checks of hosts do
    which, how, data = options.which, options.how, options.data
    run, config = opening.opened(options.run, options, which=which, how=how, data=data)
    given, known = load_samples(options, config), load_reference(options)
    dataset = build.load_data(config)
    extractor = extractors.choose(
        options.extractor,
        config,
        dataset,
        weights=options.weights,
        download=options.download,
        preprocessing=options.preprocessing,
    )
    hosts.check_same("the extractor", extractor.details["sha256"])
    count = len(given) if given is not None else options.count
    count = count or min(50_000, len(dataset.images))
    few = left_out(extractor, count, options, len(dataset.images))
    if known is not None:
        check_reference(known, options, extractor)
    print(
        f"{run.folder} by {extractor.name}, sha256 {extractor.details['sha256'][:16]}"
    )
    drawn: list[Any] = [given] * options.seeds
    about: dict[str, Any] = {"samples": options.samples}
    if given is None:
        drawn, about = draw(run, config, options, count)
    # All hosts extract features together; only the first has them and goes on.
    real = known or references(config, dataset, extractor, options)
    scores = [score(extractor, real, fake, options, few) for fake in drawn]
    out, end = run.folder / "eval", suffix(options)
    written = out / f"fid{end}.json"
    if hosts.first():
        result = summary(extractor, real, scores, about, options, count, config)
        result["left_out"] = few
        show(result, extractor)
        results.write(run, written.stem, result)
    if "train" in real:
        picture = neighbours(real["train"], dataset, extractor, drawn[-1], options)
        path = out / f"neighbours{end}.png"
        if hosts.first():
            pictures.save(picture, path)
            print(f"nearest training images, by pixels and by features: {path}")
    print(f"written: {written}")
    return 0


def suffix(options: Options) -> str:
    """Returns the end of the results' names, by whose samples were measured."""
    if options.samples is not None:
        return "_given"
    if options.which.average is not None:
        return f"_average_{options.which.average:g}"
    return "_untrained" if options.untrained else "_raw" * options.which.raw


def check(options: Options) -> None:
    """Raises ConfigError where options are out of range or do not fit together."""
    last = MOST_SEED - (options.seeds - 1)
    if options.seed > last:
        raise ConfigError(
            f"seed must be from 0 to {last} with {options.seeds} seeds; got "
            f"{options.seed}. Change it with --seed."
        )
    if options.untrained and options.which != Weights():
        raise ConfigError(
            f"untrained must stand alone; got {weights.flags(options.which)} as well. "
            "Evaluate one set of weights at a time."
        )


def load_samples(options: Options, config: Config) -> np.ndarray | None:
    """Returns the samples that were given as files, uint8 [N, H, W, C], if any were."""
    if options.samples is None:
        return None
    if not options.samples.startswith(("npz:", "folder:")):
        raise ConfigError(
            f"samples must be npz:FILE or folder:FOLDER; got {options.samples!r}. "
            "Write which of the two it is in front of the path."
        )
    height, width, channels = config.data.shape
    size = height, width
    kind, _, where = options.samples.partition(":")
    if kind == "folder":
        check_sizes(Path(where).expanduser(), size)
        found = datasets.load(options.samples, image_size=size, channels=channels)
    else:
        found = datasets.load(options.samples)
    if found.images.shape[1:] != config.data.shape:
        raise ConfigError(
            f"samples must be {height}x{width} with {channels} channels, like the "
            f"images of the run; got {found.images.shape[1:]} in {options.samples}. "
            "Resize them yourself, and say how: it moves the number."
        )
    return np.asarray(found.images[np.arange(len(found.images))])


def check_sizes(where: Path, size: tuple[int, int]) -> None:
    """Raises ConfigError for an image of another size: nothing is resized unasked."""
    files = image_folders.find(where)
    for place, name in enumerate(files.names):
        try:
            with Image.open(files.open(place)) as image:
                own = image_files.upright_size(image)
        except Exception:  # of any kind: `datasets.load` names the error
            continue
        if own != size:
            raise ConfigError(
                f"samples must be {size[0]}x{size[1]} like the images of the run; got "
                f"{own[0]}x{own[1]} in {where / name}. Resize them yourself, and say "
                "how: it moves the number."
            )


def load_reference(options: Options) -> dict[str, reference.Reference] | None:
    """Returns the statistics in the file that was named, if one was.

    Raises:
      ValueError: it is damaged or holds something else.
    """
    if options.reference is None:
        return None
    mean, covariance = moments.load_reference(options.reference)
    known = reference.NOTHING._replace(mean=mean, covariance=covariance)
    return {"reference": known}


def check_reference(
    known: dict[str, reference.Reference],
    options: Options,
    extractor: extractors.Extractor,
) -> None:
    """Raises ConfigError where statistics are those of another extractor."""
    mean = known["reference"].mean
    if len(mean) != extractor.dimension:
        raise ConfigError(
            f"the reference must be of {extractor.dimension} features, those of "
            f"{extractor.name}; got {len(mean)} in {options.reference}. Make it with "
            "the same extractor."
        )


def references(
    config: Config,
    dataset: datasets.Dataset,
    extractor: extractors.Extractor,
    options: Options,
) -> dict[str, reference.Reference]:
    """Returns the statistics of the run's real images, by split."""
    splits = {"train": dataset}
    try:
        splits["test"] = build.load_data(config, split="test")
    except errors.DataError as error:
        first = str(error).partition("\n")[0]
        print(f"note: no comparison with test images: {first}")
    return {
        split: reference.of(
            config, part.images, split, extractor, batch_size=options.batch_size
        )
        for split, part in splits.items()
    }


def draw(
    run: runs.Run, config: Config, options: Options, count: int
) -> tuple[list[Any], dict[str, Any]]:
    """Returns the samples of each seed, and how they were drawn, as JSON has it."""
    step: int | None = 0
    if options.untrained:
        params = learning.init_state(config, initial.params(config)).params
        drawable, kind = opening.complete(config, run, params), "untrained"
    else:
        drawable, step, kind = opening.load(config, run, options.which)
    folder, size = run.folder / "eval" / "samples", options.batch_size
    drawn = [
        draws.to_disk(folder, config, drawable, count=count, seed=seed, batch_size=size)
        for seed in range(options.seed, options.seed + options.seeds)
    ]
    return drawn, {
        "weights": kind,
        "weights_sha256": drawable.sha256,
        "training_step": step,
        **chains.describe_sampling(config),
        "evaluations_per_sample": chains.count_evaluations(config, drawable),
    }


def left_out(
    extractor: extractors.Extractor, count: int, options: Options, images: int
) -> dict[str, str]:
    """Returns the numbers for which there are too few samples, and why; says so too.

    Raises:
      ConfigError: there are too few for any.
    """
    distance, both = extractor.distance(count), min(count, images)
    least = {distance: (extractor.dimension + 1, count)}
    if options.reference is None:
        least |= {kernel_distance(extractor): (2, both), PRECISION: (4, both)}
    if extractor.name == "inception":
        least[INCEPTION] = (10, count)
    few = {
        name: f"takes {fewest:,} or more"
        for name, (fewest, got) in least.items()
        if got < fewest
    }
    if distance in few:
        few[distance] += f", as {extractor.name} has {extractor.dimension:,} features"
    said = "; ".join(f"{name} {why}" for name, why in few.items())
    if len(few) == len(least):
        raise ConfigError(
            f"samples must be enough for one number; got {count}: {said}. Give more, "
            "with --count where they are drawn."
        )
    if few and hosts.first():
        print(f"note: left out for want of samples: {said}")
    return few


def kernel_distance(extractor: extractors.Extractor) -> str:
    """Returns the name of the kernel distance."""
    return "KID" if extractor.name == "inception" else f"kd_{extractor.name}"


def score(
    extractor: extractors.Extractor,
    real: dict[str, reference.Reference],
    fake: np.ndarray,
    options: Options,
    few: Collection[str],
) -> dict[str, Any]:
    """Returns the numbers of one set of samples; none on a host but the first."""
    features, logits = extractors.extract(
        extractor, fake, batch_size=options.batch_size, label="features of samples"
    )
    if not hosts.first():
        return {}
    with progress.clock("comparing features"):
        name, kernel = extractor.distance(len(fake)), kernel_distance(extractor)
        found: dict[str, Any] = {}
        if name not in few:
            for split, known in real.items():
                found[f"{name} vs {split}"] = reference.distance(known, features)
        if "train" in real:
            kept, part = real["train"].features, features[: reference.KEPT]
            size = min(1000, len(part), len(kept))
            if kernel not in few:
                value, _ = metrics.kid(kept, part, subset_size=size)
                found[f"{kernel} vs train"] = value
            if PRECISION not in few:
                found |= metrics.precision_recall(kept, part)._asdict()
        if extractor.name == "inception":
            if INCEPTION not in few:
                found[INCEPTION], _ = metrics.inception_score(logits, seed=2020)
        else:
            shares = np.asarray(jax.nn.softmax(logits.astype(np.float64), axis=-1))
            found["class_shares"] = shares.mean(axis=0).tolist()
            found["sure"] = float((shares.max(axis=1) >= 0.9).mean())
    return found


def summary(
    extractor: extractors.Extractor,
    real: dict[str, reference.Reference],
    scores: list[dict[str, Any]],
    about: dict[str, Any],
    options: Options,
    count: int,
    config: Config,
) -> dict[str, Any]:
    """Returns the numbers with their error bars, and the protocol beside them."""
    numbers: dict[str, Any] = {}
    for name in scores[0]:
        values = np.array([each[name] for each in scores], np.float64)
        if values.ndim > 1:
            numbers[name] = values.mean(axis=0).tolist()
            continue
        numbers[name] = {"mean": float(values.mean()), "of_each": values.tolist()}
        if len(values) > 1:
            numbers[name]["std"] = float(values.std(ddof=1))
    halves = real["train"].halves if "train" in real else float("nan")
    named = {
        split: errors.counted(known.images, f"{split} image")
        for split, known in real.items()
    }
    if options.reference is not None:
        named = {"reference": str(options.reference)}
    return {
        "numbers": numbers,
        "half_of_train_against_the_other_half": None if np.isnan(halves) else halves,
        "extractor": extractor.name,
        "extractor_details": extractor.details,
        "reference": named,
        "count": count,
        "seeds": [options.seed + i for i in range(options.seeds)],
        "rounding": "uint8, to nearest",
        "data": config.data.source,
        **about,
        "versions": runs.versions(),
    }


def show(result: dict[str, Any], extractor: extractors.Extractor) -> None:
    """Prints the numbers as a table, and the protocol under it."""
    for name, value in result["numbers"].items():
        if name == "class_shares":
            each = " ".join(f"{100 * share:.1f}" for share in value)
            print(f"  {'classes, in %':<38} {each}")
            continue
        bar = f" +- {value['std']:.4f}" if "std" in value else ""
        print(f"  {name:<38} {value['mean']:10.4f}{bar}")
    halves = result["half_of_train_against_the_other_half"]
    if halves is not None:
        name = "the same of one half of train vs other"
        print(f"  {name:<38} {halves:10.4f}")
    print(f"against {'; '.join(result['reference'].values())}")
    if result.get("samples"):
        print(f"{result['count']:,} samples from {result['samples']}")
        return
    how = sampling.describe(result)
    which = weights.describe(result["weights"], result["training_step"])
    print(
        f"{result['count']:,} samples, seeds {result['seeds']}, {which}, {how} "
        f"({result['evaluations_per_sample']:.0f} evaluations, NFE), rounded to uint8"
    )


def neighbours(
    real: reference.Reference,
    dataset: datasets.Dataset,
    extractor: extractors.Extractor,
    fake: np.ndarray,
    options: Options,
) -> Any:
    """Returns samples, and under each the nearest training image (Figs. 12 and 15).

    The first row of three are samples, the second their neighbours in pixels, the third
    those in features. None on a host but the first.
    """
    shown = np.asarray(fake[:NEIGHBOURS])
    features, _ = extractors.extract(
        extractor, shown, batch_size=options.batch_size, label="neighbours"
    )
    if not hosts.first():
        return None
    candidates = np.asarray(dataset.images[real.chosen])
    rows = [shown]
    for among, of in (
        (candidates.reshape(len(candidates), -1), shown.reshape(len(shown), -1)),
        (real.features, features),
    ):
        rows.append(candidates[metrics.nearest(of, among)])
    picture = pictures.grid(np.concatenate(rows), columns=len(shown))
    left = ("sample", "nearest in pixels", "nearest in features")
    return pictures.labelled(picture, left=left)


if __name__ == "__main__":
    entry.guarded(main, several=True)
