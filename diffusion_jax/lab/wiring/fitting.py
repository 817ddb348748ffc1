"""How a small classifier is trained on four fifths of labelled images."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError

BATCH, RATE, HELD_OUT = 128, 2e-3, 0.2

Loss = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
"""Of parameters, a key, images and labels."""


def labelled(dataset: datasets.Dataset, hint: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels.

    Args:
      dataset: the images, [N, H, W, C], and their labels, [N].
      hint: what to do where there are none.

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
    """Returns the parameters after so many updates, and which images were held out.

    Args:
      params: to begin with.
      loss: of a batch.
      images: uint8, [N, H, W, C].
      labels: [N].
      steps: updates, at a learning rate that falls to 0 as a cosine.
      seed: of the held-out fifth, of the order of the others, and of the keys.
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
    for step in range(steps):
        chosen = fitted[datasets.batch_indices(seed, step, len(fitted), size)]
        batch = jax.random.fold_in(key, step), images[chosen], labels[chosen]
        params, memory = update(params, memory, *batch)
    return params, held
