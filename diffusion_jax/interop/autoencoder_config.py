"""Converts configurations of diffusers' AutoencoderKL to our autoencoder, and back."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.interop.unet_config import VERSION
from diffusion_jax.nets.autoencoder import AutoencoderKL

CLASS = "AutoencoderKL"
PLAIN = ("DownEncoderBlock2D", "UpDecoderBlock2D")
ATTENTION = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")

# What a configuration means where it says nothing.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": PLAIN[:1],
    "up_block_types": PLAIN[1:],
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


class Architecture(NamedTuple):
    """An autoencoder and the scale of its latents."""

    net: AutoencoderKL
    image_size: int
    """Pixels a side that it was trained for; others fit too."""
    shift: tuple[float, ...]
    """Of each channel of the latents, as in `latents.Scale`."""
    scale: tuple[float, ...]


def read_config(config: Mapping[str, Any], *, where: str) -> Architecture:
    """Returns the network that an AutoencoderKL's configuration describes.

    Args:
      config: what was in config.json.
      where: the file, for the error.

    Raises:
      ValueError: it is of another class, or has fields or values that we do not
        support, which are all named.

    >>> config = dict(_class_name="AutoencoderKL", block_out_channels=[32, 64],
    ...     down_block_types=["DownEncoderBlock2D"] * 2,
    ...     up_block_types=["UpDecoderBlock2D"] * 2)
    >>> found = read_config(config, where="config.json")
    >>> found.net.multipliers, found.scale
    ((1, 2), (0.18215, 0.18215, 0.18215, 0.18215))
    """
    kind = config.get("_class_name")
    if kind != CLASS:
        raise ValueError(
            f"{where} must describe an {CLASS}; got the class {kind!r}. Autoencoders "
            "of other families do not fit this one."
        )
    given = {name: value for name, value in config.items() if name[:1] != "_"}
    values = {**_DEFAULTS, **given}
    wrong = [f"{name} {given[name]!r}" for name in given if name not in _DEFAULTS]
    kinds = [
        f"{name} {values[name]!r}, not {must}"
        for name, (fits, must) in _KINDS.items()
        if not fits(values[name])
    ]
    wrong += kinds or _wrong_shape(values)
    if wrong:
        raise ValueError(
            f"{where} must have only what this autoencoder supports; got "
            f"{'; '.join(wrong)}. Such a network cannot be converted: train one "
            "without these."
        )
    widths, latent = values["block_out_channels"], values["latent_channels"]
    attended = [kind == ATTENTION[0] for kind in values["down_block_types"]]
    net = AutoencoderKL(
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=values["layers_per_block"],
        latent=latent,
        attention=tuple(i for i, on in enumerate(attended) if on),
        middle_attention=values["mid_block_add_attention"],
        groups=values["norm_num_groups"],
        quant=values["use_quant_conv"],
        image_channels=values["in_channels"],
    )
    size = values["sample_size"]
    means = values["latents_mean"] or (values["shift_factor"] or 0.0,) * latent
    stds = values["latents_std"] or (1.0,) * latent
    scale = tuple(values["scaling_factor"] / std for std in stds)
    side = size if isinstance(size, int) else min(size)
    return Architecture(net, side, tuple(map(float, means)), scale)


def write_config(
    net: AutoencoderKL, *, image_size: int, scale: float = 1.0
) -> dict[str, Any]:
    """Returns the configuration of the AutoencoderKL that computes what a network does.

    Args:
      net: the network.
      image_size: pixels a side, of which diffusers makes tiles of larger images.
      scale: the one factor that its pipelines multiply latents by.

    Raises:
      ValueError: the network has a part that AutoencoderKL lacks.
    """
    lacking = []
    if net.multipliers[0] != 1:
        lacking.append(f"multipliers {tuple(net.multipliers)}, which must begin with 1")
    if not net.noise:
        lacking.append("no log variance, noise False")
    if lacking:
        raise ValueError(
            f"an autoencoder must be made of what {CLASS} has; got "
            f"{'; '.join(lacking)}. Keep it as .safetensors of our own."
        )
    there = [i in net.attention for i in range(len(net.multipliers))]
    down, up = (
        [pair[1] if attended else pair[0] for attended in there]
        for pair in zip(PLAIN, ATTENTION, strict=True)
    )
    return {
        "_class_name": CLASS,
        "_diffusers_version": VERSION,
        **_DEFAULTS,
        "in_channels": net.image_channels,
        "out_channels": net.image_channels,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": [net.channels * m for m in net.multipliers],
        "layers_per_block": net.blocks,
        "latent_channels": net.latent,
        "norm_num_groups": net.groups,
        "sample_size": image_size,
        "scaling_factor": scale,
        "force_upcast": False,
        "use_quant_conv": net.quant,
        "use_post_quant_conv": net.quant,
        "mid_block_add_attention": net.middle_attention,
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def _all(value: Any, fits: Callable[[Any], bool]) -> bool:
    return _is_list(value) and all(map(fits, value))


_COUNTS = (
    *("in_channels", "out_channels", "layers_per_block", "latent_channels"),
    "norm_num_groups",
)
_FLAGS = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
_NUMBERS = "null or a number a channel of the latents"
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_COUNTS, (_is_count, "a whole number above 0")),
    **dict.fromkeys(_FLAGS, (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(
        ("down_block_types", "up_block_types"), (_is_list, "a list, an entry a level")
    ),
    "block_out_channels": (
        lambda value: _all(value, _is_count),
        "a list of whole numbers above 0, one a level",
    ),
    # "swish" is another name of it.
    "act_fn": (lambda value: value in ("silu", "swish"), "'silu'"),
    "sample_size": (
        lambda value: _is_count(value) or _all(value, _is_count),
        "a whole number above 0, or height and width",
    ),
    "scaling_factor": (lambda value: _is_number(value) and value > 0, "above 0"),
    "shift_factor": (
        lambda value: value is None or _is_number(value),
        "null or a number",
    ),
    "latents_mean": (lambda value: value is None or _all(value, _is_number), _NUMBERS),
    "latents_std": (
        lambda value: value is None or _all(value, lambda x: _is_number(x) and x > 0),
        f"{_NUMBERS}, above 0",
    ),
}


def _wrong_shape(values: Mapping[str, Any]) -> list[str]:
    """Lists the widths, blocks and scales that our network cannot have."""
    widths, latent, wrong = values["block_out_channels"], values["latent_channels"], []
    if any(width % widths[0] for width in widths):
        wrong.append(f"block_out_channels {list(widths)}, not multiples of the first")
    for name, kinds in zip(
        ("down_block_types", "up_block_types"),
        zip(PLAIN, ATTENTION, strict=True),
        strict=True,
    ):
        given = values[name]
        if len(given) != len(widths) or not set(given) <= set(kinds):
            wrong.append(f"{name} {list(given)}, not one of {kinds} a level")
    down, up = (
        [kind in ATTENTION for kind in values[name]]
        for name in ("down_block_types", "up_block_types")
    )
    if down != up[::-1]:
        wrong.append("up_block_types with attention elsewhere than down_block_types")
    for name, other in (
        ("out_channels", "in_channels"),
        ("use_post_quant_conv", "use_quant_conv"),
    ):
        if values[name] != values[other]:
            wrong.append(f"{name} {values[name]!r}, not {other} {values[other]!r}")
    wrong += [
        f"{name} of {len(values[name])} numbers, not {latent}"
        for name in ("latents_mean", "latents_std")
        if values[name] is not None and len(values[name]) != latent
    ]
    if values["latents_mean"] and values["shift_factor"]:
        wrong.append("both latents_mean and shift_factor")
    return wrong
