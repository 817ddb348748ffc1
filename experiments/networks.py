"""Trained networks in files: weights, and all that has to be known of them.

Read are

  diffusion_jax   our .safetensors, with the configuration inside
  diffusers       a folder of a UNet2DModel, or of a pipeline with one
  official        a TensorFlow checkpoint of the authors, which names no configuration

by their content, and the first two are written. Nothing in a file is ever executed.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.nets import tensor_files, weights
from diffusion_jax.training.formats import DataError
from experiments import build, card, interchange, validation
from experiments.config import Config, ConfigError, from_dict, to_dict

PyTree = Any

FORMAT = "diffusion_jax.network"
VERSION = 1
RECORD = "diffusion_jax.json"
"""What a folder for diffusers holds beside: what it has no words for."""
TENSORS = "diffusion_pytorch_model"


class About(NamedTuple):
    """What has to be known of weights, beside the configuration."""

    weights: str
    """Which they are: "averaged", "last", "averaged (length 0.08)", "released"."""
    step: int | None
    """Updates that made them, where that is known."""
    origin: str
    """Where they came from, in words."""
    scores: dict[str, Any]
    """What was measured of them: "fid" and "nll", as the commands write them."""


class Network(NamedTuple):
    """A trained network."""

    config: Config
    params: PyTree
    """As `build.init_params` makes them, NumPy arrays."""
    about: About
    sha256: str
    """Of the file that the weights came from; of the weights where it is a run."""


class Found(NamedTuple):
    """A network in a file or folder, before its weights are read."""

    path: Path
    kind: str
    """diffusion_jax, diffusers or official."""


def find(path: str | os.PathLike[str]) -> Found | None:
    """Returns what network is at a path; None where there is nothing or no network.

    Raises:
      ValueError: a file that should hold one, and is damaged or of another kind.
    """
    path = Path(path)
    if path.name == "unet" and (path.parent / "model_index.json").is_file():
        path = path.parent  # the scheduler belongs to it
    if path.is_dir():
        return Found(path, "diffusers") if _is_diffusers(path) else None
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
    if found.kind == "diffusion_jax":
        return _record(found.path)[0]
    if found.kind == "diffusers":
        return _folder(found.path)[0]
    raise ConfigError(
        f"{found.path} must be a network with its configuration; got a TensorFlow "
        "checkpoint, which has none. Convert it first: python -m experiments.convert "
        f"{found.path} OUT.safetensors --experiment cifar10."
    )


def read(found: Found, *, progress: bool = False) -> Network:
    """Returns the network in a file or folder, every tensor checked.

    Raises:
      ValueError: the file is damaged, or does not hold the tensors that the
        configuration asks for; all that is wrong with them is listed.
    """
    config = read_config(found)
    if found.kind == "diffusers":
        _, about, note = _folder(found.path)
        if note:
            print(f"note: {note}")
        stored = tensor_files.read(_tensors_of(found.path), progress=progress)
        own = _shapes(config)
        names = weights.diffusers_names(own, len(config.net.multipliers))
        params = weights.from_tensors(
            weights.renamed(stored.arrays), names, own, where=str(found.path)
        )
        return Network(config, {"net": params}, about, stored.sha256)
    _, about = _record(found.path)
    stored = tensor_files.read(found.path, progress=progress)
    params = _own_params(config, stored.arrays, found.path)
    return Network(config, params, about, stored.sha256)


def read_official(
    path: str | os.PathLike[str],
    config: Config,
    *,
    average: bool = True,
    progress: bool = False,
) -> Network:
    """Returns the network in a checkpoint of the authors.

    Args:
      path: the checkpoint, such as model.ckpt-790000.
      config: of the experiment that it was trained in.
      average: whether to take the moving average, or the last weights.
      progress: whether to show a bar where there is a terminal.

    Raises:
      ValueError: TensorFlow is missing, or the tensors are of another network.
    """
    stored = tensor_files.read(path, progress=progress)
    own = _shapes(config)
    names = weights.official_names(own, average=average)
    ignore = weights.official_others(own)
    params = weights.from_tensors(
        stored.arrays, names, own, where=str(path), ignore=ignore
    )
    step = stored.arrays.get("global_step")
    about = About(
        "averaged" if average else "last",
        None if step is None else int(step),
        f"the TensorFlow checkpoint {Path(path).name}",
        {},
    )
    return Network(config, {"net": params}, about, stored.sha256)


def write_file(path: Path, network: Network) -> str:
    """Returns the SHA-256 of the .safetensors file that now holds a network."""
    flat = jax.tree_util.tree_leaves_with_path(network.params)
    arrays = {_name(key): np.asarray(leaf) for key, leaf in flat}
    return tensor_files.write_safetensors(
        path, arrays, {FORMAT: json.dumps(_describe(network), sort_keys=True)}
    )


def write_folder(path: Path, network: Network) -> str:
    """Returns the SHA-256 of the weights, in a folder that diffusers now opens.

    It is made under a temporary name, then renamed, so that what has the name is whole;
    a folder that was there is replaced.

    Raises:
      ConfigError: diffusers has no such network.
      OSError: the folder cannot be written.
    """
    unet, scheduler = interchange.to_diffusers(network.config)
    own = _shapes(network.config)
    names = weights.diffusers_names(own, len(network.config.net.multipliers))
    arrays = weights.to_tensors(network.params["net"], names)
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": unet["_diffusers_version"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", unet["_class_name"]],
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        files = {
            "model_index.json": index,
            "unet/config.json": unet,
            "scheduler/scheduler_config.json": scheduler,
            RECORD: _describe(network),
        }
        for name, values in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(json.dumps(values, indent=2) + "\n")
        # diffusers reads no file that does not say so.
        count = sum(array.size for array in arrays.values())
        tensors = partial / "unet" / f"{TENSORS}.safetensors"
        digest = tensor_files.write_safetensors(tensors, arrays, {"format": "pt"})
        text = card.write(network.config, network.about, path.name, digest, count)
        (partial / "README.md").write_text(text)
        if path.is_dir():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digest


def is_export(path: Path) -> bool:
    """Returns whether a folder is one that `write_folder` wrote."""
    return (path / RECORD).is_file()


def _is_diffusers(path: Path) -> bool:
    """Returns whether a folder is one of diffusers, good or bad, rather than a run."""
    if (path / "unet" / "config.json").is_file():
        return True
    try:
        return "diffusion" not in json.loads((path / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _describe(network: Network) -> dict[str, Any]:
    config = network.config
    # Where files are on this machine is nobody else's business.
    config = dataclasses.replace(
        config,
        name=Config.name,  # that of the file
        output=Config.output,
        init_from=None,
        data=dataclasses.replace(config.data, path=None),
    )
    return {
        "version": VERSION,
        "config": to_dict(config),
        "about": network.about._asdict(),
    }


def _parse(text: str, where: Path) -> tuple[Config, About]:
    """Returns what `_describe` made."""
    try:
        values = json.loads(text)
        if values["version"] != VERSION:
            raise ConfigError(f"version {values['version']}, not {VERSION}")
        # A field that is not there is younger than the file: what it has by default is
        # what networks did before.
        config: Config = from_dict(values["config"], partial=True)
        about = About(**values["about"])
        validation.validate(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{where} must describe a network of this project; got "
            f"{type(error).__name__}: {str(error).rstrip('.')}. Convert it again with "
            "this version."
        ) from error
    return config, about


def _record(path: Path) -> tuple[Config, About]:
    config, about = _parse(tensor_files.read_meta(path)[FORMAT], path)
    return dataclasses.replace(config, name=_plain(path.stem)), about


def _folder(path: Path) -> tuple[Config, About, str | None]:
    """Returns what is known of a folder for diffusers, and what is to be said of it."""
    unet = _json(_first(path, "unet/config.json", "config.json"))
    there = [
        path / name
        for name in ("scheduler/scheduler_config.json", "scheduler_config.json")
        if (path / name).is_file()
    ]
    scheduler = _json(there[0]) if there else None
    name = _plain(path.resolve().name)
    config = interchange.from_diffusers(unet, scheduler, name=name, where=str(path))
    # Averages of diffusers' own training say how many updates they have seen.
    step = unet.get("optimization_step")
    words = "released" if step is None else "averaged"
    about = About(words, step, f"the diffusers folder {name}", {})
    record = path / RECORD
    if record.is_file():
        ours, known = _parse(record.read_text(), record)
        # Ours says more, as long as it says the same.
        if interchange.to_diffusers(ours) == (unet, scheduler):
            return dataclasses.replace(ours, name=name), known, None
        note = f"{record} is no more what the folder is: read without it"
        return config, about, note
    if scheduler is None:
        note = (
            f"{path} has no scheduler_config.json: taken for the paper's diffusion, "
            "T = 1000, linear, eps, and the small variance"
        )
        return config, about, note
    return config, about, None


def _first(path: Path, *names: str) -> Path:
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise ConfigError(
            f"{path} must hold one of {', '.join(names)}; got none of them. Give the "
            "whole folder as it was released."
        )
    return found[0]


def _tensors_of(path: Path) -> Path:
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


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}")
    except ValueError as error:
        raise ConfigError(
            f"{path} must hold a JSON object; got {error}. Download it again."
        ) from error
    return values


@functools.cache
def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    return weights.shapes(
        build.make_network(config),
        config.data.channels,
        image_size=config.data.image_size,
    )


def _own_params(config: Config, arrays: Mapping[str, Any], path: Path) -> PyTree:
    """Returns the parameters from tensors under our own names."""
    like = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    shapes = {_name(key): leaf.shape for key, leaf in leaves}
    names = {name: weights.Place(name) for name in shapes}
    flat = weights.matched(arrays, names, shapes, where=str(path))
    return jax.tree.unflatten(treedef, [flat[name] for name in shapes])


def _name(path: Any) -> str:
    """Returns the name of a leaf, such as "net.conv_in.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _plain(name: str) -> str:
    """Returns a name that a run may have."""
    return name.lstrip(".") or "network"
