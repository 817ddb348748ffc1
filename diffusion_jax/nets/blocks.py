"""The blocks of the U-Net, in the forms that move least memory.

Between blocks an activation is several parts that are never joined, a skip connection
beside what it meets, and a shift that is never written, the sum of the biases since the
parts were: the normalisation that follows takes both. Products and convolutions are
taken without their biases, which so cost no pass, nor do their gradients.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets import dropout, fresh, norm
from diffusion_jax.nets.convolutions import (
    by_taps,
    convolved,
    doubled,
    patches,
    repeated,
)
from diffusion_jax.nets.products import attend, product

Dtype = Any
FEW = 4
"""Channels at most of which a GPU convolves faster by a product of neighbourhoods."""


class Activation(NamedTuple):
    """An activation of C channels, [B, H, W, C], before it is put together."""

    parts: tuple[jax.Array, ...]
    """[B, H, W, C_i] each; C is the sum of their channels."""
    shift: jax.Array
    """What is still to be added to each channel, [C], in `wide` of the parts."""

    def whole(self) -> jax.Array:
        """Returns the activation as one array."""
        x = jnp.concatenate(self.parts, axis=-1)
        return (x + self.shift[None, None, None]).astype(x.dtype)

    def settled(self) -> "Activation":
        """Returns the same activation as one part, with nothing to be added."""
        return Activation((self.whole(),), jnp.zeros_like(self.shift))


def start(x: jax.Array, bias: jax.Array) -> Activation:
    """Returns what a convolution gives as an activation."""
    return Activation((x,), bias.astype(wide(x.dtype)))


def wide(dtype: Dtype) -> jnp.dtype:
    """Returns the type of what is summed and of vectors: float32, float64 of float64.

    >>> print(wide(jnp.bfloat16))
    float32
    """
    return jnp.promote_types(dtype, jnp.float32)


def beside(x: Activation, other: Activation) -> Activation:
    """Returns the channels of both, one after the other."""
    shift = jnp.concatenate([x.shift, other.shift])
    return Activation(x.parts + other.parts, shift)


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


# The official code asks for scale 0 and gets 1e-10: small, but with a gradient in
# both directions from the first step.
near_zero = fresh.kernel(1e-10)
unit = fresh.kernel()
as_embedding = fresh.Noted(nn.linear.default_embed_init)


class GroupNorm(nn.Module):
    """The parameters of a group normalisation, and the normalisation."""

    groups: int
    epsilon: float = OFFICIAL.epsilon

    @nn.compact
    def __call__(self, parts: norm.Parts, **options: Any) -> jax.Array:
        """Returns `norm.group_norm` of the parts, [B, H, W, C], with its options."""
        channels = sum(part.shape[-1] for part in parts)
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        return norm.group_norm(parts, scale, bias, self.groups, self.epsilon, **options)


class Linear(nn.Module):
    """The parameters of a linear layer; its product is taken by who asks for them."""

    channels: int
    kernel_init: nn.initializers.Initializer = unit

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        """Returns kernel [inputs, channels] and bias [channels] as `nn.Dense` has."""
        kernel = self.param("kernel", self.kernel_init, (inputs, self.channels))
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        return kernel, bias


class Conv(nn.Module):
    """3x3 convolution with "SAME" padding, apart from its bias."""

    channels: int
    method: str
    dtype: Dtype
    strides: int = 1
    before: int = OFFICIAL.before
    """Rows and columns that stride 2 pads above and to the left."""
    kernel_init: nn.initializers.Initializer = unit

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the convolution of x [B, H, W, C], and the bias that is to be added.

        They are [B, H / strides, W / strides, channels], and [channels] in float32.
        """
        shape = (3, 3, x.shape[-1], self.channels)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        before = 1 if self.strides == 1 else self.before
        if self.method == "matmul":
            rows = kernel.reshape(-1, self.channels)
            return patches(x, self.strides, before) @ rows, bias
        if self.method == "taps":
            return by_taps(x, kernel), bias
        if self.method == "doubled":
            return doubled(x, kernel), bias
        steps, edges = (self.strides,) * 2, ((before, 1),) * 2

        def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return convolved(x, kernel, edges, window_strides=steps)

        if x.shape[-1] > FEW:
            return plain(x, kernel), bias

        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            rows = kernel.reshape(-1, self.channels)
            return patches(x, self.strides, before) @ rows

        return jax.lax.platform_dependent(x, kernel, cpu=plain, default=product), bias


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, and a shortcut."""

    channels: int
    groups: int
    dropout: float
    conv: str
    dtype: Dtype
    variant: str = "official"

    def setup(self) -> None:
        """Names the layers."""
        epsilon = VARIANTS[self.variant].epsilon
        self.norm1 = GroupNorm(self.groups, epsilon)
        self.conv1 = Conv(self.channels, self.conv, self.dtype)
        self.time = Linear(self.channels)
        self.norm2 = GroupNorm(self.groups, epsilon)
        self.conv2 = Conv(self.channels, self.conv, self.dtype, kernel_init=near_zero)
        self.shortcut = Linear(self.channels)

    def of_time(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        """Returns kernel and bias that make the block's shift of the time embedding."""
        return self.time(inputs)

    def __call__(
        self, x: Activation, time: jax.Array, key: jax.Array | None
    ) -> Activation:
        """Returns [B, H, W, channels] from x [B, H, W, C].

        Args:
          x: the activation.
          time: what is added between the convolutions, [B, channels], in float32.
          key: of dropout; None for none.
        """
        h = self.norm1(x.parts, silu=True, shift=x.shift)
        h, bias = self.conv1(h)
        options: dict[str, Any] = {"shift": bias, "of_images": time}
        if key is not None and self.dropout:
            made = dropout.mask(key, h.shape, self.dropout)
            options["mask"], options["keep"] = made
        h, bias = self.conv2(self.norm2((h,), silu=True, **options))
        if len(x.parts) > 1 or x.shift.size != self.channels:
            x = self._projected(x)
        return Activation((h + x.parts[0],), x.shift + bias)

    def _projected(self, x: Activation) -> Activation:
        kernel, bias = self.shortcut(x.shift.size)
        # Of what is written the product is by the kernel as the activation is typed.
        as_typed = kernel.astype(self.dtype).astype(x.shift.dtype)
        shift = _product(x.shift, as_typed) + bias
        return Activation((product(x.parts, kernel),), shift)


class Attention(nn.Module):
    """Self-attention over all pixels, with a residual connection."""

    channels: int
    groups: int
    dtype: Dtype
    variant: str = "official"

    def setup(self) -> None:
        """Names the layers."""
        self.norm = GroupNorm(self.groups, VARIANTS[self.variant].epsilon)
        self.query, self.key, self.value = (Linear(self.channels) for _ in range(3))
        self.out = Linear(self.channels, near_zero)

    def weights(self) -> list[tuple[jax.Array, jax.Array]]:
        """Returns kernels and biases of query, key, value and output, in `wide`."""
        layers = self.query, self.key, self.value, self.out
        made = [layer(self.channels) for layer in layers]
        return jax.tree.map(lambda leaf: leaf.astype(wide(self.dtype)), made)

    def __call__(self, x: Activation, weights: "Folded") -> Activation:
        """Returns [B, H, W, C] from x of the same shape.

        Args:
          x: the activation, of one part.
          weights: `folded` of `weights`.
        """
        (residual,), w = x.parts, weights
        h = self.norm(x.parts, shift=x.shift)
        q = product((h,), w.query) + w.bias.astype(self.dtype)[None, None, None]
        k, v = (h if a is None else product((h,), a) for a in (w.key, w.value))
        made = _attended(q, k, v, heads(self.variant, self.channels))
        return Activation((product((made,), w.out) + residual,), x.shift + w.shift)


class Folded(NamedTuple):
    """What attention multiplies with, of the parameters of its four layers."""

    query: jax.Array
    bias: jax.Array
    """Of the queries, [C]."""
    key: jax.Array | None
    """None where keys are the tokens themselves."""
    value: jax.Array | None
    out: jax.Array
    shift: jax.Array
    """Added to the result, [C]."""


def folded(attentions: Iterable[Attention]) -> list[Folded]:
    """Returns what each block multiplies with, by products for all of a width at once.

    With tokens h and one head, scores are (h Wq + bq) (h Wk + bk)^T, which is
    (h Wq Wk^T + bq Wk^T) h^T but for what is the same for all keys, and so nothing to a
    softmax. Its rows add up to 1, so values and output are A h (Wv Wo) + (bv Wo + bo).
    So two products of tokens are left of four.
    """
    blocks = list(attentions)
    found: dict[int, Folded] = {}
    for width in {block.channels for block in blocks}:
        chosen = [i for i, block in enumerate(blocks) if block.channels == width]
        layers = zip(*(blocks[i].weights() for i in chosen), strict=True)
        (wq, bq), (wk, _), (wv, bv), (wo, bo) = (
            [jnp.stack(leaves) for leaves in zip(*layer, strict=True)]
            for layer in layers
        )
        one_head = heads(blocks[chosen[0]].variant, width) == 1
        with_bias = jnp.concatenate([wv, bv[:, None]], axis=1)
        made = _product(with_bias, wo)
        shifts = made[:, -1] + bo
        queries = jnp.concatenate([wq, bq[:, None]], axis=1)
        if one_head:
            queries = _product(queries, wk.mT)
        for n, i in enumerate(chosen):
            key, value, out = (
                (None, None, made[n, :-1]) if one_head else (wk[n], wv[n], wo[n])
            )
            query, bias = queries[n, :-1], queries[n, -1]
            found[i] = Folded(query, bias, key, value, out, shifts[n])
    return [found[i] for i in range(len(blocks))]


def heads(variant: str, channels: int) -> int:
    """Returns the number of heads of an attention of so many channels."""
    return channels // (VARIANTS[variant].head_width or channels)


class Downsample(nn.Module):
    """Halves height and width by a convolution with stride 2."""

    conv: str
    dtype: Dtype
    variant: str = "official"

    @nn.compact
    def __call__(self, x: jax.Array) -> Activation:
        """Returns [B, H/2, W/2, C]; the official one pads only below and right."""
        before = VARIANTS[self.variant].before
        made = Conv(x.shape[-1], self.conv, self.dtype, 2, before, name="conv")(x)
        return start(*made)


class Upsample(nn.Module):
    """Doubles height and width by repetition, followed by a convolution."""

    conv: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> Activation:
        """Returns [B, 2H, 2W, C]."""
        method = "doubled" if self.conv == "xla" else self.conv
        if method != "doubled":
            x = repeated(x)
        return start(*Conv(x.shape[-1], method, self.dtype, name="conv")(x))


def _attended(q: jax.Array, k: jax.Array, v: jax.Array, count: int) -> jax.Array:
    """Returns the attention of so many heads, as q, k and v are shaped."""
    shape, each = q.shape, q.shape[-1] // count
    q, k, v = (a.reshape(len(a), -1, count, each) for a in (q, k, v))

    def one(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, each**-0.5)

    if count == 1:
        return one(q[:, :, 0], k[:, :, 0], v[:, :, 0]).reshape(shape)
    return jax.vmap(one, 2, 2)(q, k, v).reshape(shape)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the product of parameters, in full precision: it is small."""
    return jnp.matmul(a, b, precision="highest")
