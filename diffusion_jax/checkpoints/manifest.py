"""The manifest of a checkpoint: type, shape and sha256 of every leaf.

Orbax returns damaged bytes without an error. So every process writes, as a part of the
checkpoint, a manifest of what it has written: the parts of each leaf that it holds (all
of it, where devices have copies), with the digests of their bytes. A checkpoint is read
with all its manifests, and every byte must be covered by a digest.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.errors import first_of

FORMAT = 1
"""Version of the manifest, and with it of the whole checkpoint."""
THREADS = 4
"""Digests computed at a time."""


class Part(NamedTuple):
    """A block of a leaf, on the host."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    data: np.ndarray


class Leaf(NamedTuple):
    """A leaf as a manifest describes it."""

    dtype: str
    """Such as 'float32' or, of a random key, 'key<fry>'."""
    shape: tuple[int, ...]
    parts: list[tuple[list[int], list[int], str]]
    """Start, stop and sha256 of each part, in the stored array (a key's numbers)."""


class Manifest(NamedTuple):
    """The manifests of all processes of a checkpoint together."""

    leaves: dict[str, Leaf]
    meta: dict[str, Any]
    """What was saved beside the state."""
    score: float | None
    """The best checkpoint is the one of the lowest."""


class UnverifiedError(Exception):
    """What is stored is not what was written; its text is the reason in short."""


def stored(leaf: Any) -> Any:
    """Returns a leaf as the array of numbers to store; of a random key, its data."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of random keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def parts(array: Any) -> list[Part]:
    """Returns the blocks of an array that this process has to write, on the host.

    Of copies on several devices the first is written, and of a NumPy array that of the
    first process.
    """
    if not isinstance(array, jax.Array):
        if jax.process_index():
            return []
        return [Part((0,) * array.ndim, array.shape, np.array(array))]
    found = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            cuts = zip(shard.index, array.shape, strict=True)
            bounds = [cut.indices(size) for cut, size in cuts]
            start, stop = (tuple(bound[end] for bound in bounds) for end in (0, 1))
            # A copy, since the next step uses up what is on the device. On CPU it is
            # the same memory, which JAX does not reuse while it is held.
            found.append(Part(start, stop, np.asarray(shard.data)))
    return found


def describe(
    like: Mapping[str, Any],
    held: Mapping[str, Sequence[Part]],
    meta: dict[str, Any],
    score: float | None,
) -> str:
    """Returns the text of this process's manifest.

    Args:
      like: the leaves by path.
      held: `parts` of each.
      meta: what is saved beside the state.
      score: see `Manifest`.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(digest, [p.data for path in like for p in held[path]])
        leaves = {
            path: {
                "dtype": str(leaf.dtype),
                "shape": list(leaf.shape),
                "parts": [[p.start, p.stop, next(digests)] for p in held[path]],
            }
            for path, leaf in like.items()
        }
    count = jax.process_count()
    about = {"format": FORMAT, "process": jax.process_index(), "processes": count}
    return _seal({**about, "leaves": leaves, "meta": meta, "score": score})


def digest(array: np.ndarray) -> str:
    """Returns the sha256 of the bytes of an array, in C order.

    >>> digest(np.zeros(2, np.uint8)) == hashlib.sha256(bytes(2)).hexdigest()
    True
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data).hexdigest()


def read(folder: Path) -> Manifest:
    """Returns the manifests in a folder as one.

    Raises:
      UnverifiedError: one is missing or damaged.
      ValueError: one is of another format.
      OSError: one cannot be read now.
    """
    files = [_unseal(path) for path in sorted(folder.glob("process_*.json"))]
    if not files:
        raise UnverifiedError("no manifest: cut off, or of an older version")
    if any(file.get("format") != FORMAT for file in files):
        raise ValueError(
            f"manifests in {folder} must be of format {FORMAT}; got another. Read the "
            "checkpoint with the version that wrote it."
        )
    try:
        count = files[0]["processes"]
        if sorted(file["process"] for file in files) != list(range(count)):
            raise UnverifiedError(f"{len(files)} manifests for {count} processes")
        first = min(files, key=lambda file: int(file["process"]))
        leaves = {
            path: Leaf(leaf["dtype"], tuple(leaf["shape"]), [])
            for path, leaf in first["leaves"].items()
        }
        for path, leaf in leaves.items():
            for file in files:
                leaf.parts.extend(map(tuple, file["leaves"][path]["parts"]))
        return Manifest(leaves, first["meta"], first["score"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UnverifiedError(f"a manifest without {error}") from error


def check(leaves: Mapping[str, Leaf], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UnverifiedError unless every leaf has exactly the bytes that were written.

    Args:
      leaves: from `read`.
      arrays: what was read, by path.
    """

    def wrong(path: str) -> str | None:
        leaf, array = leaves[path], arrays[path]
        stops = [stop for _, stop, _ in leaf.parts]
        if array.shape != tuple(map(max, zip(*stops, strict=True))) and stops:
            return f"another shape in {path}"
        if str(array.dtype) != (leaf.dtype if "key" not in leaf.dtype else "uint32"):
            return f"another type in {path}"
        covered = 0
        for start, stop, expected in leaf.parts:
            block = array[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
            covered += block.size
            if digest(block) != expected:
                return f"other bytes in {path}"
        return None if covered == array.size else f"no digest for all of {path}"

    missing = sorted(leaves.keys() ^ arrays.keys())
    if missing:
        raise UnverifiedError(f"nothing in {first_of(missing, 1)}")
    with ThreadPoolExecutor(THREADS) as pool:
        found = [said for said in pool.map(wrong, leaves) if said]
    if found:
        raise UnverifiedError(first_of(found, 1))


def _seal(body: dict[str, Any]) -> str:
    """Returns the text of a manifest, with a digest of itself."""
    return json.dumps({**body, "sha256": _sum(body)})


def _unseal(path: Path) -> dict[str, Any]:
    """Returns what `_seal` wrote, after comparing the digest."""
    try:
        body = json.loads(path.read_bytes())
        said = body.pop("sha256")
    except FileNotFoundError as error:
        raise UnverifiedError(f"no {path.name}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UnverifiedError(f"a manifest that cannot be read, {path.name}") from error
    if said != _sum(body):
        raise UnverifiedError(f"a manifest with other bytes, {path.name}")
    return dict(body)


def _sum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
