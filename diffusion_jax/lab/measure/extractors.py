"""Feature extractors for FID and the like: Inception, or a classifier of the data."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax import errors
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.interop import inception_weights
from diffusion_jax.lab.measure import judges
from diffusion_jax.lab.process import hosts, progress
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.nets import inception
from diffusion_jax.training import parallel

Batch = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Extractor(NamedTuple):
    """A feature network, and what is reported beside its numbers."""

    name: str
    """inception, or <data>_classifier."""
    dimension: int
    """Number of features of an image."""
    apply: Batch
    """From uint8 images [B, H, W, C] to (features [B, D], logits [B, K])."""
    details: dict[str, Any]
    """File, sha256 and protocol."""

    def distance(self, count: int) -> str:
        """Returns the name of the Frechet distance of so many samples."""
        if self.name != "inception":
            return f"fd_{self.name}"
        return "FID" if count >= 50_000 else f"FID@{count}"


def choose(
    kind: str,
    config: Config,
    dataset: datasets.Dataset,
    *,
    weights: str | None = None,
    download: bool = False,
    preprocessing: str = "tensorflow",
) -> Extractor:
    """Returns the extractor of a kind, or the best one available.

    The kind is "inception", "classifier", or "auto": Inception where its weights are
    found and the images have 32 pixels or more a side, else the classifier, which is
    trained on the data set first where there is none yet. Weights are searched for when
    not given, and downloaded if they may be; preprocessing is "tensorflow" or
    "pytorch-fid".

    Raises:
      DataError: the weights are missing or damaged.
      ConfigError: no classifier can be trained on these data.
    """
    if kind == "auto":
        kind = "classifier"
        if weights or download:
            kind = "inception"
        elif min(config.data.shape[:2]) >= 32:
            try:
                inception_weights.find()
                kind = "inception"
            except errors.DataError:
                pass
    if kind == "inception":
        return _inception(weights, download, preprocessing)
    return _classifier(config, dataset)


def _inception(path: str | None, download: bool, preprocessing: str) -> Extractor:
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        loaded = inception_weights.load(inception_weights.find(path, download=download))
    for note in notes:
        print(f"note: {note.message}")
    net, mesh = inception.Inception(preprocessing=preprocessing), parallel.local_mesh()
    variables = jax.device_put(loaded.variables, parallel.replicated(mesh))
    compiled = jax.jit(net.apply)

    def apply(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Padded to a multiple of the devices.
        short = -len(images) % mesh.size
        padded = np.pad(images, ((0, short), (0, 0), (0, 0), (0, 0)), mode="edge")
        seen: Any = compiled(variables, jax.device_put(padded, parallel.sharded(mesh)))
        return tuple(np.asarray(x)[: len(images)] for x in seen)  # type: ignore[return-value]

    details = {
        "sha256": loaded.sha256,
        "format": loaded.format,
        "preprocessing": preprocessing,
    }
    return Extractor("inception", 2048, apply, details)


def _classifier(config: Config, dataset: datasets.Dataset) -> Extractor:
    path = judges.path_of(config)
    judge = judges.find(config, dataset)
    apply = functools.partial(judges.features_of, judge.params, judge.num_classes)
    details = {
        "file": str(path),
        "sha256": judge.sha256,
        "accuracy_on_held_out": judge.accuracy,
        "classes": judge.num_classes,
    }
    name = path.stem.rsplit("_", 1)[0].split("_without_")[0] + "_classifier"
    return Extractor(name, judges.WIDTH, apply, details)


def check_count(
    extractor: Extractor, count: int, *, more: str = "Give more with --count."
) -> None:
    """Raises ConfigError for no more samples than features."""
    if count <= extractor.dimension:
        raise ConfigError(
            f"count must be above {extractor.dimension}, the number of features of "
            f"{extractor.name}; got {count}. {more}"
        )


def extract(
    extractor: Extractor, images: Any, *, batch_size: int, label: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features [N, D] and logits [N, K] of images, float32, with a bar.

    On several hosts all must call it: each does its share of every batch of the first
    host's images, and gets the features of all.
    """
    if jax.process_count() > 1:
        extractor, images, batch_size = _shared(extractor, images, batch_size)
    features, logits = [], []
    starts = range(0, len(images), batch_size)
    total, shown = len(starts), hosts.first()
    with progress.clock(label, total=total, unit="batches", shown=shown) as bar:
        for begin in starts:
            end = min(begin + batch_size, len(images))
            batch = np.asarray(images[np.arange(begin, end)])
            short = batch_size - len(batch)
            padded = np.pad(batch, ((0, short), (0, 0), (0, 0), (0, 0)), mode="edge")
            seen = extractor.apply(padded)
            features.append(seen[0][: len(batch)].astype(np.float32))
            logits.append(seen[1][: len(batch)].astype(np.float32))
            bar.update()
    return np.concatenate(features), np.concatenate(logits)


def _shared(
    extractor: Extractor, images: Any, batch_size: int
) -> tuple[Extractor, Any, int]:
    """Returns extractor, images and batch size of batches spread over hosts."""
    count, host = jax.process_count(), jax.process_index()
    share = -(-batch_size // count)
    own = np.zeros(4, int) if host else np.array(images.shape)
    shape = multihost_utils.broadcast_one_to_all(own)
    if host:  # the first one's are sent batch by batch
        images = np.broadcast_to(np.zeros((), np.uint8), shape)

    def apply(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch = np.asarray(multihost_utils.broadcast_one_to_all(batch))
        seen = extractor.apply(batch[host * share : (host + 1) * share])
        every: Any = multihost_utils.process_allgather(seen, tiled=True)
        return every

    return extractor._replace(apply=apply), images, share * count
