"""Trains small classifiers on four fifths of labelled images, and stores them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError, DataError
from diffusion_jax.lab.schema import json_fields
from diffusion_jax.storage import trees
from diffusion_jax.storage.waiting import Bar

BATCH, RATE, HELD_OUT = 128, 2e-3, 0.2

Loss = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
"""A function of parameters, a key, images and labels."""


class Fitted(NamedTuple):
    """A trained classifier and its file."""

    params: Any
    num_classes: int
    accuracy: Any
    """On held-out images, in [0, 1]; of a noisy classifier by time."""
    sha256: str
    """Of its file."""
    path: Path


def labelled(dataset: datasets.Dataset, hint: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels.

    The hint says what to do without labels.

    Raises:
      ConfigError: the images have no labels, or do not fit in memory.
    """
    if dataset.labels is None or not isinstance(dataset.images, np.ndarray):
        raise ConfigError(
            "a classifier must be trained on labelled images that fit in memory; got "
            f"{dataset.name}. {hint}"
        )
    return np.asarray(dataset.images), np.asarray(dataset.labels)


def fit(
    params: Any,
    loss: Loss,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    seed: int,
) -> tuple[Any, np.ndarray]:
    """Returns the trained parameters, and the indices of the images held out.

    The images are uint8, [N, H, W, C], the labels [N]. The learning rate falls to 0 as
    a cosine; the seed is of the held-out fifth, of the order of the others, and of the
    keys.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    held, fitted = np.split(order, [int(HELD_OUT * len(images))])
    rate = optax.cosine_decay_schedule(RATE, steps)
    optimizer = optax.adamw(rate, weight_decay=1e-2)

    @jax.jit
    def update(params: Any, memory: Any, *batch: Any) -> Any:
        updates, memory = optimizer.update(
            jax.grad(loss)(params, *batch), memory, params
        )
        return optax.apply_updates(params, updates), memory

    memory, key = optimizer.init(params), jax.random.key(seed)
    size = min(BATCH, len(fitted))
    for step in Bar(range(steps), "training a classifier", unit="steps"):
        chosen = fitted[datasets.batch_indices(seed, step, len(fitted), size)]
        batch = jax.random.fold_in(key, step), images[chosen], labels[chosen]
        params, memory = update(params, memory, *batch)
    return params, held


def by_batches(function: Callable[[int, np.ndarray], Any], images: np.ndarray) -> Any:
    """Returns what a function gives for images, batch by batch, on the host.

    It takes the index of the first of `BATCH` images, uint8 [N, H, W, C], and these,
    and returns arrays of as many rows. The last batch is padded, so that nothing
    compiles again.
    """
    parts = []
    for first in range(0, len(images), BATCH):
        part = images[first : first + BATCH]
        fill = [(0, BATCH - len(part)), (0, 0), (0, 0), (0, 0)]
        parts.append(function(first, np.pad(part, fill)))
    return jax.tree.map(lambda *each: np.concatenate(each)[: len(images)], *parts)


def save(path: Path, params: Any, num_classes: int, accuracy: Any) -> None:
    """Writes a classifier to a file, which is replaced whole."""
    meta = {"num_classes": str(num_classes), "accuracy": json.dumps(accuracy)}
    trees.write(path, params, meta)


def load(
    path: Path, check: Callable[[Fitted], None], *, command: str, again: str
) -> Fitted:
    """Returns the classifier in a file.

    `check` raises an error where the content is no classifier of its kind; `again` says
    what to do without a usable file.

    Raises:
      ConfigError: there is none, or the file is damaged or no classifier of the kind.
    """
    try:
        params, meta, digest = trees.read(path)
        count, accuracy = int(meta["num_classes"]), json_fields.parse(meta["accuracy"])
        found = Fitted(params, count, accuracy, digest, path)
        check(found)
    except DataError as error:
        raise ConfigError(f"{error} Or {again}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} must be a classifier that {command} wrote; got {error}. "
            f"{again[0].upper()}{again[1:]}"
        ) from error
    return found
