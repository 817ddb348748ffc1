"""Converts the U-Net's weights to the names of other libraries, and back.

Two tables say where others have each of our tensors, and how they lay it out:

  official_names     the variables of the authors' TensorFlow checkpoints
  diffusers_names    the state of diffusers' UNet2DModel

See `renaming` for what they are.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diffusion_jax.interop import renaming
from diffusion_jax.interop.renaming import Names, Place
from diffusion_jax.nets import fresh
from diffusion_jax.nets.unet import UNet
from diffusion_jax.storage import trees

PyTree = Any

# Types that float32 holds exactly.
_TYPES = ("float16", "bfloat16")

# The inside of a block: by our name, the official one and that of diffusers.
_INNER = {
    "norm1": ("norm1", "norm1"),
    "conv1": ("conv1", "conv1"),
    "time": ("temb_proj", "time_emb_proj"),
    "norm2": ("norm2", "norm2"),
    "conv2": ("conv2", "conv2"),
    "shortcut": ("nin_shortcut", "conv_shortcut"),
    "norm": ("norm", "group_norm"),
    "query": ("q", "to_q"),
    "key": ("k", "to_k"),
    "value": ("v", "to_v"),
    "out": ("proj_out", "to_out.0"),
    "conv": ("conv", "conv"),
}
_OUTER = {
    "time1": ("temb/dense0", "time_embedding.linear_1"),
    "time2": ("temb/dense1", "time_embedding.linear_2"),
    "label": ("", "class_embedding"),
    "conv_in": ("conv_in", "conv_in"),
    "norm_out": ("norm_out", "conv_norm_out"),
    "conv_out": ("conv_out", "conv_out"),
}
# How diffusers called the parts of an attention before its version 0.18.
_BEFORE = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


def shapes(
    net: UNet, channels: int, *, image_size: int | tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a network, by our own names.

    Args:
      net: the network.
      channels: of its images.
      image_size: pixels a side, or height and width; which decides where there is
        attention.

    >>> from diffusion_jax.nets.unet import UNet
    >>> found = shapes(UNet(), 3, image_size=32)
    >>> len(found), found["down1_block0/shortcut/kernel"]
    (328, (128, 256))
    """
    sides = np.broadcast_to(image_size, 2).tolist()
    x = jax.ShapeDtypeStruct((1, *sides, channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32) if net.num_classes else None
    made = trees.by_path(fresh.shapes(net, x, t, label))
    return {name: leaf.shape for name, leaf in made.items()}


def official_names(own: Iterable[str], *, average: bool = True) -> Names:
    """Returns where the authors' checkpoints have each tensor.

    Args:
      own: our names, such as those of `shapes`.
      average: whether those of the moving average, or of the last weights.

    Raises:
      ValueError: a network with labels, which the authors have none of.

    >>> official_names(["middle_attention/query/bias"])["middle_attention/query/bias"]
    Place(name='model/mid/attn_1/q/b/ExponentialMovingAverage', axes=None, ones=0)
    """
    end = "/ExponentialMovingAverage" if average else ""
    names = {}
    for name in own:
        module, leaf = name.rsplit("/", 1)
        if module == "label":
            raise ValueError(
                "a network of the authors' must have no labels; got num_classes above "
                "0. Convert it to another format."
            )
        norm = "norm" in module.rsplit("/", 1)[-1]
        theirs = {
            "kernel": "W",
            "scale": "gamma",
            "bias": "beta" if norm else "b",
        }[leaf]
        names[name] = Place(f"model/{_official_module(module)}/{theirs}{end}")
    return names


def official_others(own: Iterable[str]) -> Callable[[str], bool]:
    """Returns what tells whether a variable is of training and not of the network.

    Those are the step, the powers of Adam's decays, and what is kept beside each
    variable: its moving average and Adam's moments.

    >>> is_other = official_others(["conv_in/kernel"])
    >>> is_other("model/conv_in/W/Adam_1"), is_other("model/conv_in/V")
    (True, False)
    """
    last = {place.name for place in official_names(own, average=False).values()}
    alone = {"global_step", "beta1_power", "beta2_power"}

    def is_other(name: str) -> bool:
        return name in alone or name in last or name.rpartition("/")[0] in last

    return is_other


def diffusers_names(own: Mapping[str, tuple[int, ...]], levels: int) -> Names:
    """Returns where the state of diffusers' UNet2DModel has each tensor.

    Args:
      own: shapes by our names, as `shapes` returns them.
      levels: of the network; diffusers counts those on the way up from the bottom.

    >>> own = {"up0_block1/shortcut/kernel": (384, 128)}
    >>> diffusers_names(own, levels=4)["up0_block1/shortcut/kernel"]
    Place(name='up_blocks.3.resnets.1.conv_shortcut.weight', axes=(1, 0), ones=2)
    """
    names = {}
    for name, shape in own.items():
        module, leaf = name.rsplit("/", 1)
        theirs = _diffusers_module(module, levels)
        if leaf != "kernel":
            bias = "bias" if leaf == "bias" else "weight"
            names[name] = Place(f"{theirs}.{bias}")
        elif len(shape) == 4:
            names[name] = Place(f"{theirs}.weight", (3, 2, 0, 1))
        else:
            ones = 2 if module.endswith("/shortcut") else 0
            names[name] = Place(f"{theirs}.weight", (1, 0), ones)
    return names


def renamed(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state of a UNet2DModel with the names that it has today.

    Released networks are older than the names of their attentions.

    >>> renamed({"mid_block.attentions.0.proj_attn.bias": 0})
    {'mid_block.attentions.0.to_out.0.bias': 0}
    """
    old = re.compile(rf"(.*\.attentions\.\d+)\.({'|'.join(_BEFORE)})\.(weight|bias)")

    def today(name: str) -> str:
        match = old.fullmatch(name)
        return f"{match[1]}.{_BEFORE[match[2]]}.{match[3]}" if match else name

    return {today(name): tensor for name, tensor in found.items()}


def to_tensors(params: PyTree, names: Names) -> dict[str, np.ndarray]:
    """Returns the parameters of a network as someone else has them, float32.

    Args:
      params: as `UNet.init` makes them.
      names: from one of the tables.
    """
    return renaming.to_others(trees.by_path(params), names)


def from_tensors(
    found: Mapping[str, Any],
    names: Names,
    own: Mapping[str, tuple[int, ...]],
    *,
    where: str,
    ignore: Callable[[str], bool] = lambda name: False,
) -> PyTree:
    """Returns the parameters of a network from what someone else has.

    Args:
      found: tensors by name; of float32, float16 or bfloat16.
      names: from one of the tables.
      own: shapes by our names.
      where: the file, for the error.
      ignore: which names may be there without belonging to the network.

    Returns:
      What `UNet.apply` takes, float32.

    Raises:
      ValueError: tensors that are missing, unknown, of another shape or type, or not
        finite; all of them at once.
    """
    wanted = renaming.wanted(names, own)
    given = {n: exact(x) for n, x in found.items() if n in wanted or not ignore(n)}
    check_fits(given, wanted, where)
    return traverse_util.unflatten_dict(renaming.from_others(given, names), sep="/")


def exact(tensor: Any) -> np.ndarray:
    """Returns a tensor as float32 where that holds all that its type does."""
    array = np.asarray(tensor)
    return array.astype(np.float32) if array.dtype.name in _TYPES else array


def check_fits(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where tensors are not those of a network, and says which."""
    if wrong := trees.misfits(found, wanted):
        lines = ";\n  ".join(wrong)
        raise ValueError(
            f"{where} must hold the {len(wanted)} tensors of this network, and no "
            f"others; got {len(wrong)} that do not fit:\n  {lines}. Give "
            "the file that belongs to the configuration."
        )


def _official_module(module: str) -> str:
    """Returns the authors' name of a module.

    >>> _official_module("up1_block2_attention/out")
    'up_1/attn_2/proj_out'
    """
    if module in _OUTER:
        return _OUTER[module][0]
    block, part = module.split("/")
    inner = _INNER[part][0]
    way, level, kind, number, attention = _parse(block)
    if way == "middle":
        place = "attn_1" if kind == "attention" else f"block_{number + 1}"
        return f"mid/{place}/{inner}"
    if kind in ("downsample", "upsample"):
        return f"{way}_{level}/{kind}/{inner}"
    return f"{way}_{level}/{'attn' if attention else 'block'}_{number}/{inner}"


def _diffusers_module(module: str, levels: int) -> str:
    """Returns diffusers' name of a module.

    >>> _diffusers_module("up1_block2_attention/out", 4)
    'up_blocks.2.attentions.2.to_out.0'
    """
    if module in _OUTER:
        return _OUTER[module][1]
    block, part = module.split("/")
    inner = _INNER[part][1]
    way, level, kind, number, attention = _parse(block)
    if way == "middle":
        place = "attentions.0" if kind == "attention" else f"resnets.{number}"
        return f"mid_block.{place}.{inner}"
    place = f"{way}_blocks.{level if way == 'down' else levels - 1 - level}"
    if kind in ("downsample", "upsample"):
        return f"{place}.{kind}rs.0.{inner}"
    return f"{place}.{'attentions' if attention else 'resnets'}.{number}.{inner}"


def _parse(block: str) -> tuple[str, int, str, int, bool]:
    """Returns way, level, kind, number and whether it is an attention.

    >>> _parse("down1_block0_attention"), _parse("middle_block1")
    (('down', 1, 'block', 0, True), ('middle', 0, 'block', 1, False))
    """
    match = re.fullmatch(
        r"(down|middle|up)(\d*)_(block|attention|downsample|upsample)(\d*)(_attention)?",
        block,
    )
    assert match, block
    way, level, kind, number, attention = match.groups()
    return way, int(level or 0), kind, int(number or 0), bool(attention)
