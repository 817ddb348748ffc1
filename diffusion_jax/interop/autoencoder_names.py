"""Converts the autoencoder's weights to the names of other libraries, and back.

Two tables say where others have each of our tensors, and how they lay it out:

  diffusers_names    the state of diffusers' AutoencoderKL
  compvis_names      that of CompVis' own, as in stable-diffusion and latent-diffusion

They are those of the U-Net (`unet_names`), below "encoder" and "decoder". The first
counts the levels of the decoder from the lowest resolution, the second from full
resolution as we do; it has products as convolutions of one pixel.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.interop import unet_names
from diffusion_jax.interop.renaming import Names, Place
from diffusion_jax.nets import fresh
from diffusion_jax.nets.autoencoder import AutoencoderKL, factor
from diffusion_jax.storage import trees

HALVES = ("encoder", "decoder")
STAGE = "first_stage_model."
"""What the names begin with in the file of a whole latent diffusion model."""
_LEAVES = {"W": "weight", "gamma": "weight", "b": "bias", "beta": "bias"}


def shapes(net: AutoencoderKL) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a network, by our own names.

    >>> found = shapes(AutoencoderKL())
    >>> len(found), found["decoder/up1_block0/shortcut/kernel"]
    (248, (512, 256))
    """
    side = factor(net)
    x = jax.ShapeDtypeStruct((1, side, side, net.image_channels), jnp.float32)
    made = trees.by_path(fresh.shapes(net, x))
    return {name: leaf.shape for name, leaf in made.items()}


def diffusers_names(own: Mapping[str, tuple[int, ...]], levels: int) -> Names:
    """Returns where the state of diffusers' AutoencoderKL has each tensor.

    Args:
      own: shapes by our names, as `shapes` returns them.
      levels: of the network.

    >>> own = {"decoder/up1_block0/shortcut/kernel": (512, 256)}
    >>> diffusers_names(own, 4)["decoder/up1_block0/shortcut/kernel"].name
    'decoder.up_blocks.2.resnets.0.conv_shortcut.weight'
    """
    names = {}
    for name, shape in own.items():
        half, rest = name.split("/", 1)
        if half in HALVES:
            place = unet_names.diffusers_names({rest: shape}, levels)[rest]
            names[name] = place._replace(name=f"{half}.{place.name}")
        else:
            names[name] = _quant(half, rest)
    return names


def compvis_names(own: Mapping[str, tuple[int, ...]]) -> Names:
    """Returns where CompVis' autoencoder has each tensor.

    >>> own = {"encoder/middle_attention/query/kernel": (512, 512)}
    >>> compvis_names(own)["encoder/middle_attention/query/kernel"]
    Place(name='encoder.mid.attn_1.q.weight', axes=(1, 0), ones=2)
    """
    names = {}
    for name, shape in own.items():
        half, rest = name.split("/", 1)
        if half not in HALVES:
            names[name] = _quant(half, rest)
            continue
        official = unet_names.official_names([rest], average=False)[rest].name
        module, leaf = official.removeprefix("model/").rsplit("/", 1)
        if not module.startswith("mid/"):
            module = re.sub(r"\b(down|up|block|attn)_(\d+)", r"\1.\2", module)
        theirs = f"{half}.{module.replace('/', '.')}.{_LEAVES[leaf]}"
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape))
        names[name] = Place(theirs, axes, 2 if len(shape) == 2 else 0)
    return names


def of_compvis(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of the autoencoder in a file of CompVis.

    That is one of an autoencoder, whose losses are left out, or of a whole latent
    diffusion model.

    Args:
      found: all tensors of the file, by name.

    >>> of_compvis({"first_stage_model.quant_conv.bias": 0, "model.x": 1})
    {'quant_conv.bias': 0}
    """
    inside = {n.removeprefix(STAGE): x for n, x in found.items() if n.startswith(STAGE)}
    return {n: x for n, x in (inside or found).items() if not n.startswith("loss.")}


def architecture(found: Mapping[str, tuple[int, ...]], *, where: str) -> AutoencoderKL:
    """Returns the network that tensors of CompVis, which name no configuration, are of.

    Args:
      found: shapes of `of_compvis`'s tensors.
      where: the file, for the error.

    Raises:
      ValueError: they are of no autoencoder.

    >>> net = AutoencoderKL(32, (1, 2), blocks=1, latent=3, attention=(1,))
    >>> own = shapes(net)
    >>> theirs = {
    ...     place.name: (own[name][-1], *own[name][:-1]) if place.axes else own[name]
    ...     for name, place in compvis_names(own).items()}
    >>> architecture(theirs, where="a file").multipliers
    (1, 2)
    """
    first, last = "encoder.conv_in.weight", "decoder.conv_in.weight"
    widths = _widths(found)
    if first not in found or last not in found or not widths:
        raise ValueError(
            f"{where} must hold an autoencoder under CompVis' names, such as {first}; "
            f"got {len(found)} tensors that are none. Give the file as it was released."
        )
    channels, latent = found[first][0], found[last][1]
    there = set(found)
    return AutoencoderKL(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=_count(there, "encoder.down.0.block.{}.conv1.weight"),
        latent=latent,
        attention=tuple(
            i
            for i in range(len(widths))
            if f"encoder.down.{i}.attn.0.q.weight" in there
        ),
        middle_attention="encoder.mid.attn_1.q.weight" in there,
        quant="quant_conv.weight" in there,
        image_channels=found[first][1],
        noise=found.get("encoder.conv_out.weight", (0,))[0] != latent,
    )


def _widths(found: Mapping[str, tuple[int, ...]]) -> list[int]:
    name = "encoder.down.{}.block.0.conv1.weight"
    return [found[name.format(i)][0] for i in range(_count(found, name))]


def _count(there: Iterable[str], name: str) -> int:
    """Returns how many of the names with 0, 1, ... there are."""
    names, i = set(there), 0
    while name.format(i) in names:
        i += 1
    return i


def _quant(module: str, leaf: str) -> Place:
    """Returns the place of a product next to the latents, called alike by all."""
    if leaf == "bias":
        return Place(f"{module}.bias")
    return Place(f"{module}.weight", (1, 0), 2)
