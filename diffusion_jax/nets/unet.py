"""The U-Net of DDPM (App. B, Ho et al. 2020), to the constant of the official code.

35,746,307 parameters for CIFAR-10. What other implementations get wrong, and where it
is here:

  - GroupNorm has epsilon 1e-6 and 32 groups                        `GroupNorm`
  - the last layer of each block starts near zero, not at zero      `near_zero`
  - down-sampling pads one row below and one column to the right    `Downsample`
  - the time embedding is [sin, cos], its slowest frequency 1e-4    `embeddings`
  - skip connections carry what comes after the attention           `UNet`
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets.embeddings import fourier_features, time_embedding

Dtype = Any


class Variant(NamedTuple):
    """The constants in which U-Nets of the same shape differ."""

    epsilon: float
    """Of every GroupNorm."""
    frequency_shift: int
    """Of the time embedding: its slowest frequency is 1e-4 with 1."""
    cosine_first: bool
    """Whether the time embedding is [cos, sin] rather than [sin, cos]."""
    before: int
    """Rows above and columns to the left that stride 2 pads, beside the one below and
    to the right."""
    head_width: int | None
    """Channels of a head of attention; None for a single head."""


VARIANTS = {
    # The authors' code, and diffusers' conversions of what they released.
    "official": Variant(1e-6, 1, False, 0, None),
    # What diffusers' UNet2DModel has where its configuration says nothing.
    "diffusers": Variant(1e-5, 0, True, 1, 8),
}
OFFICIAL = VARIANTS["official"]


def scaled(scale: float = 1.0) -> nn.initializers.Initializer:
    """Returns the initialiser of every kernel: uniform, fan-average, of this scale."""
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


# The official code asks for scale 0 and gets 1e-10: small, but with a gradient in
# both directions from the first step.
near_zero = scaled(1e-10)
unit = scaled()


class GroupNorm(nn.Module):
    """Group normalisation."""

    groups: int
    dtype: Dtype
    epsilon: float = OFFICIAL.epsilon

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (x - mean) / sqrt(variance + epsilon) scale + bias, [B, H, W, C].

        Mean and variance are taken over the pixels and the channels of a group, in
        float32, over pixels first and then over channels. The variance is the mean of
        (x - mean)^2: the cheaper E[x^2] - mean^2 is wrong by 1e-3 where the mean is a
        hundred times the deviation.
        """
        batch, channels = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def over_group(per_channel: jax.Array) -> jax.Array:
            mean = per_channel.reshape(batch, self.groups, -1).mean(-1)
            return mean.repeat(channels // self.groups, axis=-1)

        x32 = x.astype(jnp.float32)
        mean = over_group(x32.mean((1, 2)))
        centred = x32 - mean[:, None, None]
        variance = over_group(jnp.square(centred).mean((1, 2)))
        a = jax.lax.rsqrt(variance + self.epsilon) * scale[None]
        y = centred * a[:, None, None] + bias[None, None, None]
        return y.astype(self.dtype)


class Conv(nn.Module):
    """3x3 convolution with "SAME" padding."""

    channels: int
    method: str
    dtype: Dtype
    strides: int = 1
    before: int = OFFICIAL.before
    """Rows and columns that stride 2 pads above and to the left."""
    kernel_init: nn.initializers.Initializer = unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [B, H / strides, W / strides, channels] from x [B, H, W, C]."""
        shape = (3, 3, x.shape[-1], self.channels)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        # Sizes are even, so that "SAME" is one row and column all around, and with
        # stride 2 only below and to the right.
        before = 1 if self.strides == 1 else self.before
        if self.method == "matmul":
            x = _patches(x, self.strides, before) @ kernel.reshape(-1, self.channels)
        else:
            x = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.strides, self.strides),
                ((before, 1), (before, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return x + bias[None, None, None]


def _patches(x: jax.Array, strides: int, before: int) -> jax.Array:
    """Returns the 3x3 neighbourhood of every output pixel, [B, H', W', 9 C]."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    height, width = height + before - 1, width + before - 1
    rows, columns = (slice(0, n, strides) for n in (height, width))
    shifted = (x[:, i : i + height, j : j + width] for i in range(3) for j in range(3))
    return jnp.concatenate([y[:, rows, columns] for y in shifted], axis=-1)


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, and a shortcut."""

    channels: int
    groups: int
    dropout: float
    conv: str
    dtype: Dtype
    variant: str = "official"

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, train: bool) -> jax.Array:
        """Returns [B, H, W, channels] from x [B, H, W, C] and time [B, 4 width]."""
        h = nn.silu(group_norm(self, "norm1")(x))
        h = conv(self, self.channels, "conv1")(h)
        shift = dense(self, self.channels, "time")(nn.silu(time))
        h = h + shift[:, None, None, :]
        h = nn.silu(group_norm(self, "norm2")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self, self.channels, "conv2", near_zero)(h)
        if x.shape[-1] != self.channels:
            x = dense(self, self.channels, "shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all pixels, with a residual connection."""

    groups: int
    dtype: Dtype
    variant: str = "official"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [B, H, W, C] from x of the same shape."""
        batch, height, width, channels = x.shape
        each = VARIANTS[self.variant].head_width or channels
        h = group_norm(self, "norm")(x)
        q, k, v = (
            dense(self, channels, name)(h).reshape(batch, height * width, -1, each)
            for name in ("query", "key", "value")
        )
        # The softmax is taken in float32 whatever the compute type.
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores * each**-0.5).astype(v.dtype)
        h = jnp.einsum("bhqk,bkhc->bqhc", weights, v).reshape(x.shape)
        return x + dense(self, channels, "out", near_zero)(h)


class Downsample(nn.Module):
    """Halves height and width by a convolution with stride 2."""

    conv: str
    dtype: Dtype
    variant: str = "official"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [B, H/2, W/2, C]; the official one pads only below and right."""
        return conv(self, x.shape[-1], "conv", strides=2)(x)


class Upsample(nn.Module):
    """Doubles height and width by repetition, followed by a convolution."""

    conv: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [B, 2H, 2W, C]."""
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return conv(self, x.shape[-1], "conv")(x)


class UNet(nn.Module):
    """The network: noisy images and times in, one value a pixel and channel out.

    The defaults are the CIFAR-10 network of the paper.
    """

    out_channels: int = 3
    """Channels of the output: those of the image, twice that with learned variance."""
    channels: int = 128
    """Width of the first level."""
    multipliers: Sequence[int] = (1, 2, 2, 2)
    """Width of each level in units of `channels`; each level halves the resolution."""
    blocks: int = 2
    """Residual blocks a level on the way down; the way up has one more."""
    attention: Sequence[int] = (16,)
    """Resolutions (pixels a side) with attention after each block; the middle always
    has one."""
    dropout: float = 0.1
    """Share of activations dropped in training."""
    groups: int = 32
    """Groups of every GroupNorm."""
    num_classes: int = 0
    """Rows of the label embedding; 0 for a network without labels. One that is trained
    with dropped labels has a row more than there are classes: the last is no label."""
    dtype: Dtype = jnp.float32
    """Type of the activations; parameters and output stay float32."""
    conv: str = "xla"
    """How a convolution is computed: "xla", or "matmul" (neighbourhoods times kernel,
    the same numbers): in a loop on CPU several times faster, for more memory."""
    remat: bool = False
    """Whether blocks are computed again in the backward pass instead of stored."""
    variant: str = "official"
    """Whose constants: "official", or "diffusers", of networks that were trained with
    the defaults of that library; see `VARIANTS`."""
    fourier: Sequence[int] = ()
    """The n of the features sin(2^n pi x) and cos(2^n pi x) that the first convolution
    sees beside x; see `fourier_features`."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        label: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns the network's output, [B, H, W, out_channels], in float32.

        Args:
          x: noisy images, [B, H, W, C]; H = W, a multiple of 2^(levels - 1).
          t: times as the network counts them, [B].
          label: classes in 0..num_classes-1, [B], where num_classes > 0. Another one
            raises when it is known, and gives nan when it is traced.
          train: whether dropout is on; needs a "dropout" key.

        Raises:
          ValueError: a shape or a label that does not fit the network.
        """
        check(self, x, t, label)
        if self.remat:
            block = nn.remat(ResBlock, static_argnums=(3,))
            attend = nn.remat(Attention)
        else:
            block, attend = ResBlock, Attention

        def residual(x: jax.Array, width: int, name: str) -> jax.Array:
            options = (width, self.groups, self.dropout, self.conv, self.dtype)
            return block(*options, self.variant, name=name)(x, time, train)

        def attention(x: jax.Array, name: str) -> jax.Array:
            return attend(self.groups, self.dtype, self.variant, name=name)(x)

        def level(x: jax.Array, width: int, name: str) -> jax.Array:
            x = residual(x, width, name)
            if x.shape[1] in self.attention:
                x = attention(x, f"{name}_attention")
            return x

        _, shift, cosine_first, *_ = VARIANTS[self.variant]
        time = time_embedding(t, self.channels, shift=shift, cosine_first=cosine_first)
        time = dense(self, 4 * self.channels, "time1")(time)
        time = dense(self, 4 * self.channels, "time2")(nn.silu(time))
        if self.num_classes:
            assert label is not None  # held by check
            rows = nn.Embed(
                self.num_classes, 4 * self.channels, dtype=self.dtype, name="label"
            )(label)
            known = (label >= 0) & (label < self.num_classes)
            time = time + jnp.where(known[:, None], rows, jnp.nan)

        widths = [self.channels * multiplier for multiplier in self.multipliers]
        if self.fourier:
            features = fourier_features(x, self.fourier)
            x = jnp.concatenate([x.astype(jnp.float32), features], axis=-1)
        h = conv(self, self.channels, "conv_in")(x)
        skips = [h]
        for i, width in enumerate(widths):
            for j in range(self.blocks):
                h = level(h, width, f"down{i}_block{j}")
                skips.append(h)
            if i < len(widths) - 1:
                name = f"down{i}_downsample"
                h = Downsample(self.conv, self.dtype, self.variant, name=name)(h)
                skips.append(h)

        h = residual(h, widths[-1], "middle_block0")
        h = attention(h, "middle_attention")
        h = residual(h, widths[-1], "middle_block1")

        for i, width in reversed(list(enumerate(widths))):
            for j in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = level(h, width, f"up{i}_block{j}")
            if i > 0:
                h = Upsample(self.conv, self.dtype, name=f"up{i}_upsample")(h)

        h = nn.silu(group_norm(self, "norm_out")(h))
        out = Conv(
            self.out_channels,
            self.conv,
            jnp.float32,
            kernel_init=near_zero,
            name="conv_out",
        )
        return out(h)


def group_norm(parent: Any, name: str) -> GroupNorm:
    """Returns a normalisation with the parent's groups and type."""
    epsilon = VARIANTS[parent.variant].epsilon
    return GroupNorm(parent.groups, parent.dtype, epsilon, name=name)


def conv(
    parent: Any,
    channels: int,
    name: str,
    init: nn.initializers.Initializer = unit,
    strides: int = 1,
) -> Conv:
    """Returns a 3x3 convolution with the parent's method and type."""
    before = 0 if strides == 1 else VARIANTS[parent.variant].before
    made = (channels, parent.conv, parent.dtype, strides, before, init)
    return Conv(*made, name=name)


def dense(
    parent: Any,
    channels: int,
    name: str,
    init: nn.initializers.Initializer = unit,
) -> nn.Dense:
    """Returns a linear layer over channels in the parent's type."""
    return nn.Dense(channels, kernel_init=init, dtype=parent.dtype, name=name)


def check(net: UNet, x: jax.Array, t: jax.Array, label: jax.Array | None) -> None:
    """Raises ValueError where an input does not fit the network."""
    factor = 2 ** (len(net.multipliers) - 1)
    if x.ndim != 4 or x.shape[1] != x.shape[2] or x.shape[1] % factor:
        raise ValueError(
            f"x must have shape [B, H, W, C] with H = W a multiple of {factor} (there "
            f"are {len(net.multipliers)} levels); got {x.shape}. Resize or pad the "
            "images, or give the network fewer levels."
        )
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"t must have shape [B], one time an image; got {t.shape} for images "
            f"{x.shape}. Broadcast it: jnp.full(len(x), t)."
        )
    for width in {net.channels * multiplier for multiplier in net.multipliers}:
        if width % net.groups:
            raise ValueError(
                f"every level's width must be a multiple of groups={net.groups}; got "
                f"{width}. Change channels, multipliers or groups."
            )
    if net.conv not in ("xla", "matmul"):
        raise ValueError(
            f"conv must be 'xla' or 'matmul'; got {net.conv!r}. Both compute the same."
        )
    if net.variant not in VARIANTS:
        raise ValueError(
            f"variant must be one of {', '.join(VARIANTS)}; got {net.variant!r}. The "
            "paper's is official."
        )
    each = VARIANTS[net.variant].head_width
    if each and any(net.channels * m % each for m in net.multipliers):
        raise ValueError(
            f"every level's width must be a multiple of {each}, the channels of a head "
            f"of attention with variant={net.variant!r}; got channels={net.channels}. "
            "Change channels or multipliers."
        )
    if net.channels < 4:
        raise ValueError(
            f"channels must be at least 4; got {net.channels}. The paper uses 128."
        )
    if (label is not None) != (net.num_classes > 0):
        raise ValueError(
            "label must be given if and only if num_classes is above 0; got "
            f"num_classes={net.num_classes} and {'no' if label is None else 'a'} "
            "label. Pass labels to class-conditional networks only."
        )
    if label is not None:
        _check_label(net.num_classes, x, label)


def _check_label(count: int, x: jax.Array, label: jax.Array) -> None:
    if label.shape != x.shape[:1] or not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(
            f"label must be whole numbers of shape [B], one an image; got "
            f"{label.dtype} {label.shape} for images {x.shape}. Broadcast one label: "
            "jnp.full(len(x), label)."
        )
    if isinstance(label, jax.core.Tracer) or not label.size:
        return
    # As NumPy: inside a trace JAX would trace the check too.
    values = np.asarray(label)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= count:
        raise ValueError(
            f"label must be in 0..{count - 1}; got values from {low} to {high}. Give "
            "the network num_classes rows: one a class, and one for no label if it is "
            "to be trained with dropped labels."
        )
