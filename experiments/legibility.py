"""Measures whether samples are legible: `python -m experiments.legibility [RUN]`.

Asks three questions of the samples of a run that was trained on labelled images:

  certainty  a classifier is fitted on half of the real images. It is sure
             (probability at least 0.9) of some share of the samples, and of
             some share of the other, held-out half. The ratio of the two shares
             should be at least 0.9.
  coverage   of the samples, each class should get at least 4%.
  copies     fewer than 2% of the samples should be nearer to a training image
             than a quarter of the median distance between nearest training
             images.

The exit code is 0 where all three hold and 1 where one does not.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar

import jax
import numpy as np

from diffusion_jax.errors import ConfigError, counted, needs
from diffusion_jax.lab.drawing import draws
from diffusion_jax.lab.process import entry
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import choices
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.facts import Count, Seed, at_least
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.trained import opening, weights
from diffusion_jax.lab.wiring import build
from diffusion_jax.storage.waiting import Bar
from diffusion_jax.training import parallel

SURE = 0.9
LEAST_CERTAINTY, LEAST_CLASS, MOST_COPIES = 0.9, 0.04, 0.02


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    MAIN: ClassVar = (
        "run count splits seed sampler steps grid label guidance raw average step"
    )
    run: choices.Named = None
    count: Annotated[int, at_least(100)] = 500
    """Samples to draw; shares of less than 100 say nothing."""
    which: choices.Which = Weights()
    splits: Count = 4
    """Ways to halve the real images; certainty is the mean over them."""
    how: choices.How = Sampling()
    seed: Seed = 1
    """Of the samples. The grids made in training are seed 0."""


def main(argv: Sequence[str]) -> int:
    """Prints and writes the three answers; returns the exit code."""
    options = entry.parse(Options, argv, "legibility", __doc__)
    needs("sklearn", "tell whether samples can be read", "digits")
    parallel.split_cpu()
    which, how = options.which, options.how
    run, config = opening.opened(options.run, options, which=which, how=how)
    dataset = build.load_data(config, labelled=True)
    if dataset.labels is None or not isinstance(dataset.images, np.ndarray):
        raise ConfigError(
            "the run must have been trained on labelled images that fit in memory; got "
            f"{config.data.source}. Use digits or fashion_mnist, say."
        )
    drawable, step, kind = opening.load(config, run, which)
    key = jax.random.key(options.seed)
    batches = draws.in_batches(config, drawable, key, options.count, 64)
    samples = np.concatenate(list(batches))

    real, fake = features(dataset.images), features(samples)
    judged = [
        certainty(real, dataset.labels, fake, seed=seed)
        for seed in Bar(range(options.splits), "judging", unit="splits")
    ]
    ratio = float(np.mean([r for r, _ in judged]))
    shares = np.mean([s for _, s in judged], axis=0)
    copied = copies(real, fake)
    passed = (
        ratio >= LEAST_CERTAINTY,
        shares.min() >= LEAST_CLASS,
        copied < MOST_COPIES,
    )
    print(f"{run.folder}, {weights.describe(kind, step)}")
    print(f"{counted(options.count, 'sample')}, seed {options.seed}")
    show(passed, ratio, shares, copied)
    result = {
        "step": step,
        "count": options.count,
        "seed": options.seed,
        "certainty": ratio,
        "certainty_of_each_split": [r for r, _ in judged],
        "class_shares": shares.tolist(),
        "copies": copied,
        "passed": all(passed),
    }
    runs.write_json(run.folder / "legibility.json", result)
    return 0 if all(passed) else 1


def show(
    passed: Sequence[bool], ratio: float, shares: np.ndarray, copied: float
) -> None:
    """Prints the three answers."""
    each = " ".join(f"{100 * share:.1f}" for share in shares)
    said = (
        f"certainty {ratio:.3f} of that of held-out images (at least 0.9)",
        f"smallest class {shares.min():.1%} (at least 4%); all, in %: {each}",
        f"copies {copied:.1%} (less than 2%)",
    )
    for holds, text in zip(passed, said, strict=True):
        print(f"  {'yes' if holds else 'NO '}  {text}")


def features(images: np.ndarray) -> np.ndarray:
    """Returns pixels as vectors in [-1, 1], [N, H W C]."""
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1


def certainty(
    real: np.ndarray, labels: np.ndarray, fake: np.ndarray, *, seed: int
) -> tuple[float, np.ndarray]:
    """Returns the ratio of sure shares, and the share of samples in each class.

    Args:
      real: real images as vectors, [N, D].
      labels: their classes, [N].
      fake: samples as vectors, [M, D].
      seed: of the halving and of the classifier.
    """
    # Imported here because it takes a second, which `--help` should not.
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier

    fit_x, held_x, fit_y, _ = train_test_split(
        real, labels, test_size=0.5, stratify=labels, random_state=seed
    )
    classifier = MLPClassifier((128,), alpha=1e-2, max_iter=400, random_state=seed)
    classifier.fit(fit_x, fit_y)
    of_fake, of_held = (classifier.predict_proba(x) for x in (fake, held_x))
    sure = [float((p.max(axis=1) >= SURE).mean()) for p in (of_fake, of_held)]
    counts = np.bincount(of_fake.argmax(axis=1), minlength=of_fake.shape[1])
    return sure[0] / sure[1], counts / len(fake)


def copies(real: np.ndarray, fake: np.ndarray) -> float:
    """Returns the share of samples that are nearly a training image.

    >>> real = np.array([[0.0], [1.0], [2.0]])
    >>> copies(real, np.array([[0.1], [0.5], [1.4], [5.0]]))
    0.25
    """
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors().fit(real)
    # The nearest neighbour of a training image is the image itself.
    among_real = index.kneighbors(real, 2)[0][:, 1]
    return float((index.kneighbors(fake, 1)[0] < np.median(among_real) / 4).mean())


if __name__ == "__main__":
    entry.guarded(main)
