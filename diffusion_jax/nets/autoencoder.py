"""The autoencoder of latent diffusion (Rombach et al. 2022), whose latents are images.

An encoder, each level of which but the last halves the resolution, puts out mean and
log variance of a normal distribution of latents; a decoder makes images of latents.
With the defaults it is that of Stable Diffusion: 83,653,863 parameters, latents of an
eighth of the height and width. The blocks are the U-Net's, without time, skip
connections and dropout, and each half has an attention of one head in its middle.

One that was trained to reconstruct, with hardly any weight on the KL divergence, has
latents that are far from N(0, I): decoded noise is no image. A diffusion model learns
how its latents are distributed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.nets.blocks import (
    OFFICIAL,
    Activation,
    Attention,
    Conv,
    Downsample,
    Dtype,
    GroupNorm,
    Linear,
    ResBlock,
    Upsample,
    check_computed,
    folded,
    unit,
    wide,
)
from diffusion_jax.nets.convolutions import product

LOWEST, HIGHEST = -30.0, 20.0
"""Where the log variance is clamped, as in the authors' code."""


class Moments(NamedTuple):
    """The normal distribution q(z | x) of the latents of each image."""

    mean: jax.Array
    """[B, h, w, z]."""
    log_variance: jax.Array
    """As the mean; -inf where there is no noise, so that z is the mean."""

    def sample(self, key: jax.Array) -> jax.Array:
        """Returns latents drawn from it, mean + deviation eps: gradients pass.

        Args:
          key: one key, or a key an image, [B].
        """
        shape, dtype = self.mean.shape, self.mean.dtype
        if key.ndim:
            draw = jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))
            eps = draw(key)
        else:
            eps = jax.random.normal(key, shape, dtype)
        return self.mean + jnp.exp(0.5 * self.log_variance) * eps

    def mode(self) -> jax.Array:
        """Returns the most likely latents, which are the mean."""
        return self.mean

    def kl(self) -> jax.Array:
        """Returns KL(q || N(0, I)), [B], in nats; inf where there is no noise.

        1/2 sum(mean^2 + variance - 1 - log variance).

        >>> print(Moments(jnp.ones([1, 2, 2, 1]), jnp.zeros([1, 2, 2, 1])).kl())
        [2.]
        """
        noise = jnp.expm1(self.log_variance) - self.log_variance
        terms = 0.5 * (jnp.square(self.mean) + noise)
        return terms.sum(axis=tuple(range(1, terms.ndim)))


class Form(NamedTuple):
    """What both halves are made of: these fields of `AutoencoderKL`."""

    channels: int
    multipliers: Sequence[int]
    blocks: int
    attention: Sequence[int]
    middle_attention: bool
    groups: int
    dtype: Dtype
    conv: str
    remat: bool


class Encoder(nn.Module):
    """From images to as many numbers a latent pixel as asked."""

    form: Form
    out_channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [B, h, w, out_channels], in `wide`, from images [B, H, W, C]."""
        form, levels = self.form, len(self.form.multipliers)
        apply = _blocks(form, "down", form.blocks)
        h = _first(form, x, form.channels)
        for i in range(levels):
            for j in range(form.blocks):
                h = apply(h, f"down{i}_block{j}")
            if i < levels - 1:
                down = Downsample(form.conv, form.dtype, name=f"down{i}_downsample")
                h = down(h.whole())
        h = apply(apply(h, "middle_block0"), "middle_block1")
        return _last(form, h, self.out_channels)


class Decoder(nn.Module):
    """From latents to images."""

    form: Form
    out_channels: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Returns images, [B, H, W, out_channels], in `wide`, from [B, h, w, z]."""
        form = self.form
        apply = _blocks(form, "up", form.blocks + 1)
        h = _first(form, z, form.channels * form.multipliers[-1])
        h = apply(apply(h, "middle_block0"), "middle_block1")
        for i in reversed(range(len(form.multipliers))):
            for j in range(form.blocks + 1):
                h = apply(h, f"up{i}_block{j}")
            if i > 0:
                h = Upsample(form.conv, form.dtype, name=f"up{i}_upsample")(h.whole())
        return _last(form, h, self.out_channels)


class AutoencoderKL(nn.Module):
    """An encoder and a decoder; the defaults are Stable Diffusion's."""

    channels: int = 128
    """Width of the first level."""
    multipliers: Sequence[int] = (1, 2, 4, 4)
    """Width of each level in units of `channels`; each but the last halves height and
    width."""
    blocks: int = 2
    """Residual blocks a level of the encoder; the decoder has one more."""
    latent: int = 4
    """Channels of the latents."""
    attention: Sequence[int] = ()
    """Levels, counted from 0 at full resolution, with attention after each block."""
    middle_attention: bool = True
    """Whether the middle of each half has one."""
    groups: int = 32
    """Groups of every GroupNorm."""
    quant: bool = True
    """Whether a product with the channels follows the encoder and precedes the decoder;
    those of Stable Diffusion 3 and Flux have none."""
    image_channels: int = 3
    """Channels of the images."""
    noise: bool = True
    """Whether the encoder puts out a log variance. Without, it is a plain autoencoder:
    its latents are the mean, and there is no bound on a likelihood."""
    dtype: Dtype = jnp.float32
    """Type of the activations, as in `UNet`; float16 overflows in released ones."""
    conv: str = "xla"
    """How a convolution is computed, as in `UNet`."""
    remat: bool = False
    """Whether blocks are computed again in the backward pass instead of stored."""

    def setup(self) -> None:
        """Names the parts."""
        form = Form(**{name: getattr(self, name) for name in Form._fields})
        width = self.latent * (2 if self.noise else 1)
        self.encoder = Encoder(form, width)
        self.decoder = Decoder(form, self.image_channels)
        if self.quant:
            self.quant_conv, self.post_quant_conv = Linear(width), Linear(self.latent)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns images that were encoded and decoded again, without noise."""
        return self.decode(self.encode(x).mode())

    def encode(self, x: jax.Array) -> Moments:
        """Returns the distribution of the latents, [B, h, w, z], in `wide`.

        Args:
          x: images in [-1, 1], [B, H, W, C]; H and W multiples of 2^(levels - 1).

        Raises:
          ValueError: images, or fields of the network, that do not fit.
        """
        check(self, x)
        out = self.encoder(x)
        out = _mixed(out, self.quant_conv) if self.quant else out
        if not self.noise:
            return Moments(out, jnp.full_like(out, -jnp.inf))
        mean, log_variance = jnp.split(out, 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, LOWEST, HIGHEST))

    def decode(self, z: jax.Array) -> jax.Array:
        """Returns images, [B, H, W, C], in `wide`; about in [-1, 1], not clipped.

        Args:
          z: latents as the encoder gives them, without a scale, [B, h, w, z].

        Raises:
          ValueError: latents, or fields of the network, that do not fit.
        """
        check_form(self)
        if z.ndim != 4 or z.shape[-1] != self.latent:
            raise ValueError(
                f"z must be latents of shape [B, h, w, {self.latent}]; got {z.shape}. "
                "Give what encode returns, drawn or its mean."
            )
        return self.decoder(_mixed(z, self.post_quant_conv) if self.quant else z)


def factor(net: AutoencoderKL) -> int:
    """Returns how many pixels a side one pixel of the latents stands for.

    >>> factor(AutoencoderKL())
    8
    """
    return 1 << (len(net.multipliers) - 1)


def rescaled(params: Any, shift: ArrayLike, scale: ArrayLike) -> Any:
    """Returns the parameters with which latents come out, and go in, on a scale.

    (z - shift) scale of each channel, as in `latents.Scale`, is multiplied into the
    products next to the latents: for programs that know of one factor for all.

    Args:
      params: of an `AutoencoderKL` with noise and quant.
      shift: [z].
      scale: [z], above 0.

    Raises:
      ValueError: a network without these products.
    """
    if "quant_conv" not in params:
        raise ValueError(
            "quant must be True for the scale of the latents to be multiplied into the "
            "weights; got a network without. Train one with quant."
        )
    shift, scale = (np.asarray(a, np.float64) for a in (shift, scale))
    (into, bias), (out, last) = (
        [np.asarray(params[name][leaf], np.float64) for leaf in ("kernel", "bias")]
        for name in ("quant_conv", "post_quant_conv")
    )
    factors = np.concatenate([scale, np.ones_like(scale)])
    terms = np.concatenate([-shift * scale, 2 * np.log(scale)])
    made = {
        "quant_conv": {"kernel": into * factors, "bias": bias * factors + terms},
        "post_quant_conv": {"kernel": out / scale[:, None], "bias": last + shift @ out},
    }
    return {**params, **jax.tree.map(np.float32, made)}


def check(net: AutoencoderKL, x: jax.Array) -> None:
    """Raises ValueError where images do not fit the network, or its own fields."""
    check_form(net)
    each, channels = factor(net), net.image_channels
    if x.ndim != 4 or x.shape[1] % each or x.shape[2] % each:
        raise ValueError(
            f"x must have shape [B, H, W, C] with H and W multiples of {each} (there "
            f"are {len(net.multipliers)} levels); got {x.shape}. Resize or pad the "
            "images, or give the network fewer levels."
        )
    if x.shape[-1] != channels or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be real numbers in [-1, 1] of {channels} channels; got {x.dtype} "
            f"{x.shape}. Scale the whole numbers 0 to 255: values / 127.5 - 1; or "
            "change image_channels."
        )


def check_form(net: AutoencoderKL) -> None:
    """Raises ValueError where the fields of a network do not fit each other."""
    check_computed(net.conv, net.dtype)
    levels = len(net.multipliers)
    if not levels or not set(net.attention) <= set(range(levels)):
        raise ValueError(
            f"attention must be levels of the network, 0 to {levels - 1}; got "
            f"{tuple(net.attention)}. Level i has 1 / 2^i of the height and width."
        )
    for width in (net.channels * multiplier for multiplier in net.multipliers):
        if width % net.groups or width < 1:
            raise ValueError(
                f"every level's width must be a multiple of {net.groups}, for its "
                f"groups; got {width}. Change channels, multipliers or groups."
            )


def _blocks(
    form: Form, way: str, count: int
) -> Callable[[Activation, str], Activation]:
    """Returns the function that applies a residual block, by its name.

    And the attention that follows it, if there is one.

    Args:
      form: of the network.
      way: "down" or "up".
      count: blocks a level.
    """
    block, attend = ResBlock, Attention
    if form.remat:
        block, attend = nn.remat(ResBlock), nn.remat(Attention)
    of_levels = [
        (f"{way}{i}_block{j}", form.channels * multiplier, i in form.attention)
        for i, multiplier in enumerate(form.multipliers)
        for j in range(count)
    ]
    width = form.channels * form.multipliers[-1]
    middle = [("middle_block0", width, form.middle_attention)]
    plan = [*of_levels, *middle, ("middle_block1", width, False)]
    blocks = {
        name: block(width, form.groups, 0.0, form.conv, form.dtype, name=name)
        for name, width, _ in plan
    }
    attentions = {
        name: attend(width, form.groups, form.dtype, name=_attention(name))
        for name, width, attends in plan
        if attends
    }
    weights = dict(zip(attentions, folded(attentions.values()), strict=True))

    def apply(x: Activation, name: str) -> Activation:
        x = blocks[name](x, None, None)
        return attentions[name](x, weights[name]) if name in attentions else x

    return apply


def _attention(block: str) -> str:
    return "middle_attention" if block == "middle_block0" else f"{block}_attention"


def _first(form: Form, x: jax.Array, width: int) -> Activation:
    """Returns the first convolution, to so many channels."""
    y, bias = Conv(width, form.conv, form.dtype, name="conv_in")(x)
    return Activation((y,), bias.astype(wide(y.dtype)))


def _last(form: Form, h: Activation, channels: int) -> jax.Array:
    """Returns the last normalisation and convolution, to so many channels."""
    norm = GroupNorm(form.groups, OFFICIAL.epsilon, name="norm_out")
    x = norm(h.parts, silu=True, shift=h.shift)
    y, bias = Conv(channels, "taps", form.dtype, kernel_init=unit, name="conv_out")(x)
    return y + bias[None, None, None]


def _mixed(x: jax.Array, layer: Linear) -> jax.Array:
    """Returns the channels times the kernel of a layer, plus its bias."""
    kernel, bias = layer(x.shape[-1])
    return product((x,), kernel) + bias[None, None, None]
