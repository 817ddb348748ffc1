"""Reads and writes folders of diffusers: a UNet2DModel and its scheduler.

With an autoencoder beside them, whose latents the U-Net learns, it is that of an
LDMPipeline; `autoencoder_files` has that part.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusion_jax.errors import ConfigError, first_of
from diffusion_jax.interop import unet_names
from diffusion_jax.lab.network_files import diffusers_config, model_card, records
from diffusion_jax.lab.network_files.records import About, Described, Network
from diffusion_jax.lab.schema import json_fields, latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import build
from diffusion_jax.storage import tensor_files, trees

RECORD = "diffusion_jax.json"
"""What a folder for diffusers holds beside: what it has no words for."""
TENSORS = "diffusion_pytorch_model"

# What such a folder holds.
_JSON = (
    "model_index.json",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    RECORD,
)
WEIGHTS, _CARD = f"unet/{TENSORS}.safetensors", "README.md"
_OF_AUTOENCODER = ("config.json", f"{TENSORS}.safetensors")
VAE = "vqvae"
"""The folder of the autoencoder in one of an LDMPipeline."""


def describe(path: Path, of: Config | None = None) -> Described:
    """Returns what is known of a folder for diffusers.

    Args:
      path: the folder.
      of: the configuration of the autoencoder in it.
    """
    unet = read_json(_first(path, "unet/config.json", "config.json"))
    there = [*path.glob("scheduler/scheduler_config.json")]
    there += path.glob("scheduler_config.json")
    scheduler = read_json(there[0]) if there else None
    name = records.plain_name(path.resolve().name)
    where = str(path)
    config = diffusers_config.from_diffusers(
        unet, scheduler, name=name, where=where, of=of
    )
    # An EMA of diffusers' own training has its number of updates.
    step = unet.get("optimization_step", -1)
    step = step if json_fields.is_whole(step) and step >= 0 else None
    words = "released" if step is None else "averaged"
    about = About(words, step, f"the diffusers folder {name}", {}, recipe=False)
    notes = diffusers_config.notes(unet, scheduler)
    record = path / RECORD
    if not record.is_file():
        return Described(config, about, notes)
    # Written again as text: it is read as a file that others may have changed.
    ours, known = records.read(json.dumps(read_json(record)), record)
    # Our record says more, and counts while it agrees with the folder.
    with contextlib.suppress(ConfigError):
        alike = diffusers_config.to_diffusers(ours) == (unet, scheduler)
        if of is not None:
            written = map(diffusers_config.of_autoencoder, (ours, of))
            alike = alike and next(written) == next(written)
        if alike and latents.is_latent(ours) == (of is not None):
            return Described(dataclasses.replace(ours, name=name), known)
    note = f"{record} is no more what the folder is: read without it"
    return Described(config, about, (note, *notes))


def opener(config: Config) -> str:
    """Returns the class of diffusers that opens what is written of a network."""
    if latents.is_autoencoder(config):
        return "AutoencoderKL"
    return "LDMPipeline" if latents.is_latent(config) else "DDPMPipeline"


def read(path: Path, config: Config, *, progress: bool = False) -> tuple[Any, str]:
    """Returns the parameters in a folder, and the SHA-256 of their file.

    Raises:
      ValueError: the file is missing or damaged, or does not hold the tensors that the
        configuration asks for; all that is wrong with them is listed.
    """
    file = tensors_of(path)
    stored = tensor_files.read(file, progress=progress)
    own = shapes(config)
    names = unet_names.diffusers_names(own, len(config.net.multipliers))
    tensors = unet_names.renamed(stored.arrays)
    params = unet_names.from_tensors(tensors, names, own, where=str(file))
    return {"net": params}, stored.sha256


def write(
    path: Path, network: Network, vae: tuple[dict[str, Any], Any] | None = None
) -> str:
    """Writes a folder that diffusers opens; returns the SHA-256 of the weights.

    It is made under a temporary name, then renamed, so that what has the name is whole.
    A folder that was there is replaced, and stays if anything fails.

    Args:
      path: the folder.
      network: what to write.
      vae: the configuration and the tensors of its autoencoder.

    Raises:
      ConfigError: diffusers has no such network, or the folder holds more than this
        writes.
      OSError: the folder cannot be written.
    """
    unet, scheduler = diffusers_config.to_diffusers(network.config)
    own = shapes(network.config)
    names = unet_names.diffusers_names(own, len(network.config.net.multipliers))
    arrays = unet_names.to_tensors(network.params["net"], names)
    index = {
        "_class_name": opener(network.config),
        "_diffusers_version": unet["_diffusers_version"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", unet["_class_name"]],
    }
    files = dict(
        zip(_JSON, (index, unet, scheduler, records.write(network)), strict=True)
    )
    weights = {WEIGHTS: arrays}
    if vae is not None:
        said, tensors = vae
        named, of_weights = (f"{VAE}/{name}" for name in _OF_AUTOENCODER)
        index[VAE] = ["diffusers", said["_class_name"]]
        files[named], weights[of_weights] = said, tensors

    def card(digest: str) -> str:
        count = sum(array.size for array in arrays.values())
        return model_card.write(network.config, network.about, path.name, digest, count)

    return write_whole(path, files, weights, card)


def write_whole(
    path: Path,
    files: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Any]],
    card: Callable[[str], str],
) -> str:
    """Writes a folder whole or not at all; returns the SHA-256 of the first weights.

    `files` are written as JSON and `weights` as tensors, by the names of the files;
    `card` makes of the first weights' digest the text of the model card.

    Raises:
      ConfigError: the folder holds more than is written by this.
      OSError: the folder cannot be written.
    """
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        partial, aside = Path(work, "new"), Path(work, "old")
        for name, value in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(json.dumps(value, indent=2) + "\n")
        # diffusers reads no file that does not say so.
        meta = {"format": "pt"}
        digest, *_ = (
            tensor_files.write_safetensors(partial / name, arrays, meta)
            for name, arrays in weights.items()
        )
        (partial / _CARD).write_text(card(digest))
        try:
            if path.is_dir():
                path.rename(aside)
            partial.rename(path)
        except BaseException:
            if aside.is_dir():
                aside.rename(path)
            raise
    return digest


def check_replaceable(path: Path) -> None:
    """Raises ConfigError where a folder may not be written, or not replaced."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(
            f"{path} must be a folder, or nothing yet; got a file or a link. Name "
            "another place."
        )
    there = {str(f.relative_to(path)) for f in path.rglob("*") if not f.is_dir()}
    inside = (f"{VAE}/{name}" for name in _OF_AUTOENCODER)
    others = sorted(there - {*_JSON, WEIGHTS, _CARD, *_OF_AUTOENCODER, *inside})
    if others:
        raise ConfigError(
            f"{path} must hold only what this command wrote, to be replaced; got "
            f"{first_of(others)} too. Move them, or name another place."
        )


def is_one(path: Path) -> bool:
    """Returns whether a folder is one of diffusers, good or bad, rather than a run."""
    if (path / "unet" / "config.json").is_file():
        return True
    try:
        return "diffusion" not in json_fields.load(path / "config.json")
    except (OSError, ValueError, TypeError):
        return False


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of the network, by our own names."""
    made = trees.by_path(build.param_shapes(config)["net"])
    return {name: leaf.shape for name, leaf in made.items()}


def _first(path: Path, *names: str) -> Path:
    for file in (path / name for name in names):
        if file.is_file():
            return file
    raise ConfigError(
        f"{path} must hold one of {', '.join(names)}; got none of them. Give the whole "
        "folder as it was released."
    )


def tensors_of(path: Path) -> Path:
    """Returns the file of weights that belongs to a folder's config.json."""
    folder = _first(path, "unet/config.json", "config.json").parent
    try:
        return _first(folder, f"{TENSORS}.safetensors", f"{TENSORS}.bin")
    except ConfigError:
        there = ", ".join(sorted(file.name for file in folder.iterdir()))
        raise ConfigError(
            f"{folder} must hold the weights, {TENSORS}.safetensors; got {there}. "
            "Download that file too."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file of JSON; raises ConfigError for anything else."""
    try:
        values: Any = json_fields.load(path)
        if isinstance(values, dict):
            return values
        said: object = f"a {type(values).__name__}"
    except ValueError as error:
        said = error
    raise ConfigError(f"{path} must hold a JSON object; got {said}. Download it again.")
