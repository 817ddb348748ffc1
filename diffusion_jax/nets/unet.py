"""The U-Net of DDPM (App. B, Ho et al. 2020), to the constant of the official code.

35,746,307 parameters for CIFAR-10. What other implementations get wrong, and where it
is here:

  - GroupNorm has epsilon 1e-6 and 32 groups                        `blocks.GroupNorm`
  - the last layer of each block starts near zero, not at zero      `blocks.near_zero`
  - down-sampling pads one row below and one column to the right    `blocks.Downsample`
  - the time embedding is [sin, cos], its slowest frequency 1e-4    `embeddings`
  - skip connections carry what comes after the attention           `UNet`
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets.blocks import (
    VARIANTS,
    Activation,
    Attention,
    Conv,
    Downsample,
    Dtype,
    ResBlock,
    Upsample,
    conv,
    dense,
    group_norm,
    near_zero,
)
from diffusion_jax.nets.embeddings import fourier_features, time_embedding

FUSE = ("norm", "skip", "qkv")


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
    fuse: Sequence[str] = ()
    """Forms of the same mathematics, with the same parameters, that move less memory:
    "norm", GroupNorm and SiLU in few passes, with a backward pass of their own
    (`norm.fused`, which has no forward derivative); "skip", skip connections that are
    never joined to what they meet; "qkv", q, k and v in one product."""
    kernels: str = "xla"
    """What computes "norm": "xla", or "pallas", a kernel each way on an NVIDIA GPU;
    `norm_pallas.fused` says what is computed elsewhere."""
    dropout_bits: str = "threefry"
    """Generator of dropout: "threefry", the same bits on every device, or "rbg", the
    device's own; see `dropout.dropout`."""

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

        forms = (self.variant, self.fuse, self.kernels)

        def residual(x: Activation, width: int, name: str) -> jax.Array:
            options = (width, self.groups, self.dropout, self.conv, self.dtype)
            return block(*options, *forms, self.dropout_bits, name=name)(x, time, train)

        def attention(x: jax.Array, name: str) -> jax.Array:
            return attend(self.groups, self.dtype, *forms, name=name)(x)

        def level(x: Activation, width: int, name: str) -> jax.Array:
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
                met: Activation = (h, skips.pop())
                if "skip" not in self.fuse:
                    met = jnp.concatenate(met, axis=-1)
                h = level(met, width, f"up{i}_block{j}")
            if i > 0:
                h = Upsample(self.conv, self.dtype, name=f"up{i}_upsample")(h)

        h = group_norm(self, "norm_out")(h, silu=True)
        out = Conv(
            self.out_channels,
            self.conv,
            jnp.float32,
            kernel_init=near_zero,
            name="conv_out",
        )
        return out(h)


def cast(params: Any, dtype: Dtype) -> Any:
    """Returns the parameters in the types that a network of this type computes in.

    Kernels, biases and embeddings are cast; the scale and bias of a GroupNorm and the
    last convolution stay as they are. The network casts each where it uses it, so its
    output is the same to the bit, but a chain of many evaluations casts them once.

    Args:
      params: of a `UNet`.
      dtype: of that network.

    >>> params = {"norm": {"scale": jnp.ones(2)}, "query": {"bias": jnp.ones(2)}}
    >>> jax.tree.map(lambda leaf: leaf.dtype.name, cast(params, jnp.bfloat16))
    {'norm': {'scale': 'float32'}, 'query': {'bias': 'bfloat16'}}
    """
    if not isinstance(params, Mapping):
        return params.astype(dtype)
    kept = "scale" in params
    return {
        name: leaf if kept or name == "conv_out" else cast(leaf, dtype)
        for name, leaf in params.items()
    }


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
            f"conv must be 'xla' or 'matmul'; got {net.conv!r}. Leave it at 'xla'."
        )
    unknown = [name for name in net.fuse if name not in FUSE]
    if unknown or len(set(net.fuse)) < len(net.fuse):
        raise ValueError(
            f"fuse must hold some of {', '.join(FUSE)}, each once; got "
            f"{', '.join(net.fuse)}. Leave out what is not among them."
        )
    if net.kernels not in ("xla", "pallas"):
        raise ValueError(
            f"kernels must be 'xla' or 'pallas'; got {net.kernels!r}. Leave it at "
            "'xla' unless on an NVIDIA GPU."
        )
    if net.kernels == "pallas" and "norm" not in net.fuse:
        raise ValueError(
            "kernels must be 'xla' where fuse has no 'norm', which is what a kernel "
            "computes; got 'pallas'. Add 'norm' to fuse."
        )
    if net.dropout_bits not in ("threefry", "rbg"):
        raise ValueError(
            f"dropout_bits must be 'threefry' or 'rbg'; got {net.dropout_bits!r}. The "
            "first are the same on every device."
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
