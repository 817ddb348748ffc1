"""The blocks of U-Net and autoencoder, in the forms that move least memory.

Between blocks an activation is a few arrays that are never concatenated, such as a skip
connection and what it joins, and a shift that is never added to them, the sum of the
biases so far: the next normalisation takes both. Convolutions and products leave out
their biases, so that neither these nor their gradients cost a pass over memory.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.errors import raise_unknown
from diffusion_jax.nets import dropout, fresh, norm
from diffusion_jax.nets.convolutions import (
    attend,
    by_taps,
    convolved,
    doubled,
    patches,
    product,
    repeated,
)

Dtype = Any
FEW = 4
"""Up to so many input channels, a GPU is faster by `patches` times the kernel."""


class Activation(NamedTuple):
    """An activation, [B, H, W, C], as parts and a shift that are not joined yet."""

    parts: tuple[jax.Array, ...]
    """Its channels, [B, H, W, C_i] each; C is the sum of the C_i."""
    shift: jax.Array
    """Still to be added to each channel, [C], in `wide` of the parts."""

    def whole(self) -> jax.Array:
        """Returns the activation as one array."""
        x = jnp.concatenate(self.parts, axis=-1)
        return (x + self.shift[None, None, None]).astype(x.dtype)

    def settled(self) -> "Activation":
        """Returns the same activation as one part with a shift of 0."""
        return Activation((self.whole(),), jnp.zeros_like(self.shift))


def wide(dtype: Dtype) -> jnp.dtype:
    """Returns the type of what is summed and of vectors: float32, float64 of float64.

    >>> print(wide(jnp.bfloat16))
    float32
    """
    return jnp.promote_types(dtype, jnp.float32)


def check_computed(conv: str, dtype: Dtype) -> None:
    """Raises ValueError for a convolution or a type that there is not, or not now."""
    if conv not in ("xla", "matmul"):
        raise_unknown("conv", conv, ("xla", "matmul"))
    if jnp.dtype(dtype) == jnp.float64 and jnp.result_type(float) != jnp.float64:
        raise ValueError(
            "dtype float64 must be used with JAX's x64 mode on; got it off. Set "
            "JAX_ENABLE_X64=1, or call the network inside jax.enable_x64(True)."
        )


def beside(x: Activation, other: Activation) -> Activation:
    """Returns both, concatenated along the channels."""
    shift = jnp.concatenate([x.shift, other.shift])
    return Activation(x.parts + other.parts, shift)


class Variant(NamedTuple):
    """The constants in which U-Nets of the same shape differ."""

    epsilon: float
    """Of every GroupNorm."""
    frequency_shift: int
    """The `shift` of `embeddings.time_embedding`, and its `cosine_first`."""
    cosine_first: bool
    before: int
    """Rows that stride 2 pads above and columns to the left; it pads one below and one
    to the right in any case."""
    head_width: int | None
    """Channels of an attention head; None for a single head."""


VARIANTS = {
    # The authors' code, and diffusers' conversions of what they released.
    "official": Variant(1e-6, 1, False, 0, None),
    # The defaults of diffusers' UNet2DModel.
    "diffusers": Variant(1e-5, 0, True, 1, 8),
}
OFFICIAL = VARIANTS["official"]


# Scale 0 of the official code comes out as 1e-10: small, but gradients pass from the
# first step on.
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
    """The parameters of a linear layer, for callers that multiply by themselves."""

    channels: int
    kernel_init: nn.initializers.Initializer = unit

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        """Returns the kernel, [inputs, channels], and the bias, [channels]."""
        kernel = self.param("kernel", self.kernel_init, (inputs, self.channels))
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        return kernel, bias


class Conv(nn.Module):
    """3x3 convolution with "SAME" padding that leaves its bias to the caller."""

    channels: int
    method: str
    dtype: Dtype
    strides: int = 1
    before: int = OFFICIAL.before
    """As `Variant.before`."""
    kernel_init: nn.initializers.Initializer = unit

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the convolution of x, and the bias that is still to be added.

        They are [B, H / strides, W / strides, channels], of x [B, H, W, C], and
        [channels], in float32.
        """
        shape = (3, 3, x.shape[-1], self.channels)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        before = 1 if self.strides == 1 else self.before

        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            rows = kernel.reshape(-1, self.channels)
            return patches(x, self.strides, before) @ rows

        def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
            steps, edges = (self.strides,) * 2, ((before, 1),) * 2
            return convolved(x, kernel, edges, window_strides=steps)

        if self.method == "matmul":
            return product(x, kernel), bias
        if self.method == "taps":
            return by_taps(x, kernel), bias
        if self.method == "doubled":
            return doubled(x, kernel), bias
        if x.shape[-1] > FEW:
            return plain(x, kernel), bias
        return jax.lax.platform_dependent(x, kernel, cpu=plain, default=product), bias


class ResBlock(nn.Module):
    """Two convolutions, with the time embedding if any in between, and a shortcut."""

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

    def __call__(
        self, x: Activation, time: jax.Array | None, key: jax.Array | None
    ) -> Activation:
        """Returns [B, H, W, channels] from x [B, H, W, C].

        Args:
          x: the activation.
          time: added between the convolutions, [B, channels], in float32; the time
            embedding times the parameters that `self.time` holds. None for a network
            that knows no time.
          key: of dropout; None without.
        """
        h = self.norm1(x.parts, silu=True, shift=x.shift)
        h, bias = self.conv1(h)
        options: dict[str, Any] = {"shift": bias, "of_images": time}
        if key is not None and self.dropout:
            packed, keep = dropout.mask(key, h.shape, self.dropout)
            options |= {"mask": packed, "keep": keep}
        h, bias = self.conv2(self.norm2((h,), silu=True, **options))
        (residual, *others), shift = x
        if others or shift.size != self.channels:
            kernel, of_shortcut = self.shortcut(shift.size)
            # The shift meets the kernel as the parts do: rounded to their type.
            rounded = kernel.astype(self.dtype).astype(shift.dtype)
            shift = _product(shift, rounded) + of_shortcut
            residual = product(x.parts, kernel)
        return Activation((h + residual,), shift + bias)


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
          weights: its own, from `folded`.
        """
        (residual,), w = x.parts, weights
        h = self.norm(x.parts, shift=x.shift)
        q = product((h,), w.query) + w.bias.astype(self.dtype)[None, None, None]
        k, v = (h if a is None else product((h,), a) for a in (w.key, w.value))
        made = _attended(q, k, v, heads(self.variant, self.channels))
        return Activation((product((made,), w.out) + residual,), x.shift + w.shift)


class Folded(NamedTuple):
    """The parameters of an attention's four layers, multiplied where they can be."""

    query: jax.Array
    bias: jax.Array
    """Of the queries, [C]."""
    key: jax.Array | None
    """None where the keys are the tokens themselves; so of the values."""
    value: jax.Array | None
    out: jax.Array
    shift: jax.Array
    """Added to the result, [C]."""


def folded(attentions: Iterable[Attention]) -> list[Folded]:
    """Returns the multiplied parameters of each block.

    With tokens h and one head, scores are (h Wq + bq) (h Wk + bk)^T, which is
    (h Wq Wk^T + bq Wk^T) h^T up to terms that are the same for all keys, which the
    softmax ignores. Its rows sum to 1, so the output is A h (Wv Wo) + (bv Wo + bo). Two
    of four products with the tokens are left. Blocks of one width share theirs.
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
        outs = _product(with_bias, wo)
        shifts = outs[:, -1] + bo
        queries = jnp.concatenate([wq, bq[:, None]], axis=1)
        if one_head:
            queries = _product(queries, wk.mT)
        for n, i in enumerate(chosen):
            key, value, out = (
                (None, None, outs[n, :-1]) if one_head else (wk[n], wv[n], wo[n])
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
        conv = Conv(x.shape[-1], self.conv, self.dtype, 2, before, name="conv")
        y, bias = conv(x)
        return Activation((y,), bias.astype(wide(y.dtype)))


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
        y, bias = Conv(x.shape[-1], method, self.dtype, name="conv")(x)
        return Activation((y,), bias.astype(wide(y.dtype)))


def _attended(q: jax.Array, k: jax.Array, v: jax.Array, count: int) -> jax.Array:
    """Returns the attention of so many heads; all are [B, H, W, C]."""
    shape, each = q.shape, q.shape[-1] // count
    scale = each**-0.5
    q, k, v = (a.reshape(len(a), -1, count, each) for a in (q, k, v))
    if count == 1:
        return attend(q[:, :, 0], k[:, :, 0], v[:, :, 0], scale).reshape(shape)
    of_heads = jax.vmap(lambda q, k, v: attend(q, k, v, scale), 2, 2)
    return of_heads(q, k, v).reshape(shape)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the product of parameters, in full precision: it is small."""
    return jnp.matmul(a, b, precision="highest")
