"""Trains a classifier to guide samples: `python -m experiments.train_noisy_classifier`.

On the labelled data of a run, noised by the run's own schedule. It goes to
<run>/classifier_noisy.safetensors. A fifth of the images is held out: the accuracy on
them, by noise level, is printed and kept in the file.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.typing import ArrayLike

from diffusion_jax import continuous, errors, gaussian, schedule, timesteps
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.process import entry
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import texts
from diffusion_jax.lab.schema.checks import require_positive, require_seed
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.wiring import build
from diffusion_jax.nets.noisy_classifier import NoisyClassifier
from diffusion_jax.storage import trees

BATCH, RATE, HELD_OUT = 128, 2e-3, 0.2
SHARES = (0.1, 0.25, 0.5, 0.75)
"""Of T: where the accuracy is measured."""


class Guide(NamedTuple):
    """A trained classifier of noisy images and where it came from."""

    params: Any
    num_classes: int
    accuracy: dict[int, float]
    """By time: on the images held out from its training, in [0, 1]."""
    sha256: str
    """Of its file."""
    path: Path


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train on."""

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = (
        None
    )
    """A run's folder or name; the newest in runs/ when not given."""
    steps: int = 1000
    """Updates to make."""
    seed: int = 0
    """Of the initial weights, the held-out images, the order of the others and the
    noise."""


def main(argv: Sequence[str]) -> int:
    """Trains the classifier anew; returns the exit code."""
    options = tyro.cli(
        Options,
        args=argv,
        prog="python -m experiments.train_noisy_classifier",
        description=__doc__,
    )
    require_positive(options, "steps")
    require_seed(options.seed)
    run = runs.find(options.run)
    config = runs.read_config(run)
    dataset = build.load_data(config)
    guide = train(config, run, dataset, steps=options.steps, seed=options.seed)
    print(f"guesses among {guide.num_classes} classes, on held-out images:")
    for t, accuracy in guide.accuracy.items():
        print(f"t = {t:4d}  accuracy {accuracy:.2%}")
    print(f"classifier: {guide.path}")
    return 0


def path_of(run: runs.Run) -> Path:
    """Returns where the classifier of a run goes."""
    return run.folder / "classifier_noisy.safetensors"


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
) -> Guide:
    """Returns a classifier trained on four fifths of the images, and writes it.

    It sees x_t with t evenly from 1..T, by equation (1) of `gaussian`, divided by
    sqrt(alpha^2 + sigma^2) where a schedule does not preserve variance, and is told t.

    Raises:
      ConfigError: the images have no labels, or do not fit in memory.
    """
    if dataset.labels is None or not isinstance(dataset.images, np.ndarray):
        raise ConfigError(
            "a classifier must be trained on labelled images that fit in memory; got "
            f"{config.data.source}. Guide by a run of other data, such as digits."
        )
    images, labels = np.asarray(dataset.images), np.asarray(dataset.labels)
    order = np.random.default_rng(seed).permutation(len(images))
    held, fitted = np.split(order, [int(HELD_OUT * len(images))])
    num_classes, levels = int(labels.max()) + 1, levels_of(config, run)
    net, key = NoisyClassifier(num_classes), jax.random.key(seed)
    shape = (1, *images.shape[1:])
    params = jax.jit(net.init)(key, jnp.zeros(shape), jnp.zeros(1))["params"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=1e-2)
    update = _make_update(levels, optimizer, flip=config.data.flip)
    memory = optimizer.init(params)
    size = min(BATCH, len(fitted))
    for step in range(steps):
        chosen = fitted[datasets.batch_indices(seed, step, len(fitted), size)]
        batch = images[chosen], labels[chosen]
        params, memory = update(params, memory, jax.random.fold_in(key, step), *batch)
    last = schedule.num_steps(levels)
    times = [max(1, round(share * last)) for share in SHARES]
    accuracy = {
        t: accuracy_at(params, levels, t, images[held], labels[held]) for t in times
    }
    return save(path_of(run), params, num_classes, accuracy)


def accuracy_at(
    params: Any,
    levels: schedule.Schedule,
    t: int,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int = 0,
) -> float:
    """Returns the share of uint8 images, noised to time t, whose label is guessed."""
    right, key = 0, jax.random.key(seed)
    for i in range(0, len(images), BATCH):
        part = images[i : i + BATCH]
        # The last batch is filled up, so that nothing compiles again.
        fill = [(0, BATCH - len(part))] + [(0, 0)] * 3
        noise_key = jax.random.fold_in(key, i)
        times = jnp.full(BATCH, t)
        guess = _guess(params, levels, noise_key, np.pad(part, fill), times)
        right += int((np.asarray(guess)[: len(part)] == labels[i : i + BATCH]).sum())
    return right / len(images)


def log_prob_of(
    params: Any, label: ArrayLike, levels: schedule.Schedule
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns log p(label | x_t), [B], as a function of x_t and t.

    For `guidance.classifier`.

    Args:
      params: of the classifier.
      label: one an example, [B], or one for all. Beyond the classes it raises where it
        is known, and gives nan where it is traced.
      levels: the schedule whose times t are: the chain of the run, or the same in
        real time.

    Raises:
      ConfigError: a label that is no class.
    """
    count = len(params["logits"]["bias"])
    if not isinstance(label, jax.core.Tracer):
        known = np.asarray(label)
        if known.size and not (known.min() >= 0 and known.max() < count):
            raise ConfigError(
                f"label must be in 0..{count - 1}; got values from {known.min()} to "
                f"{known.max()}. The classifier was trained on these classes alone."
            )

    def log_prob(x_t: jax.Array, t: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(_logits(params, levels, x_t, t))
        labels = jnp.broadcast_to(jnp.asarray(label), x_t.shape[:1])
        # A negative label would count from the end.
        labels = jnp.where(labels < 0, count, labels)
        chosen = jnp.take_along_axis(
            logp, labels[:, None], axis=1, mode="fill", fill_value=jnp.nan
        )
        return chosen[:, 0].astype(x_t.dtype)

    return log_prob


def save(
    path: Path, params: Any, num_classes: int, accuracy: dict[int, float]
) -> Guide:
    """Writes a classifier under a temporary name, then renames it."""
    meta = {"num_classes": str(num_classes), "accuracy": json.dumps(accuracy)}
    trees.write(path, params, meta)
    return load(path)


def load(path: Path) -> Guide:
    """Returns the classifier in a file.

    Raises:
      ConfigError: there is none, or the file is damaged or no classifier of ours.
    """
    try:
        params, meta, digest = trees.read(path)
        num_classes = int(meta["num_classes"])
        accuracy = {int(t): float(a) for t, a in texts.parse(meta["accuracy"]).items()}
        if params["logits"]["bias"].shape != (num_classes,):
            raise ValueError(f"{num_classes} classes, and other weights")
    except errors.DataError as error:
        again = f"python -m experiments.train_noisy_classifier {path.parent}"
        raise ConfigError(f"{error} Or train it: {again}.") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} must be a classifier that train_noisy_classifier wrote; got "
            f"{error}. Train it: python -m experiments.train_noisy_classifier "
            f"{path.parent}."
        ) from error
    return Guide(params, num_classes, accuracy, digest, path)


def check(guide: Guide, config: Config) -> None:
    """Raises DataError where a classifier is not of a run's images, or is damaged."""
    side, channels = config.data.image_size, config.data.channels
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    times = jax.ShapeDtypeStruct((1,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    net = NoisyClassifier(guide.num_classes)
    like = jax.eval_shape(net.init, key, images, times)["params"]
    trees.check(guide.params, like, guide.path)


def _make_update(
    levels: schedule.Schedule,
    optimizer: optax.GradientTransformation,
    *,
    flip: bool,
) -> Callable[..., Any]:
    """Returns one update, of a batch of uint8 images and their labels."""
    last = schedule.num_steps(levels)

    @jax.jit
    def update(
        params: Any, memory: Any, key: jax.Array, images: jax.Array, labels: jax.Array
    ) -> Any:
        t_key, eps_key, flip_key = jax.random.split(key, 3)
        t = timesteps.steps(jax.random.uniform(t_key, images.shape[:1]), last)
        x0 = images.astype(jnp.float32) / 127.5 - 1
        if flip:
            chosen = jax.random.bernoulli(flip_key, shape=images.shape[:1])
            x0 = jnp.where(chosen[:, None, None, None], x0[:, :, ::-1], x0)
        x_t = gaussian.q_sample(x0, gaussian.normal(eps_key, x0.shape), levels(t))

        def loss(params: Any) -> jax.Array:
            logits = _logits(params, levels, x_t, t)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        updates, memory = optimizer.update(jax.grad(loss)(params), memory, params)
        return optax.apply_updates(params, updates), memory

    return cast(Callable[..., Any], update)


def _logits(
    params: Any, levels: schedule.Schedule, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """Returns the scores of the classes at times of a schedule, [B, classes]."""
    level = levels(t).like(x_t)
    x = x_t * jax.lax.rsqrt(level.alpha**2 + level.sigma**2)
    net = NoisyClassifier(len(params["logits"]["bias"]))
    # The same of steps and of real time, and of any number of steps.
    seen = 1000 * t / continuous.last_time(levels)
    return cast(jax.Array, net.apply({"params": params}, x, seen))


@jax.jit
def _guess(
    params: Any,
    levels: schedule.Schedule,
    key: jax.Array,
    images: jax.Array,
    t: jax.Array,
) -> jax.Array:
    x0 = images.astype(jnp.float32) / 127.5 - 1
    x_t = gaussian.q_sample(x0, gaussian.normal(key, x0.shape), levels(t))
    return _logits(params, levels, x_t, t).argmax(axis=1)


if __name__ == "__main__":
    entry.guarded(main)
