"""The blocks of the U-Net, each plain and in forms that move less memory.

An activation is one array, or several parts whose channels belong together: a skip
connection beside what it meets. A block that takes parts gives what it would give for
the parts joined.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets import dropout, norm

Dtype = Any
# The name from which the key of a block's dropout is derived.
DROPOUT = "Dropout_0"
Activation = jax.Array | tuple[jax.Array, ...]


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
    """Group normalisation, with SiLU where it follows."""

    groups: int
    dtype: Dtype
    epsilon: float = OFFICIAL.epsilon
    form: str = "plain"
    """How it is computed: "plain", or in few passes by "xla" or "pallas"."""

    @nn.compact
    def __call__(self, x: Activation, silu: bool = False, **more: Any) -> Any:
        """Returns (x - mean) / sqrt(variance + epsilon) scale + bias, [B, H, W, C].

        Mean and variance are taken over the pixels and the channels of a group, in
        float32, over pixels first and then over channels. Parts stay apart. `more` is
        what comes before and after it: shift, mask and keep of `norm.plain`.
        """
        channels = _channels(x)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        given = (scale, bias, self.groups, self.epsilon, silu)
        made = _form(self.form)(_parts(x), *given, **more)
        out = tuple(y.astype(self.dtype) for y in made)
        return out if isinstance(x, tuple) else out[0]


class Conv(nn.Module):
    """3x3 convolution with "SAME" padding."""

    channels: int
    method: str
    dtype: Dtype
    strides: int = 1
    before: int = OFFICIAL.before
    """Rows and columns that stride 2 pads above and to the left."""
    kernel_init: nn.initializers.Initializer = unit

    def __call__(self, x: Activation) -> jax.Array:
        """Returns [B, H / strides, W / strides, channels] from x [B, H, W, C].

        Of parts it is the sum of what each gives with its slice of the kernel.
        """
        y, bias = self.apart(x)
        return y + bias[None, None, None]

    @nn.compact
    def apart(self, x: Activation) -> tuple[jax.Array, jax.Array]:
        """Returns the convolution without its bias, and the bias, [channels]."""
        shape = (3, 3, _channels(x), self.channels)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        x = tuple(part.astype(self.dtype) for part in _parts(x))
        kernel, bias = (a.astype(self.dtype) for a in (kernel, bias))
        out = [self._of_part(*pair) for pair in _with_slices(x, kernel)]
        return sum(out[1:], out[0]), bias

    def _of_part(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Sizes are even, so that "SAME" is one row and column all around, and with
        # stride 2 only below and to the right.
        before = 1 if self.strides == 1 else self.before
        if self.method == "matmul":
            return _patches(x, self.strides, before) @ kernel.reshape(-1, self.channels)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.strides, self.strides),
            ((before, 1), (before, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Weights(nn.Module):
    """The parameters of a linear layer whose product is taken elsewhere."""

    inputs: int
    channels: int
    dtype: Dtype

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel [inputs, channels] and bias [channels] as `nn.Dense` has."""
        kernel = self.param("kernel", unit, (self.inputs, self.channels))
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class DropoutMask(nn.Module):
    """Which values an `nn.Dropout` of the same name keeps."""

    rate: float

    @nn.compact
    def __call__(self, shape: tuple[int, ...]) -> jax.Array:
        """Returns True where a value is kept, of this shape."""
        return jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, shape)


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, and a shortcut."""

    channels: int
    groups: int
    dropout: float
    conv: str
    dtype: Dtype
    variant: str = "official"
    fuse: Sequence[str] = ()
    kernels: str = "xla"
    dropout_bits: str = "threefry"

    @nn.compact
    def __call__(self, x: Activation, time: jax.Array, train: bool) -> jax.Array:
        """Returns [B, H, W, channels] from x [B, H, W, C] and time [B, 4 width]."""
        h = group_norm(self, "norm1")(x, silu=True)
        conv1, norm2 = conv(self, self.channels, "conv1"), group_norm(self, "norm2")
        shift = dense(self, self.channels, "time")(nn.silu(time))
        if "norm" in self.fuse:
            h, bias = conv1.apart(h)
            # In the type of the statistics; nothing of it is rounded to that of h.
            wide = jnp.promote_types(h.dtype, jnp.float32)
            more: dict[str, Any] = {}
            more["shift"] = shift.astype(wide) + bias.astype(wide)[None]
            if train and self.dropout:
                mask, more["keep"] = self._mask(h.shape)
                more["mask"] = (mask,)
            h = norm2(h, silu=True, **more)
        else:
            h = conv1(h) + shift[:, None, None, :]
            h = self._dropped(norm2(h, silu=True), train)
        h = conv(self, self.channels, "conv2", near_zero)(h)
        return self._shortcut(x) + h

    def _dropped(self, h: jax.Array, train: bool) -> jax.Array:
        if self.dropout_bits == "threefry":
            return nn.Dropout(self.dropout, deterministic=not train, name=DROPOUT)(h)
        if train and self.dropout:
            return dropout.dropout(self.make_rng("dropout"), h, self.dropout)
        return h

    def _mask(self, shape: tuple[int, ...]) -> tuple[jax.Array, float]:
        """Returns what `_dropped` keeps, and the probability that a value is kept."""
        if self.dropout_bits == "threefry":
            return DropoutMask(self.dropout, name=DROPOUT)(shape), 1 - self.dropout
        return dropout.mask(self.make_rng("dropout"), shape, self.dropout)

    def _shortcut(self, x: Activation) -> jax.Array:
        if not isinstance(x, tuple):
            same = x.shape[-1] == self.channels
            return x if same else dense(self, self.channels, "shortcut")(x)
        made = Weights(_channels(x), self.channels, self.dtype, name="shortcut")
        kernel, bias = made()
        out = [part @ rows for part, rows in _with_slices(x, kernel)]
        return sum(out[1:], out[0]) + bias[None, None, None]


class Attention(nn.Module):
    """Self-attention over all pixels, with a residual connection."""

    groups: int
    dtype: Dtype
    variant: str = "official"
    fuse: Sequence[str] = ()
    kernels: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [B, H, W, C] from x of the same shape."""
        batch, height, width, channels = x.shape
        each = VARIANTS[self.variant].head_width or channels
        h = group_norm(self, "norm")(x)
        names = ("query", "key", "value")
        if "qkv" in self.fuse:
            made = [Weights(channels, channels, self.dtype, name=n)() for n in names]
            kernel, bias = (
                jnp.concatenate(a, axis=-1) for a in zip(*made, strict=True)
            )
            found = jnp.split(h @ kernel + bias[None, None, None], 3, axis=-1)
        else:
            found = [dense(self, channels, name)(h) for name in names]
        q, k, v = (a.reshape(batch, height * width, -1, each) for a in found)
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


def group_norm(parent: Any, name: str) -> GroupNorm:
    """Returns a normalisation with the parent's groups, type and form."""
    epsilon = VARIANTS[parent.variant].epsilon
    form = parent.kernels if "norm" in parent.fuse else "plain"
    return GroupNorm(parent.groups, parent.dtype, epsilon, form, name=name)


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


def _form(name: str) -> Callable[..., norm.Parts]:
    if name == "pallas":
        # Not before it is asked for: to import it takes time, and what it is made for
        # is to leave JAX one day.
        from diffusion_jax.nets import norm_pallas

        return norm_pallas.fused
    return {"plain": norm.plain, "xla": norm.fused}[name]


def _parts(x: Activation) -> tuple[jax.Array, ...]:
    return x if isinstance(x, tuple) else (x,)


def _channels(x: Activation) -> int:
    return sum(part.shape[-1] for part in _parts(x))


def _with_slices(
    x: Activation, kernel: jax.Array
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields each part with its rows of a kernel, [..., C, channels]."""
    begin = 0
    for part in _parts(x):
        end = begin + part.shape[-1]
        yield part, kernel[..., begin:end, :]
        begin = end


def _patches(x: jax.Array, strides: int, before: int) -> jax.Array:
    """Returns the 3x3 neighbourhood of every output pixel, [B, H', W', 9 C]."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    height, width = height + before - 1, width + before - 1
    rows, columns = (slice(0, n, strides) for n in (height, width))
    shifted = (x[:, i : i + height, j : j + width] for i in range(3) for j in range(3))
    return jnp.concatenate([y[:, rows, columns] for y in shifted], axis=-1)
