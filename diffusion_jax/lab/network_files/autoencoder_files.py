"""Reads and writes autoencoders of others: diffusers' folders, CompVis' files."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import ConfigError
from diffusion_jax.interop import (
    autoencoder_config,
    autoencoder_names,
    renaming,
    unet_names,
)
from diffusion_jax.lab.network_files import diffusers_folder, model_card, records
from diffusion_jax.lab.network_files.diffusers_config import of_autoencoder
from diffusion_jax.lab.network_files.diffusers_folder import RECORD, TENSORS
from diffusion_jax.lab.network_files.records import About, Described, Network
from diffusion_jax.lab.schema import checks, json_fields
from diffusion_jax.lab.schema.autoencoder import Autoencoder
from diffusion_jax.lab.schema.config import UNKNOWN, Config, Data
from diffusion_jax.lab.wiring import autoencoders
from diffusion_jax.lab.wiring.latent_space import LatentSpace
from diffusion_jax.latents import Scale
from diffusion_jax.nets.autoencoder import AutoencoderKL, rescaled
from diffusion_jax.storage import tensor_files, trees

CONFIG, WEIGHTS = "config.json", f"{TENSORS}.safetensors"
SIDE = 256
"""Pixels a side that a file of CompVis is taken to be for: that of its experiments."""


def is_folder(path: Path) -> bool:
    """Returns whether a folder is an autoencoder of diffusers, good or bad."""
    try:
        found = json_fields.load(path / CONFIG)
    except (OSError, ValueError, TypeError):
        return False
    return isinstance(found, dict) and (
        found.get("_class_name") == autoencoder_config.CLASS
    )


def is_compvis(path: Path) -> bool:
    """Returns whether a safetensors file has an autoencoder under CompVis' names."""
    there = autoencoder_names.of_compvis(tensor_files.read_shapes(path))
    return "encoder.down.0.block.0.conv1.weight" in there


def describe(path: Path) -> Described:
    """Returns what is known of a folder of diffusers' AutoencoderKL."""
    given = diffusers_folder.read_json(path / CONFIG)
    found = autoencoder_config.read_config(given, where=str(path / CONFIG))
    name = records.plain_name(path.resolve().name)
    config = _config(found.net, name, found.image_size, str(path))
    about = About("released", None, f"the diffusers folder {name}", {}, recipe=False)
    note = (
        f"scaling_factor {_factor(path)} is left behind: latent diffusion finds its own"
    )
    record = path / RECORD
    if record.is_file():
        text = json.dumps(diffusers_folder.read_json(record))
        ours, known = records.read(text, record)
        # Our record says more, and counts while it agrees with the folder; of a vae
        # that lacks the width of the decoder.
        with contextlib.suppress(ValueError):
            if ours.autoencoder.kind == "kl" and of_autoencoder(ours) == given:
                return Described(dataclasses.replace(ours, name=name), known)
    return Described(config, about, (note,))


def compvis_config(path: Path) -> Config:
    """Returns the configuration of a file of CompVis, which itself has none.

    All but the groups, 32 in all of theirs, is read off the shapes of its tensors.

    Raises:
      ValueError: it holds no autoencoder that fits.
    """
    found = autoencoder_names.of_compvis(tensor_files.read_shapes(path))
    net = autoencoder_names.architecture(found, where=str(path))
    return _config(net, records.plain_name(path.stem), SIDE, str(path))


def read(path: Path, config: Config, *, progress: bool = False) -> tuple[Any, str]:
    """Returns the parameters in a folder of diffusers, and the SHA-256 of their file.

    Raises:
      ValueError: the file is missing or damaged, or does not hold the tensors that the
        configuration asks for; all that is wrong with them is listed.
    """
    file = diffusers_folder.tensors_of(path)
    stored = tensor_files.read(file, progress=progress)
    tensors = unet_names.renamed(stored.arrays)
    return _params(config, "diffusers", tensors, file), stored.sha256


def read_compvis(
    path: Path, config: Config, *, progress: bool = False
) -> tuple[Any, str]:
    """Returns the parameters in a file of CompVis, and its SHA-256, as `read`."""
    stored = tensor_files.read(path, progress=progress)
    tensors = autoencoder_names.of_compvis(stored.arrays)
    return _params(config, "compvis", tensors, path), stored.sha256


def write(path: Path, network: Network) -> str:
    """Writes a folder that diffusers opens as an AutoencoderKL; returns its SHA-256.

    Whole or not at all, as `diffusers_folder.write`. Of a vae the width of its decoder,
    which diffusers has no place for, is left behind.

    Raises:
      ConfigError: diffusers has no such network, or the folder holds more than this
        writes.
      OSError: the folder cannot be written.
    """
    config, arrays = of_params(network.config, network.params)
    files = {CONFIG: config, RECORD: records.write(network)}

    def card(digest: str) -> str:
        count = sum(array.size for array in arrays.values())
        return model_card.write_autoencoder(
            network.config, network.about, path.name, digest, count
        )

    return diffusers_folder.write_whole(path, files, {WEIGHTS: arrays}, card)


def of_params(config: Config, params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns an autoencoder in diffusers' words: its configuration, its tensors."""
    return of_autoencoder(config), unet_names.to_tensors(params["net"], _names(config))


def of_space(
    config: Config, space: LatentSpace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the autoencoder of latents as `of_params`, with their scale in it.

    That is multiplied into the weights, so that the factor of LDMPipeline is 1.

    Raises:
      ValueError: diffusers has no such autoencoder, or it has no place for the scale.
    """
    written = of_autoencoder(config)
    net = rescaled(space.params["net"], *space.scale)
    return written, of_params(config, {"net": net})[1]


def read_space(path: Path, config: Config) -> LatentSpace:
    """Returns the autoencoder beside a U-Net of diffusers, as LDMPipeline takes it.

    Args:
      path: its folder.
      config: of the network that learns its latents.
    """
    scale = np.full(config.autoencoder.latent, _factor(path), np.float32)
    # The pipeline knows no shift.
    return LatentSpace(read(path, config)[0], Scale(0 * scale, scale))


def _config(net: AutoencoderKL, name: str, side: int, where: str) -> Config:
    if net.image_channels not in (1, 3):
        raise ConfigError(
            f"{where} must be of grey or RGB images; got {net.image_channels} channels."
            " Others do not fit."
        )
    given = {field: getattr(net, field) for field in autoencoders.ALIKE}
    config = Config(
        name=name,
        data=Data(UNKNOWN, image_size=side, channels=net.image_channels),
        autoencoder=Autoencoder(kind="kl" if net.noise else "ae", **given),
    )
    checks.validate(config)
    return config


def _factor(path: Path) -> float:
    said = diffusers_folder.read_json(path / CONFIG)
    return float(said.get("scaling_factor", 0.18215))


def _names(config: Config, table: str = "diffusers") -> renaming.Names:
    own = _shapes(config)
    if table == "compvis":
        return autoencoder_names.compvis_names(own)
    levels = len(config.autoencoder.multipliers)
    return autoencoder_names.diffusers_names(own, levels)


def _params(config: Config, table: str, found: Mapping[str, Any], path: Path) -> Any:
    own, names = _shapes(config), _names(config, table)
    return {"net": unet_names.from_tensors(found, names, own, where=str(path))}


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    made = trees.by_path(autoencoders.shapes(config))
    return {name: leaf.shape for name, leaf in made.items()}
