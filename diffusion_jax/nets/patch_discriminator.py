"""A discriminator of patches (Isola et al. 2017): how real each part of an image looks.

That of the autoencoders of latent diffusion, 64 channels wide and three levels deep: a
score sees 70 x 70 pixels. They normalise over the batch; GroupNorm in its place makes
scores of an image depend on that image alone, and needs no running statistics.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets.blocks import GroupNorm, unit

EPSILON = 1e-5
"""Of the normalisations, as PyTorch's."""


class PatchDiscriminator(nn.Module):
    """Convolutions that halve the resolution `levels` times, then two that do not."""

    channels: int = 64
    """Width of the first level; each level doubles it, up to eight times that."""
    levels: int = 3
    groups: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the scores of patches, [B, h, w, 1], of images [B, H, W, C].

        Raises:
          ValueError: images too small for a patch.

        >>> net, x = PatchDiscriminator(), jnp.zeros([1, 256, 256, 3])
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x)[0].shape
        (1, 30, 30, 1)
        """
        least = 3 * 2**self.levels
        if x.ndim != 4 or min(x.shape[1:3]) < least:
            raise ValueError(
                f"images must have shape [B, H, W, C] of at least {least} pixels a "
                f"side, for {self.levels} levels; got {x.shape}. Give the "
                "discriminator fewer levels."
            )
        for n in range(self.levels + 1):
            width = self.channels * min(2**n, 8)
            x = self._conv(x, width, 2 if n < self.levels else 1, bias=n == 0)
            if n > 0:
                groups = min(self.groups, width)
                x = GroupNorm(groups, EPSILON, name=f"norm{n}")((x,))
            x = nn.leaky_relu(x, 0.2)
        return self._conv(x, 1, 1, bias=True)

    def _conv(self, x: jax.Array, width: int, strides: int, *, bias: bool) -> jax.Array:
        conv = nn.Conv(
            width,
            (4, 4),
            strides=strides,
            padding=((1, 1), (1, 1)),
            use_bias=bias,
            kernel_init=unit,
        )
        return conv(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
