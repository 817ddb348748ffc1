"""Trains a classifier to guide samples: `python -m experiments.train_noisy_classifier`.

On the labelled data of a run, noised by the run's own schedule. It goes to
<run>/classifier_noisy.safetensors. A fifth of the images is held out: the accuracy on
them, by noise level, is printed and kept in the file.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import gaussian, schedule, timesteps
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import entry
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import choices, latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import Count, Seed
from diffusion_jax.lab.trained import opening, weights
from diffusion_jax.lab.wiring import build, fitting, guides
from diffusion_jax.nets.noisy_classifier import NoisyClassifier

SHARES = (0.1, 0.25, 0.5, 0.75)
"""Of T: where the accuracy is measured."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train on."""

    run: choices.Named = None
    steps: Count = 1000
    """Updates to make."""
    seed: Seed = 0
    """Of the initial weights, the held-out images, the order of the others and the
    noise."""


def main(argv: Sequence[str]) -> int:
    """Trains the classifier anew; returns the exit code."""
    options = entry.parse(Options, argv, "train_noisy_classifier", __doc__)
    run, config = opening.opened(options.run, options)
    if latents.is_latent(config):
        raise ConfigError(
            f"RUN must be of diffusion of images; got {run.folder}, of latents, which "
            "no classifier sees. Name another, or train with labels: --net.classes 10."
        )
    dataset = build.load_data(config, labelled=True)
    made = train(config, run, dataset, steps=options.steps, seed=options.seed)
    print(f"guesses among {made.num_classes} classes, on held-out images:")
    for t, accuracy in made.accuracy.items():
        print(f"t = {t:4d}  accuracy {accuracy:.2%}")
    print(f"classifier: {made.path}")
    return 0


def levels_of(config: Config, run: runs.Run) -> schedule.Schedule:
    """Returns the chain whose noise is seen: discrete, t in {0, ..., T}."""
    params = None
    if config.diffusion.schedule == "learned":
        params = weights.load(config, run, weights.Weights())[0]
    return build.chain_schedule(config, params)


def train(
    config: Config,
    run: runs.Run,
    dataset: datasets.Dataset,
    *,
    steps: int = 1000,
    seed: int = 0,
) -> fitting.Fitted:
    """Returns a classifier trained on four fifths of the images, and writes it.

    It sees x_t with t evenly from 1..T, by equation (1) of `gaussian`, divided by
    sqrt(alpha^2 + sigma^2) where a schedule does not preserve variance, and is told t.

    Raises:
      ConfigError: the images have no labels, or do not fit in memory.
    """
    hint = "Guide by a run of other data, such as digits."
    images, labels = fitting.labelled(dataset, hint)
    num_classes, levels = int(labels.max()) + 1, levels_of(config, run)
    net, key = NoisyClassifier(num_classes), jax.random.key(seed)
    shape = (1, *images.shape[1:])
    params = jax.jit(net.init)(key, jnp.zeros(shape), jnp.zeros(1))["params"]
    loss = make_loss(levels, flip=config.data.flip)
    params, held = fitting.fit(params, loss, images, labels, steps=steps, seed=seed)
    last = schedule.num_steps(levels)
    times = [max(1, round(share * last)) for share in SHARES]
    accuracy = {
        t: accuracy_at(params, levels, t, images[held], labels[held]) for t in times
    }
    path = guides.path_of(run.folder)
    fitting.save(path, params, num_classes, accuracy)
    return guides.load(path)


def accuracy_at(
    params: Any,
    levels: schedule.Schedule,
    t: int,
    images: np.ndarray,
    labels: np.ndarray,
) -> float:
    """Returns the share of uint8 images, noised to time t, whose label is guessed."""
    key, times = jax.random.key(0), jnp.full(fitting.BATCH, t)

    def scores(first: int, batch: np.ndarray) -> jax.Array:
        return _scores(params, levels, jax.random.fold_in(key, first), batch, times)

    guesses = fitting.by_batches(scores, images).argmax(axis=1)
    return float((guesses == labels).mean())


def make_loss(levels: schedule.Schedule, *, flip: bool) -> fitting.Loss:
    """Returns the loss of uint8 images at random times, and their labels."""
    last = schedule.num_steps(levels)

    def loss(params: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        t_key, eps_key, flip_key = jax.random.split(key, 3)
        t = timesteps.steps(jax.random.uniform(t_key, x.shape[:1]), last)
        if flip:
            chosen = jax.random.bernoulli(flip_key, shape=x.shape[:1])
            x = jnp.where(chosen[:, None, None, None], x[:, :, ::-1], x)
        logits = _scores(params, levels, eps_key, x, t)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


@jax.jit
def _scores(
    params: Any, levels: schedule.Schedule, key: jax.Array, images: Any, t: jax.Array
) -> jax.Array:
    """Returns the scores of the classes of uint8 images, once they are noised."""
    x0 = images.astype(jnp.float32) / 127.5 - 1
    x_t = gaussian.q_sample(x0, gaussian.normal(key, x0.shape), levels(t))
    return guides.logits_of(params, levels, x_t, t)


if __name__ == "__main__":
    entry.guarded(main)
