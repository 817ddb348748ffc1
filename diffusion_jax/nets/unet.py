"""The U-Net of DDPM (App. B, Ho et al. 2020), with all constants of the official code.

35,746,307 parameters for CIFAR-10. What other implementations often get wrong, and
where it is here:

  - GroupNorm has epsilon 1e-6 and 32 groups                        `blocks.GroupNorm`
  - the last layer of each block starts near zero, not at zero      `blocks.near_zero`
  - down-sampling pads one row below and one column to the right    `blocks.Downsample`
  - the time embedding is [sin, cos], its slowest frequency 1e-4    `embeddings`
  - skip connections start after the attention                      `UNet`
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import raise_unknown
from diffusion_jax.nets.blocks import (
    VARIANTS,
    Activation,
    Attention,
    Conv,
    Downsample,
    Dtype,
    GroupNorm,
    ResBlock,
    Upsample,
    as_embedding,
    beside,
    check_computed,
    folded,
    near_zero,
    unit,
    wide,
)
from diffusion_jax.nets.embeddings import fourier_features, time_embedding


class UNet(nn.Module):
    """The network: from noisy images and times to one value a pixel and channel.

    The defaults are the CIFAR-10 network of the paper.
    """

    out_channels: int = 3
    """Channels of the output: those of the image, or twice that to learn variances."""
    channels: int = 128
    """Width of the first level."""
    multipliers: Sequence[int] = (1, 2, 2, 2)
    """Width of each level in units of `channels`; each level halves the resolution."""
    blocks: int = 2
    """Residual blocks a level on the way down; the way up has one more."""
    attention: Sequence[int] = (16,)
    """Resolutions (pixels of a level's shorter side) with attention after each block;
    the middle always has one."""
    dropout: float = 0.1
    """Share of activations dropped in training."""
    groups: int = 32
    """Groups of every GroupNorm."""
    num_classes: int = 0
    """Rows of the label embedding; 0 for a network without labels. One trained with
    dropped labels has one row more than there are classes, the last, for no label."""
    dtype: Dtype = jnp.float32
    """Type of the activations; parameters and output stay float32. float64 is for a
    network that every machine is to evaluate alike: its output is float64 too, and JAX
    has to compute in it (`jax.enable_x64`)."""
    conv: str = "xla"
    """How a convolution is computed: "xla", or "matmul" (neighbourhoods times kernel,
    the same numbers): in a loop on CPU several times faster, for more memory."""
    remat: bool = False
    """Whether blocks are computed again in the backward pass instead of stored."""
    variant: str = "official"
    """Whose constants, see `VARIANTS`: "official", or "diffusers" for networks trained
    with the defaults of that library."""
    fourier: Sequence[int] = ()
    """The n of the features sin(2^n pi x) and cos(2^n pi x) that are concatenated to x;
    see `fourier_features`."""
    spans: bool = False
    """Whether it is told, beside the time, how far the jump from there goes."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        label: jax.Array | None = None,
        span: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns the network's output, [B, H, W, out_channels], in `wide`.

        Args:
          x: noisy images, [B, H, W, C]; H and W multiples of 2^(levels - 1).
          t: times as the network counts them, [B].
          label: classes in 0..num_classes-1, [B], where num_classes > 0. Another one
            raises an error, or gives nan where the label is traced.
          span: how far the jump goes, in the unit of t, [B], where there are spans.
          train: whether dropout is on; needs a "dropout" key.

        Raises:
          ValueError: a shape or a label that does not fit the network.
        """
        check(self, x, t, label, span)
        block, attend = ResBlock, Attention
        if self.remat:
            block, attend = nn.remat(ResBlock), nn.remat(Attention)
        plan, options = list(self._plan(min(x.shape[1:3]))), (self.dtype, self.variant)
        blocks = [
            block(width, self.groups, self.dropout, self.conv, *options, name=name)
            for name, width, _ in plan
        ]
        attentions = {
            name: attend(width, self.groups, *options, name=attention)
            for name, width, attention in plan
            if attention
        }
        weights = dict(zip(attentions, folded(attentions.values()), strict=True))
        keys: Any = [None] * len(blocks)
        if train and self.dropout:
            keys = jax.random.split(self.make_rng("dropout"), len(blocks))
        shifts = self._shifts(blocks, self._time(t, label, span))
        steps = {
            step[0]: rest
            for step, *rest in zip(plan, blocks, shifts, keys, strict=True)
        }

        def level(x: Activation, name: str) -> Activation:
            block, shift, key = steps[name]
            x = block(x, shift, key)
            return attentions[name](x, weights[name]) if name in attentions else x

        if self.fourier:
            typed = wide(self.dtype)
            features = fourier_features(x, self.fourier, dtype=typed)
            x = jnp.concatenate([x.astype(typed), features], axis=-1)
        x, bias = Conv(self.channels, self.conv, self.dtype, name="conv_in")(x)
        h = Activation((x,), bias.astype(wide(x.dtype)))
        skips = [h]
        levels = len(self.multipliers)
        for i in range(levels):
            for j in range(self.blocks):
                h = level(h, f"down{i}_block{j}")
                last = j == self.blocks - 1 and i < levels - 1
                # Joined once, for the convolution and the skip connection.
                h = h.settled() if last else h
                skips.append(h)
            if i < levels - 1:
                down = Downsample(
                    self.conv, self.dtype, self.variant, name=f"down{i}_downsample"
                )
                h = down(h.whole())
                skips.append(h)

        h = level(level(h, "middle_block0"), "middle_block1")
        for i in reversed(range(levels)):
            for j in range(self.blocks + 1):
                h = level(beside(h, skips.pop()), f"up{i}_block{j}")
            if i > 0:
                h = Upsample(self.conv, self.dtype, name=f"up{i}_upsample")(h.whole())

        return self._output(h)

    def _output(self, h: Activation) -> jax.Array:
        """Returns the last normalisation and convolution."""
        epsilon, out = VARIANTS[self.variant].epsilon, self.out_channels
        norm = GroupNorm(self.groups, epsilon, name="norm_out")
        x = norm(h.parts, silu=True, shift=h.shift)
        conv = Conv(out, "taps", self.dtype, kernel_init=near_zero, name="conv_out")
        y, bias = conv(x)
        return y + bias[None, None, None]

    def _plan(self, side: int) -> Iterator[tuple[str, int, str | None]]:
        """Yields each residual block's name and width, and its attention's name.

        Args:
          side: the shorter side of the images.
        """
        widths = [self.channels * multiplier for multiplier in self.multipliers]

        def level(name: str, i: int) -> tuple[str, int, str | None]:
            attends = side // 2**i in self.attention
            return name, widths[i], f"{name}_attention" if attends else None

        for i in range(len(widths)):
            yield from (level(f"down{i}_block{j}", i) for j in range(self.blocks))
        yield "middle_block0", widths[-1], "middle_attention"
        yield "middle_block1", widths[-1], None
        for i in reversed(range(len(widths))):
            yield from (level(f"up{i}_block{j}", i) for j in range(self.blocks + 1))

    def _time(
        self, t: jax.Array, label: jax.Array | None, span: jax.Array | None
    ) -> jax.Array:
        """Returns SiLU of the embedding of times, jumps and labels, [B, 4 channels]."""
        time = self._embedded(t, "time")
        if self.spans:
            assert span is not None  # held by check
            time = time + self._embedded(span, "span")
        if self.num_classes:
            assert label is not None  # held by check
            rows = nn.Embed(
                self.num_classes,
                4 * self.channels,
                embedding_init=as_embedding,
                dtype=self.dtype,
                name="label",
            )(label)
            known = (label >= 0) & (label < self.num_classes)
            time = time + jnp.where(known[:, None], rows, jnp.nan)
        return nn.silu(time)

    def _embedded(self, t: jax.Array, name: str) -> jax.Array:
        """Returns two layers on the embedding of times, [B, 4 channels]."""
        _, shift, cosine_first, *_ = VARIANTS[self.variant]
        found = time_embedding(
            t,
            self.channels,
            shift=shift,
            cosine_first=cosine_first,
            dtype=wide(self.dtype),
        )
        for layer in (f"{name}1", f"{name}2"):
            found = nn.silu(found) if layer == f"{name}2" else found
            found = nn.Dense(
                4 * self.channels, kernel_init=unit, dtype=self.dtype, name=layer
            )(found)
        return found

    def _shifts(self, blocks: Sequence[ResBlock], time: jax.Array) -> list[jax.Array]:
        """Returns what each block adds for the time, [B, its channels], in `wide`.

        By one product for all blocks.
        """
        made = [block.time(time.shape[-1]) for block in blocks]
        kernel, bias = (
            jnp.concatenate(leaves, axis=-1) for leaves in zip(*made, strict=True)
        )
        kernel, typed = kernel.astype(self.dtype), wide(self.dtype)
        shifts = jnp.matmul(time, kernel, preferred_element_type=typed) + bias[None]
        ends = np.cumsum([len(b) for _, b in made])[:-1]
        return jnp.split(shifts, ends, axis=-1)


def cast(params: Any, dtype: Dtype) -> Any:
    """Returns the parameters in the types that a network of this type computes in.

    Kernels and embeddings are cast, which the network else does at each use: its output
    is the same to the bit, but a chain of many evaluations casts them once. Vectors,
    used in float32, and the kernels of attention, first multiplied by each other, stay
    as they are.

    Args:
      params: of a `UNet`.
      dtype: of that network.

    >>> params = {"conv1": {"kernel": jnp.ones(2)}, "query": {"kernel": jnp.ones(2)}}
    >>> jax.tree.map(lambda leaf: leaf.dtype.name, cast(params, jnp.bfloat16))
    {'conv1': {'kernel': 'bfloat16'}, 'query': {'kernel': 'float32'}}
    """
    if not isinstance(params, Mapping):
        return params
    return {
        name: leaf.astype(dtype)
        if name in ("kernel", "embedding")
        else leaf
        if name in ("query", "key", "value", "out")
        else cast(leaf, dtype)
        for name, leaf in params.items()
    }


def check(
    net: UNet,
    x: jax.Array,
    t: jax.Array,
    label: jax.Array | None,
    span: jax.Array | None = None,
) -> None:
    """Raises ValueError where an input does not fit the network."""
    factor = 2 ** (len(net.multipliers) - 1)
    if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"x must have shape [B, H, W, C] with H and W multiples of {factor} (there "
            f"are {len(net.multipliers)} levels); got {x.shape}. Resize or pad the "
            "images, or give the network fewer levels."
        )
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"t must have shape [B], one time an image; got {t.shape} for images "
            f"{x.shape}. Broadcast it: jnp.full(len(x), t)."
        )
    check_computed(net.conv, net.dtype)
    if net.variant not in VARIANTS:
        raise_unknown("variant", net.variant, tuple(VARIANTS))
    each = math.lcm(net.groups, VARIANTS[net.variant].head_width or 1)
    for width in {net.channels * multiplier for multiplier in net.multipliers}:
        if width % each:
            raise ValueError(
                f"every level's width must be a multiple of {each}, for its groups and "
                f"attention heads; got {width}. Change channels, multipliers or groups."
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
    if (span is not None) != net.spans or (span is not None and span.shape != t.shape):
        raise ValueError(
            f"span must be given, one a time, if and only if there are spans; got "
            f"spans={net.spans} and {None if span is None else span.shape}. Pass it to "
            "networks of jumps only."
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
    # By NumPy: in a trace JAX would trace the check too.
    values = np.asarray(label)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= count:
        raise ValueError(
            f"label must be in 0..{count - 1}; got values from {low} to {high}. Give "
            "the network num_classes rows: one a class, and one for no label if it is "
            "to be trained with dropped labels."
        )
