"""A small classifier of small images: labels for samples, and features to compare.

For images that the Inception network was not trained on, and for machines without its
weights. A distance in its features is not FID and is never called so.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Features(NamedTuple):
    """The outputs of the network for each image."""

    features: jax.Array
    """Activations before the last layer, [B, width]."""
    logits: jax.Array
    """Scores of the classes, [B, num_classes]."""


class Classifier(nn.Module):
    """Convolutions that halve the resolution until it is 4x4 or less."""

    num_classes: int
    """Number of classes."""
    channels: int = 32
    """Width of the first level; each level doubles it, up to 128."""
    width: int = 64
    """Number of features."""

    @nn.compact
    def __call__(self, images: jax.Array, *, levels: bool = False) -> Any:
        """Returns the `Features` of images, uint8 [B, H, W, C].

        With `levels` the activations at each resolution in their place, a list, of
        images in [-1, 1]: of those an error has a gradient.

        Raises:
          ValueError: images of another shape or type.

        >>> net, images = Classifier(10), jnp.zeros([2, 8, 8, 1], jnp.uint8)
        >>> seen, _ = net.init_with_output(jax.random.key(0), images)
        >>> print(seen.features.shape, seen.logits.shape)
        (2, 64) (2, 10)
        """
        if not levels and (images.ndim != 4 or images.dtype != jnp.uint8):
            raise ValueError(
                f"images must be uint8 of shape [B, H, W, C]; got {images.dtype} "
                f"{images.shape}. Round samples to 0..255 first."
            )
        x = images if levels else images.astype(jnp.float32) / 127.5 - 1
        channels = self.channels
        x = nn.relu(nn.Conv(channels, (3, 3), precision="highest")(x))
        seen = [x]
        while max(x.shape[1:3]) > 4:
            channels = min(2 * channels, 128)
            conv = nn.Conv(channels, (3, 3), strides=2, precision="highest")
            x = nn.relu(conv(x))
            x = nn.LayerNorm()(x)
            seen.append(x)
        if levels:
            return seen
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.width, precision="highest")(x))
        return Features(x, nn.Dense(self.num_classes, precision="highest")(x))
