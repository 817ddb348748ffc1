"""The classifier of noisy images that guides samples: its file, its log p(y | x_t)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax import continuous, schedule
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import fitting
from diffusion_jax.lab.wiring.fitting import Fitted
from diffusion_jax.nets.noisy_classifier import NoisyClassifier
from diffusion_jax.storage import trees


def path_of(folder: Path) -> Path:
    """Returns the file of the classifier in a run's folder."""
    return folder / "classifier_noisy.safetensors"


def log_prob_of(
    params: Any, label: ArrayLike, levels: schedule.Schedule
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns log p(label | x_t), [B], as a function of x_t and t.

    Args:
      params: of the classifier.
      label: one an example, [B], or one for all; under jit one that is no class gives
        nan.
      levels: the schedule whose times t are, discrete or continuous.

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
        logp = jax.nn.log_softmax(logits_of(params, levels, x_t, t))
        labels = jnp.broadcast_to(jnp.asarray(label), x_t.shape[:1])
        # A negative label would count from the end.
        labels = jnp.where(labels < 0, count, labels)
        chosen = jnp.take_along_axis(
            logp, labels[:, None], axis=1, mode="fill", fill_value=jnp.nan
        )
        return chosen[:, 0].astype(x_t.dtype)

    return log_prob


def load(path: Path) -> Fitted:
    """Returns the classifier in a file, with its accuracy by time.

    Raises:
      ConfigError: there is none, or the file is damaged or no classifier of ours.
    """
    command = "train_noisy_classifier"
    of = str(path.parent).removesuffix(".drawn")  # beside a network in a file
    again = f"train it: python -m experiments.{command} {of}."
    found = fitting.load(path, _check, command=command, again=again)
    return found._replace(accuracy={int(t): a for t, a in found.accuracy.items()})


def _check(found: Fitted) -> None:
    """Raises an error where the weights and the metadata do not fit together."""
    for t, accuracy in found.accuracy.items():
        int(t), float(accuracy)
    if found.params["logits"]["bias"].shape != (found.num_classes,):
        raise ValueError(f"{found.num_classes} classes, and other weights")


def check(guide: Fitted, config: Config) -> None:
    """Raises DataError where a classifier does not fit a run's images."""
    images = jax.ShapeDtypeStruct((1, *config.data.shape), jnp.float32)
    times = jax.ShapeDtypeStruct((1,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    net = NoisyClassifier(guide.num_classes)
    like = jax.eval_shape(net.init, key, images, times)["params"]
    trees.check(guide.params, like, guide.path)


def logits_of(
    params: Any, levels: schedule.Schedule, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """Returns the logits of noisy images at times of a schedule, [B, classes]."""
    level = levels(t).like(x_t)
    x = x_t * jax.lax.rsqrt(level.alpha**2 + level.sigma**2)
    net = NoisyClassifier(len(params["logits"]["bias"]))
    # Times of all schedules are scaled to 0..1000.
    seen = 1000 * t / continuous.last_time(levels)
    return cast(jax.Array, net.apply({"params": params}, x, seen))
