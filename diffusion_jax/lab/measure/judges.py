"""The classifier that judges samples, where there are no Inception weights."""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError, DataError
from diffusion_jax.lab.schema.checks import AT_MOST
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import fitting
from diffusion_jax.nets.classifier import Classifier, Features
from diffusion_jax.storage import trees

WIDTH = 64
MOST_CLASSES = AT_MOST["net.classes"]


class Judge(NamedTuple):
    """A trained classifier and where it came from."""

    params: Any
    num_classes: int
    accuracy: float
    """On the images held out from its training, in [0, 1]."""
    sha256: str
    """Of its file."""
    path: Path


def path_of(config: Config) -> Path:
    """Returns where the classifier of a configuration's data goes."""
    name = "".join(c if c.isalnum() else "_" for c in config.data.source)
    size, channels = config.data.image_size, config.data.channels
    folder = Path(config.output) / ".classifiers"
    return folder / f"{name}_{size}x{size}x{channels}.safetensors"


def has_labels(dataset: datasets.Dataset) -> bool:
    """Returns whether a classifier can be trained on these images."""
    return dataset.labels is not None and isinstance(dataset.images, np.ndarray)


def train(
    config: Config, dataset: datasets.Dataset, *, steps: int = 1500, seed: int = 0
) -> Judge:
    """Returns a classifier trained on four fifths of the images, and writes it.

    Raises:
      ConfigError: the images have no labels, or do not fit in memory.
    """
    hint = "Give Inception weights instead: --weights FILE or --download."
    images, labels = fitting.labelled(dataset, hint)
    num_classes = int(labels.max()) + 1
    net = Classifier(num_classes, width=WIDTH)

    def loss(params: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = cast(Features, net.apply(params, x)).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    params = net.init(jax.random.key(seed), images[:1])
    params, held = fitting.fit(params, loss, images, labels, steps=steps, seed=seed)
    guesses = logits_of(params, num_classes, images[held]).argmax(axis=1)
    accuracy = float((guesses == labels[held]).mean())
    return save(path_of(config), params, num_classes, accuracy)


def features_of(params: Any, num_classes: int, images: np.ndarray) -> Any:
    """Returns features [N, D] and logits [N, classes] of uint8 images, on the host."""
    parts = [
        _apply(params, num_classes, _padded(images[i : i + fitting.BATCH]))
        for i in range(0, len(images), fitting.BATCH)
    ]
    return tuple(
        np.concatenate(part)[: len(images)] for part in zip(*parts, strict=True)
    )


def logits_of(params: Any, num_classes: int, images: np.ndarray) -> np.ndarray:
    """Returns the classes' scores of uint8 images, [N, classes]."""
    logits: np.ndarray = features_of(params, num_classes, images)[1]
    return logits


def save(path: Path, params: Any, num_classes: int, accuracy: float) -> Judge:
    """Writes a classifier under a temporary name, then renames it."""
    meta = {"num_classes": str(num_classes), "accuracy": repr(accuracy)}
    trees.write(path, params, meta)
    return load(path)


def load(path: Path) -> Judge:
    """Returns the classifier in a file, named as `path_of` names it.

    Raises:
      ConfigError: the file is damaged or no classifier of ours.
    """
    try:
        params, meta, digest = trees.read(path)
        num_classes, accuracy = int(meta["num_classes"]), float(meta["accuracy"])
        if not (0 < num_classes <= MOST_CLASSES and 0 <= accuracy <= 1):
            raise ValueError(f"{num_classes} classes and an accuracy of {accuracy}")
        shape = re.search(r"_(\d+)x(\d+)x(\d+)$", path.stem)
        if shape is None:
            raise ValueError("a name that does not end in the shape of its images")
        sides = map(int, shape.groups())
        images = jax.ShapeDtypeStruct((1, *sides), jnp.uint8)
        key = jax.eval_shape(lambda: jax.random.key(0))
        net = Classifier(num_classes, width=WIDTH)
        like = jax.eval_shape(net.init, key, images)
        trees.check(params, like, path)
    except DataError as error:
        again = "Or delete it, and it is trained again."
        raise ConfigError(f"{error} {again}") from error
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} must be a classifier that train_classifier wrote; got {error}. "
            "Delete it, and it is trained again."
        ) from error
    return Judge(params, num_classes, accuracy, digest, path)


@functools.partial(jax.jit, static_argnums=1)
def _apply(params: Any, num_classes: int, images: jax.Array) -> Any:
    net = Classifier(num_classes, width=WIDTH)
    seen = cast(Features, net.apply(params, images))
    return seen.features, seen.logits


def _padded(images: np.ndarray) -> np.ndarray:
    """Fills a ragged batch up, so that nothing compiles again."""
    return np.pad(images, ((0, fitting.BATCH - len(images)), (0, 0), (0, 0), (0, 0)))
