"""The classifier whose features stand in for Inception: trained, stored, loaded."""

import functools
import re
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema.config import MOST_CLASSES, Config
from diffusion_jax.lab.wiring import fitting
from diffusion_jax.nets.classifier import Classifier, Features
from diffusion_jax.storage import trees

WIDTH = 64
INSTEAD = (
    "Measure by Inception instead: experiments.eval_fid with --weights FILE or "
    "--download."
)


def path_of(config: Config) -> Path:
    """Returns the file of the classifier of a configuration's data."""
    name = "".join(c if c.isalnum() else "_" for c in config.data.source)
    shape = "x".join(map(str, config.data.shape))
    # One that has seen images held out from a network would judge it with more.
    held = f"_without_{config.data.hold_out:g}" if config.data.hold_out else ""
    return Path(config.output) / ".classifiers" / f"{name}{held}_{shape}.safetensors"


def find(
    config: Config, dataset: datasets.Dataset, hint: str = INSTEAD
) -> fitting.Fitted:
    """Returns the classifier of a configuration's data, trained if there is none.

    Args:
      config: of the run.
      dataset: its training images.
      hint: what to do where none can be trained.

    Raises:
      ConfigError: as `train`; or several hosts would have to.
    """
    path = path_of(config)
    if path.exists():
        return load(path)
    if jax.process_count() > 1:
        raise ConfigError(
            f"the classifier must be trained before several hosts use it; got none at "
            f"{path}. Train it on one: python -m experiments.train_classifier, or "
            "evaluate once with --hosts 1."
        )
    return train(config, dataset, hint=hint)


def train(
    config: Config,
    dataset: datasets.Dataset,
    *,
    steps: int = 1500,
    seed: int = 0,
    hint: str = INSTEAD,
) -> fitting.Fitted:
    """Trains a classifier on four fifths of the images, writes it, and returns it.

    Raises:
      ConfigError: the images have no labels, or do not fit in memory.
    """
    images, labels = fitting.labelled(dataset, hint)
    path = path_of(config)
    print(f"training a classifier of {config.data.source}: {path}")
    num_classes = int(labels.max()) + 1
    net = Classifier(num_classes, width=WIDTH)

    def loss(params: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = cast(Features, net.apply(params, x)).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    params = net.init(jax.random.key(seed), images[:1])
    params, held = fitting.fit(params, loss, images, labels, steps=steps, seed=seed)
    guesses = features_of(params, num_classes, images[held])[1].argmax(axis=1)
    accuracy = float((guesses == labels[held]).mean())
    fitting.save(path, params, num_classes, accuracy)
    return load(path)


def features_of(params: Any, num_classes: int, images: np.ndarray) -> Any:
    """Returns features [N, D] and logits [N, classes] of uint8 images, on the host."""

    def seen(_: int, batch: np.ndarray) -> Any:
        return _apply(params, num_classes, batch)

    return fitting.by_batches(seen, images)


def load(path: Path) -> fitting.Fitted:
    """Returns the classifier in a file, named as `path_of` names it.

    Raises:
      ConfigError: the file is damaged or no classifier of ours.
    """
    again = "delete it, and it is trained again."
    return fitting.load(path, _check, command="train_classifier", again=again)


def _check(found: fitting.Fitted) -> None:
    """Raises ValueError where the content does not fit the name of the file."""
    if not (0 < found.num_classes <= MOST_CLASSES and 0 <= found.accuracy <= 1):
        said = f"{found.num_classes} classes and an accuracy of {found.accuracy}"
        raise ValueError(said)
    shape = re.search(r"_(\d+)x(\d+)x(\d+)$", found.path.stem)
    if shape is None:
        raise ValueError("a name that does not end in the shape of its images")
    images = jax.ShapeDtypeStruct((1, *map(int, shape.groups())), jnp.uint8)
    key = jax.eval_shape(lambda: jax.random.key(0))
    like = jax.eval_shape(Classifier(found.num_classes, width=WIDTH).init, key, images)
    trees.check(found.params, like, found.path)


@functools.partial(jax.jit, static_argnums=1)
def _apply(params: Any, num_classes: int, images: jax.Array) -> Any:
    net = Classifier(num_classes, width=WIDTH)
    seen = cast(Features, net.apply(params, images))
    return seen.features, seen.logits
