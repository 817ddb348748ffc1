"""Converts configurations of diffusers' UNet2DModel to our U-Net, and back.

Its networks are ours where the two are made of the same parts. Two sets of constants
are known (`blocks.VARIANTS`): those of the conversions of the authors' networks, and
the defaults of the library, with which its own training script trains.
"""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.nets.blocks import VARIANTS, Variant
from diffusion_jax.nets.unet import UNet

CLASS = "UNet2DModel"
VERSION = "0.31.0"
"""Of diffusers, whose configuration is written."""

# What a configuration means where it says nothing.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# Of which we have what is meant where nothing is said, and nothing else.
_FIXED = (
    *("center_input_sample", "time_embedding_type", "mid_block_type"),
    *("mid_block_scale_factor", "downsample_type", "upsample_type", "act_fn"),
    *("resnet_time_scale_shift", "add_attention", "class_embed_type"),
)
# How an average of weights was made, which diffusers' EMAModel writes beside them.
_AVERAGE = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
# 4096 pixels a side, halved to one.
_MOST_LEVELS = 13
_PLAIN, _ATTENTION = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")


class Architecture(NamedTuple):
    """A network and the images that it is for."""

    net: UNet
    image_size: int | tuple[int, int]
    """Pixels a side; height and width where they differ."""
    channels: int
    """Of an image."""


def read_config(config: Mapping[str, Any], *, where: str) -> Architecture:
    """Returns the network that a UNet2DModel's configuration describes.

    Args:
      config: what was in config.json.
      where: the file, for the error.

    Raises:
      ValueError: it is of another class, or has fields or values that we do not
        support, which are all named.

    >>> config = dict(
    ...     _class_name="UNet2DModel", sample_size=32, norm_eps=1e-6, freq_shift=1,
    ...     flip_sin_to_cos=False, downsample_padding=0, attention_head_dim=None,
    ...     block_out_channels=[128, 256, 256, 256],
    ...     down_block_types=["DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * 2],
    ...     up_block_types=[*["UpBlock2D"] * 2, "AttnUpBlock2D", "UpBlock2D"])
    >>> found = read_config(config, where="config.json")
    >>> found.net.multipliers, found.net.attention, found.image_size
    ((1, 2, 2, 2), (16,), 32)
    """
    kind = config.get("_class_name")
    if kind != CLASS:
        raise ValueError(
            f"{where} must describe a {CLASS}; got the class {kind!r}. Networks of "
            "other families do not fit this U-Net."
        )
    given = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in _AVERAGE
    }
    values = {**_DEFAULTS, **given}
    wrong = [f"{name} {given[name]!r}" for name in given if name not in _DEFAULTS]
    if values["act_fn"] == "swish":
        values["act_fn"] = "silu"  # another name of it
    wrong += [
        f"{name} {values[name]!r}, not {_DEFAULTS[name]!r}"
        for name in _FIXED
        if values[name] != _DEFAULTS[name]
    ]
    size = _size(values["sample_size"])
    kinds = [
        f"{name} {reprlib.repr(values[name])}, not {must}"
        for name, (fits, must) in _KINDS.items()
        if not fits(values[name])
    ]
    wrong += kinds or _wrong_shape(values, size)
    constants = {name: _constants(each) for name, each in VARIANTS.items()}
    said = {field: values[field] for field in _constants(VARIANTS["official"])}
    variants = [name for name, known in constants.items() if said == known]
    if not variants:
        wrong.append(f"{said}, neither {' nor '.join(map(str, constants.values()))}")
    if wrong:
        raise ValueError(
            f"{where} must have only what this U-Net supports; got {'; '.join(wrong)}. "
            "Such a network cannot be converted: train one without these."
        )
    widths = values["block_out_channels"]
    assert size is not None  # or it would be among what is wrong
    attended = [kind.endswith(_ATTENTION[0]) for kind in values["down_block_types"]]
    net = UNet(
        out_channels=values["out_channels"],
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=values["layers_per_block"],
        attention=tuple(min(size) // 2**i for i, on in enumerate(attended) if on),
        dropout=values["dropout"],
        groups=values["norm_num_groups"],
        num_classes=values["num_class_embeds"] or 0,
        variant=variants[0],
    )
    height, width = size
    each = height if height == width else size
    return Architecture(net, each, values["in_channels"])


def write_config(
    net: UNet, channels: int, *, image_size: int | tuple[int, int]
) -> dict[str, Any]:
    """Returns the configuration of the UNet2DModel that computes what a network does.

    Args:
      net: the network.
      channels: of its images.
      image_size: pixels a side, or height and width.

    Raises:
      ValueError: the network has a part that UNet2DModel lacks.
    """
    lacking = []
    if net.multipliers[0] != 1:
        lacking.append(f"multipliers {tuple(net.multipliers)}, which must begin with 1")
    if net.fourier:
        lacking.append(f"fourier {tuple(net.fourier)}, which must be empty")
    if lacking:
        raise ValueError(
            f"a network must be made of what {CLASS} has; got {'; '.join(lacking)}. "
            "Keep it as .safetensors of our own."
        )
    height, width = np.broadcast_to(image_size, 2).tolist()
    side, levels = min(height, width), range(len(net.multipliers))
    there = [side // 2**i in net.attention for i in levels]
    down, up = (
        [pair[1] if attended else pair[0] for attended in there]
        for pair in zip(_PLAIN, _ATTENTION, strict=True)
    )
    return {
        "_class_name": CLASS,
        "_diffusers_version": VERSION,
        **_DEFAULTS,
        **_constants(VARIANTS[net.variant]),
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": net.out_channels,
        "block_out_channels": [net.channels * m for m in net.multipliers],
        "down_block_types": down,
        "up_block_types": up[::-1],
        "layers_per_block": net.blocks,
        "dropout": net.dropout,
        "norm_num_groups": net.groups,
        "num_class_embeds": net.num_classes or None,
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size(size: Any) -> tuple[int, int] | None:
    """Returns height and width of images; None where they are not known."""
    sides = size if isinstance(size, list | tuple) else [size]
    if len(sides) not in (1, 2) or not all(map(_is_count, sides)):
        return None
    return sides[0], sides[-1]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and 0 < len(value) <= _MOST_LEVELS


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"),
        (_is_count, "a whole number above 0"),
    ),
    **dict.fromkeys(
        ("down_block_types", "up_block_types"),
        (_is_list, "a list with an entry a level"),
    ),
    "block_out_channels": (
        lambda value: _is_list(value) and all(map(_is_count, value)),
        "a list of whole numbers above 0, one a level",
    ),
    "num_class_embeds": (
        lambda value: value is None or _is_count(value),
        "null or a number above 0",
    ),
    "dropout": (
        lambda value: isinstance(value, int | float) and 0 <= value < 1,
        "a share below 1",
    ),
}


def _wrong_shape(values: Mapping[str, Any], size: tuple[int, int] | None) -> list[str]:
    """Lists the widths, blocks and sizes that our network cannot have."""
    widths, channels = values["block_out_channels"], values["in_channels"]
    wrong, factor = [], 2 ** (len(widths) - 1)
    if size is None or any(side % factor for side in size):
        wrong.append(
            f"sample_size {values['sample_size']!r}, not one number, or height and "
            f"width, that are multiples of {factor}"
        )
    if any(width % widths[0] for width in widths):
        wrong.append(f"block_out_channels {list(widths)}, not multiples of the first")
    for way, kinds in enumerate(zip(_PLAIN, _ATTENTION, strict=True)):
        name = ("down_block_types", "up_block_types")[way]
        # Releases before the first had longer names.
        given = [str(kind).removeprefix("UNetRes") for kind in values[name]]
        if len(given) != len(widths) or set(given) - set(kinds):
            wrong.append(f"{name} {list(values[name])}, not one of {kinds} a level")
    down, up = (
        [str(kind).removeprefix("UNetRes").startswith("Attn") for kind in values[name]]
        for name in ("down_block_types", "up_block_types")
    )
    if down != up[::-1]:
        wrong.append("up_block_types with attention elsewhere than down_block_types")
    if values["time_embedding_dim"] not in (None, 4 * widths[0]):
        wrong.append(f"time_embedding_dim {values['time_embedding_dim']}, not null")
    groups = values["attn_norm_num_groups"]
    if groups not in (None, values["norm_num_groups"]):
        wrong.append(f"attn_norm_num_groups {groups}, not null")
    if values["out_channels"] not in (channels, 2 * channels):
        wrong.append(f"out_channels {values['out_channels']}, not in_channels or twice")
    return wrong


def _constants(variant: Variant) -> dict[str, Any]:
    """Returns the fields that say which variant a network is."""
    return {
        "norm_eps": variant.epsilon,
        "freq_shift": variant.frequency_shift,
        "flip_sin_to_cos": variant.cosine_first,
        "downsample_padding": variant.before,
        "attention_head_dim": variant.head_width,
    }
