"""The Inception network of the Frechet distance: the one released 2015-12-05.

FID and the Inception score are defined by this network (Heusel et al. 2017, Salimans et
al. 2016), not by the InceptionV3 of today's libraries. It has 94 convolutions and
23,850,960 parameters. Where it differs, and where that is here:

  - averages over 3x3 pixels count no padding                       `Block`
  - the last block takes a maximum where all others average         `BLOCKS`
  - 1008 classes, whose bias the Inception score leaves out         `Softmax`
  - images are scaled by (x - 128) / 128, after a resize that puts
    the first pixel on the first pixel, not centre on centre        `preprocess`

Modules have the names of the released graph ("mixed_9/tower/mixed/conv_1"), by which
`interop.inception_weights` finds its tensors.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import raise_unknown
from diffusion_jax.nets.convolutions import convolved

SIDE = 299
PREPROCESSING = ("tensorflow", "pytorch-fid")


class Features(NamedTuple):
    """The outputs of the network for each image."""

    pool3: jax.Array
    """Means over the 8x8 last activations, [B, 2048]: the features of FID."""
    logits: jax.Array
    """Scores of the classes, [B, 1008], without their bias: for the Inception score."""


class Layer(NamedTuple):
    """A convolution's description."""

    channels: int
    size: tuple[int, int] = (1, 1)
    strides: int = 1
    padding: str = "SAME"


class Conv(nn.Module):
    """Convolution, normalisation by stored statistics, ReLU."""

    layer: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns max(0, (w * x - mean) / sqrt(var + 1e-3) scale + bias).

        `mean` and `var` are in the collection "batch_stats"; nothing updates them.
        """
        channels, size, strides, padding = self.layer
        shape = (*size, x.shape[-1], channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,)).value
        var = self.variable("batch_stats", "var", jnp.ones, (channels,)).value
        x = convolved(x, kernel, padding, (strides, strides), precision="highest")
        a = scale / jnp.sqrt(var + 1e-3)
        x = (x - mean[None, None, None]) * a[None, None, None]
        return nn.relu(x + bias[None, None, None])


class Split(nn.Module):
    """A 1x3 and a 3x1 convolution of the same input."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [B, H, W, 2 channels]."""
        wide = Conv(Layer(self.channels, (1, 3)), name="conv")(x)
        high = Conv(Layer(self.channels, (3, 1)), name="conv_1")(x)
        return jnp.concatenate([wide, high], axis=-1)


class Tower(nn.Module):
    """Convolutions one after another, with a split at the end where it has channels."""

    layers: tuple[Layer, ...]
    split: int = 0
    """Channels of each half of the split; 0 for none."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [B, H', W', C'] from x [B, H, W, C]."""
        for i, layer in enumerate(self.layers):
            x = Conv(layer, name=_numbered("conv", i))(x)
        return Split(self.split, name="mixed")(x) if self.split else x


class Block(nn.Module):
    """A convolution, towers and a pooling of one input, their channels concatenated."""

    conv: Layer | None
    towers: tuple[tuple[Layer, ...], ...]
    split: int = 0
    pool: str = "average"
    """"average" or "max" of 3x3 pixels, not counting padding, before a convolution; or
    "halve", the maximum with stride 2 and no convolution."""
    pool_channels: int = 192

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [B, H', W', C'] from x [B, H, W, C]."""
        joined = [] if self.conv is None else [Conv(self.conv, name="conv")(x)]
        for i, layers in enumerate(self.towers):
            joined.append(Tower(layers, self.split, name=_numbered("tower", i))(x))
        if self.pool == "halve":
            joined.append(nn.max_pool(x, (3, 3), (2, 2), "VALID"))
        else:
            if self.pool == "max":
                x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
            else:
                x = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
            name = _numbered("tower", len(self.towers))
            joined.append(Tower((Layer(self.pool_channels),), name=name)(x))
        return jnp.concatenate(joined, axis=-1)


class Softmax(nn.Module):
    """The linear layer below the released network's softmax."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x kernel, [B, 1008].

        The bias is a parameter, since the released network has it, but is not added:
        the Inception score is by custom computed without (Salimans et al. 2016).
        """
        shape = (x.shape[-1], 1008)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        self.param("bias", nn.initializers.zeros, (shape[-1],))
        return jnp.matmul(x, kernel, precision="highest")


class Inception(nn.Module):
    """The network: images in, features out.

    Variables are `params` (kernel, scale, bias) and `batch_stats` (mean, var), all
    float32; every product is computed in full float32 on every device.
    """

    preprocessing: str = "tensorflow"
    """"tensorflow", by which the metrics are defined, or "pytorch-fid"."""

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        """Returns the features of images.

        Args:
          images: [B, H, W, 3] or [B, H, W, 1] (grey), of any size: uint8, or floating
            point with values 0..255.

        Raises:
          ValueError: images of another shape or type.
        """
        x = preprocess(images, preprocessing=self.preprocessing)
        x = Conv(Layer(32, (3, 3), 2, "VALID"), name="conv")(x)
        x = Conv(Layer(32, (3, 3), 1, "VALID"), name="conv_1")(x)
        x = Conv(Layer(64, (3, 3)), name="conv_2")(x)
        x = nn.max_pool(x, (3, 3), (2, 2), "VALID")
        x = Conv(Layer(80), name="conv_3")(x)
        x = Conv(Layer(192, (3, 3), 1, "VALID"), name="conv_4")(x)
        x = nn.max_pool(x, (3, 3), (2, 2), "VALID")
        for name, options in BLOCKS.items():
            x = Block(**options, name=name)(x)
        pool3 = x.mean((1, 2))
        return Features(pool3, Softmax(name="softmax")(pool3))


def preprocess(images: jax.Array, *, preprocessing: str = "tensorflow") -> jax.Array:
    """Returns resized images in [-1, 1], float32 [B, 299, 299, 3].

    "tensorflow" is what the released graph does: a bilinear resize in which output
    pixel i lies at i H / 299, then (x - 128) / 128. "pytorch-fid" is what the program
    of that name does: output pixel i lies at (i + 1/2) H / 299 - 1/2, then
    2 x / 255 - 1. On CIFAR-10 the two change FID by about 0.001.

    Args:
      images: [B, H, W, 3] or [B, H, W, 1], uint8 or floating point, values 0..255.
      preprocessing: "tensorflow" or "pytorch-fid".

    Raises:
      ValueError: another shape, type or name.

    >>> preprocess(jnp.full([1, 32, 32, 1], 192, jnp.uint8))[0, 0, 0].tolist()
    [0.5, 0.5, 0.5]
    """
    if preprocessing not in PREPROCESSING:
        raise_unknown("preprocessing", preprocessing, PREPROCESSING)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            "images must have shape [B, H, W, 3] or [B, H, W, 1]; got "
            f"{images.shape}. Move channels last, and give one batch at a time."
        )
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be uint8, or floating point 0..255; got {images.dtype}. "
            "Round and convert them: evaluation.pictures.to_uint8 does."
        )
    x = jnp.asarray(images).astype(jnp.float32)
    x = jnp.broadcast_to(x, (*x.shape[:-1], 3))
    if preprocessing == "pytorch-fid":
        return 2 * resize(x / 255, half_pixel=True) - 1
    return (resize(x) - 128) / 128


def resize(x: jax.Array, *, half_pixel: bool = False, side: int = SIDE) -> jax.Array:
    """Returns images resized by linear interpolation of the two nearest pixels.

    Where images shrink nothing is averaged. Both are as in the programs followed here,
    and unlike `jax.image.resize`.

    Args:
      x: floating point, [B, H, W, C].
      half_pixel: whether pixels are matched by their centres, and not the first to
        the first.
      side: height and width of the result.

    >>> ramp = jnp.arange(2.0).reshape(1, 1, 2, 1)
    >>> print(resize(ramp, side=4)[0, 0, :, 0])
    [0.  0.5 1.  1. ]
    >>> print(resize(ramp, side=4, half_pixel=True)[0, 0, :, 0])
    [0.   0.25 0.75 1.  ]
    """
    for axis in (2, 1):
        low, high, share = _taps(x.shape[axis], side, half_pixel)
        a = jnp.take(x, low, axis, mode="clip")
        b = jnp.take(x, high, axis, mode="clip")
        share = np.expand_dims(share, [k for k in range(4) if k != axis])
        x = a + (b - a) * share
    return x


def _taps(
    old: int, new: int, half_pixel: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the two pixels that each new one lies between, and the second's share."""
    # In float32, as in both programs: rounding decides between which pixels one lies.
    place, scale = np.arange(new, dtype=np.float32), np.float32(old) / np.float32(new)
    half = np.float32(0.5 if half_pixel else 0)
    place = np.maximum((place + half) * scale - half, 0)
    low = np.minimum(np.floor(place), old - 1)
    high = np.minimum(low + 1, old - 1)
    return low.astype(np.int32), high.astype(np.int32), place - low


def _numbered(name: str, i: int) -> str:
    """Returns the i-th use of a name in a scope: conv, conv_1, conv_2, ..."""
    return f"{name}_{i}" if i else name


# The options of blocks at 35x35, 17x17 and 8x8 pixels.


def _block_35(pool_channels: int) -> dict[str, Any]:
    five = (Layer(48), Layer(64, (5, 5)))
    three = (Layer(64), Layer(96, (3, 3)), Layer(96, (3, 3)))
    towers = (five, three)
    return {"conv": Layer(64), "towers": towers, "pool_channels": pool_channels}


def _block_17(channels: int) -> dict[str, Any]:
    wide, high = Layer(channels, (1, 7)), Layer(channels, (7, 1))
    once = (Layer(channels), wide, Layer(192, (7, 1)))
    twice = (Layer(channels), high, wide, high, Layer(192, (1, 7)))
    return {"conv": Layer(192), "towers": (once, twice)}


def _block_8(pool: str) -> dict[str, Any]:
    towers = ((Layer(384),), (Layer(448), Layer(384, (3, 3))))
    return {"conv": Layer(320), "towers": towers, "split": 384, "pool": pool}


BLOCKS: dict[str, dict[str, Any]] = {
    "mixed": _block_35(32),
    "mixed_1": _block_35(64),
    "mixed_2": _block_35(64),
    "mixed_3": {
        "conv": Layer(384, (3, 3), 2, "VALID"),
        "towers": ((Layer(64), Layer(96, (3, 3)), Layer(96, (3, 3), 2, "VALID")),),
        "pool": "halve",
    },
    "mixed_4": _block_17(128),
    "mixed_5": _block_17(160),
    "mixed_6": _block_17(160),
    "mixed_7": _block_17(192),
    "mixed_8": {
        "conv": None,
        "towers": (
            (Layer(192), Layer(320, (3, 3), 2, "VALID")),
            (
                Layer(192),
                Layer(192, (1, 7)),
                Layer(192, (7, 1)),
                Layer(192, (3, 3), 2, "VALID"),
            ),
        ),
        "pool": "halve",
    },
    "mixed_9": _block_8("average"),
    "mixed_10": _block_8("max"),
}
