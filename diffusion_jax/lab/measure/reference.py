"""Feature statistics of real images, which samples are compared with; cached."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.evaluation import metrics, moments
from diffusion_jax.lab.measure.extractors import Extractor, check_count, extract
from diffusion_jax.lab.process import hosts
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.storage import archives, files

KEPT = 10_000
"""Images whose features are kept, at most, for precision, recall and KID."""


class Reference(NamedTuple):
    """Statistics of the features of real images."""

    mean: np.ndarray
    """[D], float64."""
    covariance: np.ndarray
    """[D, D], float64."""
    images: int
    """How many images there were."""
    chosen: np.ndarray
    """Indices of the images whose features are kept, [K]."""
    features: np.ndarray
    """Their features, [K, D], float32."""
    halves: float
    """Frechet distance between two halves of the images; nan for too few."""


_empty = np.zeros((0, 0), np.float32)
NOTHING = Reference(_empty, _empty, 0, _empty, _empty, float("nan"))
"""The reference on hosts other than the first."""


def of(
    config: Config, images: Any, split: str, extractor: Extractor, *, batch_size: int
) -> Reference:
    """Returns the statistics of a split, from the cache where they are there.

    On several hosts all must call it; only the first one gets them.

    The cache is <output>/.cache/reference; a file is named after the extractor's sha256
    and protocol, the split, its images and their size.
    """
    about = {
        "extractor": extractor.name,
        "details": {k: v for k, v in extractor.details.items() if k != "file"},
        "source": config.data.source,
        "split": split,
        "shape": list(images.shape),
        "images": _digest(images),
    }
    name = runs.name_by(about)
    path = Path(config.output) / ".cache" / "reference" / f"{name}.npz"
    cached = _load(path)
    # The first host decides for all, since all compute together.
    if hosts.tell(cached is not None):
        return cached or NOTHING
    label = f"features of {split} images"
    features, _ = extract(extractor, images, batch_size=batch_size, label=label)
    if not hosts.first():
        return NOTHING
    made = _compute(features)
    with files.replacing(path) as file:
        text = json.dumps(about, sort_keys=True)
        np.savez(file, about=np.array(text), **made._asdict())
    return made


def gaussian_of(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and covariance of features, in float64, batch by batch."""
    stats = moments.init(features.shape[1])
    for begin in range(0, len(features), 4096):
        stats = moments.update(stats, features[begin : begin + 4096])
    return moments.finish(stats)


def distance(real: Reference, features: np.ndarray) -> float:
    """Returns the Frechet distance of features, [N, D], from those of real images."""
    return metrics.frechet_distance(*gaussian_of(features), real.mean, real.covariance)


def distance_of(
    real: Reference, images: np.ndarray, extractor: Extractor, *, batch_size: int
) -> float:
    """Returns the Frechet distance of uint8 images from the real ones.

    On several hosts all must call it; only the first one gets it, the others nan.
    """
    label = "features of samples"
    seen, _ = extract(extractor, images, batch_size=batch_size, label=label)
    return distance(real, seen) if hosts.first() else float("nan")


class Ruler(NamedTuple):
    """What samples are measured with: an extractor and the reference statistics."""

    extractor: Extractor
    real: Reference
    name: str
    """Of the distance, such as FID@2500 or fd_digits_classifier."""
    batch_size: int

    def distance(self, images: np.ndarray) -> float:
        """Returns `distance_of` uint8 images."""
        size = self.batch_size
        return distance_of(self.real, images, self.extractor, batch_size=size)


def ruler(
    config: Config,
    images: Any,
    extractor: Extractor,
    count: int,
    *,
    batch_size: int = 64,
    **hint: str,
) -> Ruler:
    """Returns what so many samples are measured with, from training images.

    Raises:
      ConfigError: no more samples than features; the hint is that of `check_count`.
    """
    check_count(extractor, count, **hint)
    real = of(config, images, "train", extractor, batch_size=batch_size)
    return Ruler(extractor, real, extractor.distance(count), batch_size)


def _compute(features: np.ndarray) -> Reference:
    mean, covariance = gaussian_of(features)
    order = np.random.default_rng(0).permutation(len(features))
    half, halves = len(order) // 2, float("nan")
    if half > features.shape[1]:
        one, other = features[order[:half]], features[order[half : 2 * half]]
        halves = metrics.frechet_distance(*gaussian_of(one), *gaussian_of(other))
    chosen = np.sort(order[:KEPT])
    return Reference(mean, covariance, len(features), chosen, features[chosen], halves)


def _digest(images: Any) -> str:
    """Returns the sha256 of images in memory, or the number of those on disk."""
    if isinstance(images, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    return f"{len(images)} on disk"


def _load(path: Path) -> Reference | None:
    try:
        found = archives.read_npz(path, lambda _: Reference._fields)
    except (OSError, archives.ArchiveError):
        return None  # not there, or cut off: computed again
    images, halves = int(found.pop("images")), float(found.pop("halves"))
    return Reference(**found, images=images, halves=halves)
