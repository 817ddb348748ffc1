"""What judges an autoencoder while it trains: a discriminator, and a classifier.

The first learns as the autoencoder does, to tell images from what is decoded (Esser et
al. 2021). The second is that of the data (`train_classifier`), which does not change;
it stands where others have a network of photographs (LPIPS).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion_jax import autoencoding
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.nets.classifier import Classifier
from diffusion_jax.nets.patch_discriminator import PatchDiscriminator

RULE = optax.scale_by_adam(b1=0.5, b2=0.9)
"""Of the discriminator, as the authors'."""


class Memory(NamedTuple):
    """What an autoencoder is judged by; () for a judge that there is not."""

    step: jax.Array
    """Steps that were made and not skipped, int32."""
    rival: Any
    """The discriminator's parameters."""
    moments: Any
    """Of its Adam."""
    judge: Any
    """The classifier's parameters, but for its last layers."""


def compete(config: Config) -> bool:
    """Returns whether a discriminator learns beside an autoencoder."""
    return latents.is_autoencoder(config) and config.autoencoder.discriminator > 0


def compare(config: Config) -> bool:
    """Returns whether a classifier compares images with what is decoded."""
    return latents.is_autoencoder(config) and config.autoencoder.perceptual > 0


def memory_of(config: Config, key: jax.Array) -> Memory:
    """Returns the first memory, with fresh networks."""
    rival: Any = ()
    judge: Any = ()
    moments: Any = ()
    image = jnp.zeros((1, *config.data.shape))
    if compete(config):
        rival = make_discriminator(config).init(key, image)["params"]
        moments = RULE.init(rival)
    if compare(config):
        judge = Classifier(1).init(key, image, levels=True)["params"]
    return Memory(jnp.zeros((), jnp.int32), rival, moments, judge)


def make_discriminator(config: Config) -> PatchDiscriminator:
    """Returns it half as wide as the autoencoder, three levels deep if that fits."""
    side = min(config.data.shape[:2])
    levels = min(3, int(math.log2(side / 3)))
    return PatchDiscriminator(config.autoencoder.channels // 2, levels)


def scores(config: Config, rival: Any, x: jax.Array) -> jax.Array:
    """Returns how real the discriminator finds the patches of images."""
    found: Any = make_discriminator(config).apply({"params": rival}, x)
    return jnp.asarray(found)


def perceptual(judge: Any, x: jax.Array, again: jax.Array) -> jax.Array:
    """Returns how far decoded images are off in the classifier's features, [B]."""

    def seen(y: jax.Array) -> Any:
        return Classifier(1).apply({"params": judge}, y, levels=True)

    return autoencoding.perceptual(seen(x), seen(again))


def adversarial(
    config: Config,
    memory: Memory,
    again: jax.Array,
    kernel: jax.Array,
    redone: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Returns what the discriminator adds to the loss of each image, [B].

    Its weight is that of the whole batch, on however many devices: both gradients are
    of means. That of the error is one of a sum over an image, as the authors'.

    Args:
      config: of the run.
      memory: of the step.
      again: decoded images.
      kernel: the decoder's last.
      redone: decoded images, and the loss of the rest for each, by that kernel.
    """
    own, size = config.autoencoder, math.prod(again.shape[1:])
    rival = jax.lax.stop_gradient(memory.rival)

    def parts(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        image, rest = redone(kernel)
        against = autoencoding.adversarial(scores(config, rival, image))
        return size * rest.mean(), against.mean()

    slopes = jax.jacrev(parts)(jax.lax.stop_gradient(kernel))
    weight = autoencoding.adaptive_weight(*slopes, scale=own.discriminator)
    begun = memory.step >= own.discriminator_start
    against = autoencoding.adversarial(scores(config, rival, again))
    return jnp.where(begun, weight / size, 0.0) * against


def remembered(
    config: Config, rate: optax.Schedule, memory: Memory, seen: dict[str, jax.Array]
) -> Memory:
    """Returns the memory after a step, in which the discriminator has learned.

    Args:
      config: of the run.
      rate: the learning rate, which it shares.
      memory: of the step.
      seen: what `autoencoders.make_loss` has seen: images, and what was decoded.
    """

    def hinge(rival: Any) -> jax.Array:
        found = (scores(config, rival, seen[name]) for name in ("images", "decoded"))
        return autoencoding.hinge(*found).mean()

    updates, moments = RULE.update(jax.grad(hinge)(memory.rival), memory.moments)
    updates = optax.tree.scale(-rate(memory.step), updates)
    new = memory._replace(
        rival=optax.apply_updates(memory.rival, updates), moments=moments
    )
    begun = memory.step >= config.autoencoder.discriminator_start
    new = jax.tree.map(lambda a, b: jnp.where(begun, a, b), new, memory)
    return new._replace(step=memory.step + 1)
