"""Finds, reads, checks and saves the weights of the Inception network.

The network was released once, 2015-12-05, and lives on in several files. Read are

  graphdef      classify_image_graph_def.pb, alone or in inception-2015-12-05.tgz
  safetensors   what `save` writes, or PyTorch's names (pytorch-fid's conversion)
  pytorch       pt_inception-2015-12-05-6726825d.pth, where PyTorch is installed

by their content, whatever they are called. Nothing in a file is ever executed: the
graph is read as data, and of pickles only PyTorch's, by its own `weights_only` reader.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import DataError
from diffusion_jax.interop import graphdef, renaming
from diffusion_jax.interop.renaming import Names, Place
from diffusion_jax.nets import inception
from diffusion_jax.storage import archives, tensor_files, trees
from diffusion_jax.storage import download as downloading

VARIABLE = "DIFFUSION_JAX_INCEPTION"
URL = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
    "classify_image_graph_def.pb"
)
# Looked for in the cache folder in this order.
FILES = (
    "inception.safetensors",
    "classify_image_graph_def.pb",
    "inception-2015-12-05.tgz",
    "pt_inception-2015-12-05-6726825d.pth",
)
# The files have some 95 MB; more than this is no such file, or a bomb.
_MAX_BYTES = 2**27
# torchvision's names: of the first convolutions, then of each block and, in order, of
# its lone convolution and its towers.
_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
_BLOCKS = (
    "5b 1x1 5x5 3x3dbl _pool",
    "5c 1x1 5x5 3x3dbl _pool",
    "5d 1x1 5x5 3x3dbl _pool",
    "6a 3x3 3x3dbl",
    "6b 1x1 7x7 7x7dbl _pool",
    "6c 1x1 7x7 7x7dbl _pool",
    "6d 1x1 7x7 7x7dbl _pool",
    "6e 1x1 7x7 7x7dbl _pool",
    "7a - 3x3 7x7x3",
    "7b 1x1 3x3 3x3dbl _pool",
    "7c 1x1 3x3 3x3dbl _pool",
)


class Weights(NamedTuple):
    """The content of a file."""

    variables: dict[str, Any]
    """`params` and `batch_stats`, as `inception.Inception.apply` takes them."""
    sha256: str
    """Of the file as it lies on disk, in hexadecimal."""
    format: str
    """One of "graphdef", "safetensors" and "pytorch"."""


def find(path: str | os.PathLike[str] | None = None, *, download: bool = False) -> Path:
    """Returns where the weights lie.

    They are `path`; failing that, what the environment variable
    DIFFUSION_JAX_INCEPTION names; failing that, the first of `FILES` in the folder
    diffusion_jax of the user's cache ($XDG_CACHE_HOME or ~/.cache).

    Args:
      path: the file, if it is known.
      download: whether to fetch the released graph (95 MB) if there is none. Nobody
        publishes its digest: the one it had is warned of, and written beside it, and
        `load` holds the file to it.

    Raises:
      DataError: a file that was named does not exist, or there is none.
    """
    for source, named in (("path", path), (VARIABLE, os.environ.get(VARIABLE))):
        if named:
            if not Path(named).is_file():
                raise DataError(
                    f"{source} must name the Inception weights, a file; got {named}, "
                    "which is none. Correct it, or leave it out to search the cache."
                )
            return Path(named)
    folder = downloading.cache_folder()
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    if not download:
        raise DataError(
            f"the Inception weights must be given, be named by {VARIABLE}, or lie in "
            f"{folder}; got none of {', '.join(FILES)} there. Allow the download, or "
            f"put there by hand what lies at {URL}."
        )
    got = downloading.fetch(URL, folder / FILES[1], sha256=None, most=_MAX_BYTES)
    digest = hashlib.sha256(got.read_bytes()).hexdigest()
    _noted(got).write_text(f"{digest}  {got.name}\n")
    warnings.warn(
        f"no digest of {URL} is published to check it by; what came has SHA-256 "
        f"{digest}. Compare it with a colleague's.",
        stacklevel=2,
    )
    return got


def load(path: str | os.PathLike[str]) -> Weights:
    """Returns the weights in a file, every tensor of them checked.

    A file whose name ends in the first eight digits of its SHA-256, as PyTorch's do
    ("-6726825d.pth"), or that has a digest noted beside it, must have that digest.

    Args:
      path: a file in any of the formats above.

    Raises:
      DataError: no such file, another format, damage, a pickle that could run code,
        or tensors that are not the network's; all of these are listed at once.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(
                f"the Inception weights must have at most {_MAX_BYTES} bytes; got "
                f"{path.stat().st_size} in {path}. Give the released file."
            )
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the Inception weights must be a readable file; got {error}. "
            "Check the path."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    _check_digest(path, digest)
    kind = tensor_files.kind_of(path)
    if content[:2] == b"\x1f\x8b":
        content = _from_archive(content, path)
    if kind in ("safetensors", "pytorch"):
        found, names = tensor_files.read(path).arrays, _own_names()
        if kind == "pytorch" or any(name.endswith(".conv.weight") for name in found):
            names = _names(_PYTORCH, _pytorch_module)
    elif kind == "unknown" and content[:1] == b"\n":
        kind, names = "graphdef", _names(_GRAPH, str)
        found = graphdef.read(content, path)
        # Scales were not trained: they are all ones, and may be left out.
        for own, place in names.items():
            if own.endswith("/scale"):
                found.setdefault(place.name, np.ones(shapes()[own], np.float32))
        known = {place.name for place in names.values()}
        found = {name: array for name, array in found.items() if name in known}
    else:
        got = "a pickle, which is a program. It was not run"
        if kind != "pickle":
            got = f"a file that begins with {content[:8]!r}"
        raise DataError(
            f"{path} must be a TensorFlow GraphDef (.pb, or in a .tgz), safetensors or "
            f"a PyTorch file; got {got}. Give the released graph: {URL}."
        )
    return Weights(_assemble(found, names, path), digest, kind)


def save(variables: Mapping[str, Any], path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of the safetensors file that now holds the variables.

    A tensor is called by its module's path and its own name: "mixed/tower/conv_1/" +
    "kernel" (HWIO), "scale", "bias", "mean" or "var", "softmax/" + "kernel" (IO) or
    "bias". All are float32.

    Args:
      variables: `params` and `batch_stats` of `inception.Inception`.
      path: where the file shall lie; whatever was there is replaced at the end.

    Raises:
      DataError: the variables are not the network's.
      OSError: the disk refuses.
    """
    found = {name: np.asarray(x) for name, x in _by_name(variables).items()}
    _assemble(found, _own_names(), Path(path))
    return tensor_files.write_safetensors(path, found)


def _by_name(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns leaves by their paths within `params` or `batch_stats`."""
    named = trees.by_path(variables)
    return {path.partition("/")[2]: leaf for path, leaf in named.items()}


@functools.cache
def shapes() -> Mapping[str, tuple[int, ...]]:
    """Returns the shape of each of the 472 tensors, by the names that `save` uses."""
    images = jax.ShapeDtypeStruct((1, inception.SIDE, inception.SIDE, 3), jnp.uint8)
    key = jax.eval_shape(lambda: jax.random.key(0))
    made = jax.eval_shape(inception.Inception().init, key, images)
    return {name: leaf.shape for name, leaf in _by_name(made).items()}


def _noted(path: Path) -> Path:
    """Returns where the digest of a downloaded file is written."""
    return path.with_name(f"{path.name}.sha256")


def _check_digest(path: Path, digest: str) -> None:
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    expected = [named[1]] if named else []
    if _noted(path).is_file():
        expected += _noted(path).read_text(errors="replace").split()[:1]
    for start in expected:
        if not digest.startswith(start):
            raise DataError(
                f"{path} must have a SHA-256 that begins with {start} (from its name "
                f"or {_noted(path).name}); got {digest}. The file was cut off, damaged "
                "or changed: remove both and download it again."
            )


def _from_archive(content: bytes, path: Path) -> bytes:
    """Returns the graph in an archive; nothing of it touches the disk."""
    wanted = "classify_image_graph_def.pb"
    try:
        found = archives.read_tar(
            io.BytesIO(content),
            lambda name: PurePosixPath(name).name == wanted,
            most=2 * _MAX_BYTES,
        )
    except archives.ArchiveError as error:
        raise DataError(
            f"{path} must be a whole .tgz archive; got {error}. Download it again."
        ) from error
    if found:
        return next(iter(found.values()))
    raise DataError(
        f"{path} must hold {wanted}; got an archive without it. "
        "Give inception-2015-12-05.tgz as it was released."
    )


def _own_names() -> Names:
    return {name: Place(name) for name in shapes()}


# Where others have the tensors of a layer, and in which order of our axes: of the
# released graph, and of pytorch-fid (OIHW, and torchvision's names).
_GRAPH = {
    "softmax/kernel": Place("softmax/weights"),
    "softmax/bias": Place("softmax/biases"),
    "kernel": Place("{}/conv2d_params"),
    "scale": Place("{}/batchnorm/gamma"),
    "bias": Place("{}/batchnorm/beta"),
    "mean": Place("{}/batchnorm/moving_mean"),
    "var": Place("{}/batchnorm/moving_variance"),
}
_PYTORCH = {
    "softmax/kernel": Place("fc.weight", (1, 0)),
    "softmax/bias": Place("fc.bias"),
    "kernel": Place("{}.conv.weight", (3, 2, 0, 1)),
    "scale": Place("{}.bn.weight"),
    "bias": Place("{}.bn.bias"),
    "mean": Place("{}.bn.running_mean"),
    "var": Place("{}.bn.running_var"),
}


def _names(table: Mapping[str, Place], module_name: Callable[[str], str]) -> Names:
    """Returns where others have each tensor, by a table and their names of modules."""
    names = {}
    for own in shapes():
        module, leaf = own.rsplit("/", 1)
        place = table.get(own) or table[leaf]
        names[own] = place._replace(name=place.name.format(module_name(module)))
    return names


def _pytorch_module(module: str) -> str:
    """Returns torchvision's name of a convolution.

    >>> _pytorch_module("mixed_10/tower_1/mixed/conv_1")
    'Mixed_7c.branch3x3dbl_3b'
    """
    block, *inner = module.split("/")
    if not inner:
        return f"Conv2d_{_STEM[_number(module)]}"
    place, *branches = _BLOCKS[_number(block)].split()
    if inner[0] == "conv":
        return f"Mixed_{place}.branch{branches[0]}"
    tower = branches[1 + _number(inner[0])]
    if tower == "_pool":
        return f"Mixed_{place}.branch_pool"
    last = _number(inner[-1])
    if inner[1] == "mixed":  # the halves of a split: 2a and 2b, or 3a and 3b
        return f"Mixed_{place}.branch{tower}_{2 + _number(inner[0])}{'ab'[last]}"
    return f"Mixed_{place}.branch{tower}_{1 + last}"


def _number(name: str) -> int:
    """Returns k of "conv_k", and 0 of "conv"."""
    return int(name.partition("_")[2] or 0)


def _assemble(found: Mapping[str, Any], names: Names, path: Path) -> dict[str, Any]:
    """Returns the variables made of tensors found under a format's names."""
    wanted = renaming.wanted(names, shapes())
    # PyTorch counts what it has averaged over; that is no part of the network.
    given = {n: x for n, x in found.items() if not n.endswith("_batches_tracked")}
    wrong = trees.misfits(given, wanted)
    variances = (name.name for own, name in names.items() if own.endswith("/var"))
    wrong += [f"{n}: some below 0" for n in variances if np.any(given.get(n, 0) < 0)]
    if wrong:
        raise DataError(
            f"{path} must hold the {len(wanted)} tensors of the Inception network of "
            f"2015-12-05; got {'; '.join(wrong)}. Other networks, torchvision's among "
            "them, do not fit: give the released file."
        )
    variables: dict[str, dict] = {"params": {}, "batch_stats": {}}
    for own, array in renaming.from_others(given, names).items():
        kind = "batch_stats" if own.endswith(("/mean", "/var")) else "params"
        variables[kind][tuple(own.split("/"))] = array
    return {k: flax.traverse_util.unflatten_dict(v) for k, v in variables.items()}
