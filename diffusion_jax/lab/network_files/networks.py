"""Reads and writes trained networks: weights, and all that has to be known of them.

Read are

  diffusion_jax   our .safetensors, with the configuration inside
  diffusers       a folder of a UNet2DModel, or of a pipeline with one: DDPMPipeline,
                  or LDMPipeline with an AutoencoderKL beside it
  official        a TensorFlow checkpoint of the authors, which names no configuration
  autoencoder     a folder of diffusers' AutoencoderKL
  compvis         an autoencoder in a .safetensors file of CompVis, the same

by their content, and the first two and the autoencoder's folder are written. Nothing in
a file is ever executed.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from diffusion_jax.errors import ConfigError, DataError
from diffusion_jax.interop import unet_names
from diffusion_jax.lab.network_files import (
    autoencoder_files,
    diffusers_folder,
    records,
)
from diffusion_jax.lab.network_files.records import About, Described, Network
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import (
    UNKNOWN,
    Config,
    Data,
    Diffusion,
    Net,
    official,
)
from diffusion_jax.lab.wiring import build, latent_space
from diffusion_jax.storage import tensor_files, tensorflow_checkpoint, trees

FORMAT = "diffusion_jax.network"
_SPACE = "autoencoder"
"""Of latents, in a file of ours."""


_SMALL, _WIDE = Diffusion(variance="small"), (1, 1, 2, 2, 4, 4)
_LARGE = Net(channels=192, multipliers=_WIDE, dropout=0.0)
_OFFICIAL = {
    name: official(
        Config(data=Data(UNKNOWN, image_size=side, channels=3), diffusion=d, net=net)
    )
    for name, side, d, net in (
        ("cifar10", 32, Diffusion(), Net()),
        ("celebahq256", 256, _SMALL, dataclasses.replace(_LARGE, channels=128)),
        ("lsun_bedroom256_large", 256, _SMALL, _LARGE),
    )
}
"""One of each shape."""


_READERS = {
    "diffusers": diffusers_folder.read,
    "autoencoder": autoencoder_files.read,
    "compvis": autoencoder_files.read_compvis,
}


class Found(NamedTuple):
    """A network in a file or folder, before its weights are read."""

    path: Path
    kind: str
    """diffusion_jax, diffusers, official, autoencoder or compvis."""


def find(path: str | os.PathLike[str]) -> Found | None:
    """Returns the network at a path; None where there is nothing or no network.

    Raises:
      ValueError: a file that should hold one, and is damaged or of another kind.
    """
    path = Path(path)
    if path.name == "unet" and (path.parent / "model_index.json").is_file():
        path = path.parent  # the scheduler belongs to it
    if path.is_dir():
        if autoencoder_files.is_folder(path):
            return Found(path, "autoencoder")
        return Found(path, "diffusers") if diffusers_folder.is_one(path) else None
    if path.exists() and not path.is_file():
        return None
    try:
        kind = tensor_files.kind_of(path)
    except DataError:
        if not path.exists():
            return None
        raise
    if kind == "tensorflow":
        return Found(path, "official")
    if kind != "safetensors":
        said = {"pickle": "a pickle, which is a program and was not run"}
        raise ConfigError(
            f"{path} must be a network: .safetensors, a folder of diffusers, or a "
            f"TensorFlow checkpoint; got {said.get(kind, f'{kind} content')}. Give the "
            "file or folder as it was released."
        )
    if FORMAT not in tensor_files.read_meta(path):
        if autoencoder_files.is_compvis(path):
            return Found(path, "compvis")
        raise ConfigError(
            f"{path} must have a configuration inside; got tensors alone. Give the "
            "folder that it belongs to, with its config.json."
        )
    return Found(path, "diffusion_jax")


def read_config(found: Found) -> Config:
    """Returns the configuration of a network, without reading its weights.

    Raises:
      ValueError: there is none, or it has what we do not support.
    """
    if found.kind == "official":
        return _official(found.path, tensorflow_checkpoint.shapes(found.path))
    return _describe(found).config


def read(found: Found, *, average: bool = True, progress: bool = False) -> Network:
    """Returns the network in a file or folder, every tensor checked.

    Of a checkpoint of the authors `average` takes the moving average, and not the last
    weights.

    Raises:
      ValueError: the file is damaged, or does not hold the tensors that the
        configuration asks for; all that is wrong with them is listed.
    """
    if found.kind == "official":
        return read_official(found.path, average=average, progress=progress)
    config, about, notes = _describe(found)
    for note in notes:
        print(f"note: {note}")
    if found.kind in _READERS:
        params, digest = _READERS[found.kind](found.path, config, progress=progress)
        space = None
        if latents.is_latent(config):
            beside = found.path / diffusers_folder.VAE
            space = autoencoder_files.read_space(beside, config)
        return Network(config, params, about, digest, space)
    stored = tensor_files.read(found.path, progress=progress)
    arrays = {name: unet_names.exact(x) for name, x in stored.arrays.items()}
    like = build.param_shapes(config)
    if latents.is_latent(config):
        # A folder of diffusers, which this may come from, does not know it.
        decoder = f"{_SPACE}.beside.log_variance" in arrays
        like[_SPACE] = latent_space.shapes(config, decoder=decoder)
    wanted = trees.by_path(like, ".")
    unet_names.check_fits(arrays, wanted, str(found.path))
    params = jax.tree.unflatten(jax.tree.structure(like), [arrays[n] for n in wanted])
    beside = params.pop(_SPACE, None)
    space = None if beside is None else latent_space.of_tree(beside)
    return Network(config, params, about, stored.sha256, space)


def read_official(
    path: str | os.PathLike[str],
    config: Config | None = None,
    *,
    average: bool = True,
    progress: bool = False,
) -> Network:
    """Returns the network in a checkpoint of the authors.

    The path is such as model.ckpt-790000. The configuration is that of the experiment;
    when not given, one of the same network and diffusion, with data that nobody named.
    `average` is as of `read`.

    Raises:
      ValueError: TensorFlow is missing, or the tensors are of another network.
    """
    stored = tensor_files.read(path, progress=progress)
    shapes = {name: array.shape for name, array in stored.arrays.items()}
    config = _official(Path(path), shapes) if config is None else official(config)
    own = diffusers_folder.shapes(config)
    params = unet_names.from_tensors(
        stored.arrays,
        unet_names.official_names(own, average=average),
        own,
        where=str(path),
        ignore=unet_names.official_others(own),
    )
    words, at = "averaged" if average else "last", stored.arrays.get("global_step")
    origin = f"the TensorFlow checkpoint {Path(path).name}"
    about = About(words, None if at is None else int(at), origin, {}, recipe=False)
    return Network(config, {"net": params}, about, stored.sha256)


def write_folder(path: Path, network: Network) -> str:
    """Writes a folder for diffusers; returns the SHA-256 of its file of weights."""
    if latents.is_autoencoder(network.config):
        return autoencoder_files.write(path, network)
    vae = None
    if network.space is not None:
        vae = autoencoder_files.of_space(network.config, network.space)
    return diffusers_folder.write(path, network, vae)


def write_file(path: Path, network: Network) -> str:
    """Writes a network to a .safetensors file; returns its SHA-256."""
    record = json.dumps(records.write(network), sort_keys=True)
    tree = network.params
    if network.space is not None:
        tree = {**tree, _SPACE: latent_space.to_tree(network.space)}
    return trees.write(path, tree, {FORMAT: record})


def _describe(found: Found) -> Described:
    path = found.path
    if found.kind == "diffusers":
        beside = path / diffusers_folder.VAE
        there = (beside / autoencoder_files.CONFIG).is_file()
        of = autoencoder_files.describe(beside).config if there else None
        return diffusers_folder.describe(path, of)
    if found.kind == "autoencoder":
        return autoencoder_files.describe(path)
    if found.kind == "compvis":
        config = autoencoder_files.compvis_config(path)
        origin = f"the file {path.name} of CompVis"
        return Described(config, About("released", None, origin, {}, recipe=False))
    config, about = records.read(tensor_files.read_meta(path)[FORMAT], path)
    name = records.plain_name(path.stem)
    return Described(dataclasses.replace(config, name=name), about)


def _official(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """Returns the configuration of a checkpoint with tensors of these shapes."""
    for config in _OFFICIAL.values():
        own = diffusers_folder.shapes(config)
        names = unet_names.official_names(own, average=False)
        if all(shapes.get(names[key].name) == own[key] for key in own):
            return dataclasses.replace(config, name=records.plain_name(path.name))
    raise ConfigError(
        f"{path} must hold a network of the authors', those of {', '.join(_OFFICIAL)}; "
        f"got {len(shapes)} tensors that are none. Name the experiment that it was "
        "trained in: --experiment NAME of experiments.convert."
    )
