"""A classifier of noisy images that is told their times.

Its gradient with respect to the image guides samples towards a class, so every layer is
smooth.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets.blocks import GroupNorm
from diffusion_jax.nets.embeddings import time_embedding

GROUPS = 8


class NoisyClassifier(nn.Module):
    """Convolutions that halve the resolution until it is 4x4 or less.

    Its parameters fit one image size, since the last activations are flattened.
    """

    num_classes: int
    """Number of classes."""
    channels: int = 32
    """Width of the first level, a multiple of 8; each level doubles it, up to 128."""
    width: int = 128
    """Units of the hidden layer, and of the time embedding."""

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Returns the scores of the classes, [B, num_classes], in float32.

        Args:
          x: noisy images, float [B, H, W, C].
          t: their times, [B], from 0 to about 1000.

        Raises:
          ValueError: images or times of another shape or type.

        >>> net, key = NoisyClassifier(10), jax.random.key(0)
        >>> x, t = jnp.zeros([2, 8, 8, 1]), jnp.zeros(2)
        >>> jax.eval_shape(net.init_with_output, key, x, t)[0].shape
        (2, 10)
        """
        _check(self, x, t)
        time = dense(self.width, "time1")(time_embedding(t, self.width))
        time = nn.silu(dense(self.width, "time2")(nn.silu(time)))
        channels, level = self.channels, 0
        h = conv(channels, "conv_in")(x.astype(jnp.float32))
        while True:
            h = self._block(h, time, channels, f"level{level}")
            if max(h.shape[1:3]) <= 4:
                break
            channels, level = min(2 * channels, max(128, self.channels)), level + 1
            h = conv(channels, f"down{level}", strides=2)(h)
        h = GroupNorm(GROUPS, name="norm_out")((h,), silu=True)
        h = nn.silu(dense(self.width, "hidden")(h.reshape(len(h), -1)))
        return dense(self.num_classes, "logits")(h)

    def _block(
        self, x: jax.Array, time: jax.Array, channels: int, name: str
    ) -> jax.Array:
        """Returns x plus two convolutions of it with the time in between."""
        h = GroupNorm(GROUPS, name=f"{name}_norm1")((x,), silu=True)
        h = conv(channels, f"{name}_conv1")(h)
        shift = dense(channels, f"{name}_time")(time)
        h = GroupNorm(GROUPS, name=f"{name}_norm2")((h,))
        h = nn.silu(h + shift[:, None, None, :])
        return x + conv(channels, f"{name}_conv2")(h)


def conv(channels: int, name: str, *, strides: int = 1) -> nn.Conv:
    """Returns a 3x3 convolution in full float32."""
    return nn.Conv(channels, (3, 3), strides, precision="highest", name=name)


def dense(width: int, name: str) -> nn.Dense:
    """Returns a linear layer in full float32."""
    return nn.Dense(width, precision="highest", name=name)


def _check(net: NoisyClassifier, x: jax.Array, t: jax.Array) -> None:
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be floating-point of shape [B, H, W, C]; got {x.dtype} {x.shape}. "
            "Scale images to [-1, 1]."
        )
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"t must have shape [B], one time an image; got {t.shape} for images "
            f"{x.shape}. Broadcast it: jnp.full(len(x), t)."
        )
    if net.channels % GROUPS:
        raise ValueError(
            f"channels must be a multiple of {GROUPS}, the groups of a normalisation; "
            f"got {net.channels}. The default is 32."
        )
