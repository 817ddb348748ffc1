"""Checkpoints of any pytree that verify, written in the background by orbax.

A checkpoint is the state, a small dictionary beside it, and a manifest with type, shape
and sha256 of every leaf. A step that is being written is invisible until all of it is
there; one that is read is compared with its manifest, leaf by leaf.

    <folder>/<step>/state/                     its leaves by path, as orbax has them
    <folder>/<step>/manifest/process_<i>.json  what process i wrote
    <folder>/<step>.damaged/                   what did not verify, set aside

On several hosts all call every function here alike, with a folder that they share:
each writes the parts of the arrays that it holds, the first one all the rest.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import future

from diffusion_jax.training import manifest, retention

PyTree = Any


LISTED = 10
"""Leaves that an error names, of those that do not fit."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


class _DamagedError(CheckpointError):
    """One that is not what was written. An older one may be."""

    def __init__(self, path: Path, why: str) -> None:
        self.why = why
        super().__init__(
            f"checkpoint {path} must be what was written there; got {why}. Use an "
            "older one, or bring this one back from a copy."
        )


class Skipped(NamedTuple):
    """A checkpoint that was passed over."""

    step: int
    why: str


class Restored(NamedTuple):
    """What a checkpoint held."""

    state: PyTree
    meta: dict[str, Any]
    step: int
    skipped: list[Skipped]
    """Newer ones that did not verify, the newest first."""


class Folder(NamedTuple):
    """An open folder of checkpoints."""

    manager: ocp.CheckpointManager
    keep: retention.Keep
    path: Path
    place: tuple[int, int]
    """Device and inode of the folder that was opened."""

    def steps(self) -> list[int]:
        """Returns the steps that are there, in order."""
        return sorted(int(step) for step in self.manager.all_steps())


@contextmanager
def open_folder(
    directory: str | os.PathLike[str],
    *,
    keep: int = 3,
    keep_every: int | None = None,
    read_only: bool = False,
) -> Iterator[Folder]:
    """Opens a folder of checkpoints, and closes it.

    What an interrupted save has left there is removed, unless read_only.

    Args:
      directory: the folder; made when missing, unless read_only.
      keep: how many of the newest steps stay. The best one, of the lowest score that
        was saved with it, stays too.
      keep_every: steps that are multiples of it stay for good.
      read_only: whether nothing may be written or tidied away.

    Raises:
      CheckpointError: read_only, and there is no such folder; it cannot be made or
        written; or on leaving, when the last checkpoint was not written whole.
    """
    path = Path(directory).resolve()
    if read_only and not path.is_dir():
        raise CheckpointError(
            f"a folder of checkpoints must be at {path}; got nothing there. Train "
            "first, or give the folder of another run."
        )
    policy = retention.Keep(keep, keep_every, {}, path)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not read_only,
        # One host looks which steps there are and tells the others, lest they differ.
        single_host_load_and_broadcast=jax.process_count() > 1,
    )
    try:
        manager = ocp.CheckpointManager(path, options=options)
    except OSError as error:
        raise _unwritable("a folder of checkpoints", path, error) from error
    folder = Folder(manager, policy, path, _place_of(path))
    try:
        yield folder
        wait(folder)
    finally:
        # What it raises, `wait` or the block has said already.
        with suppress(Exception):
            manager.close()


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """Returns the steps of which a folder has checkpoints, damaged or not, in order."""
    found = Path(directory).glob("*/")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def save(
    folder: Folder,
    step: int,
    state: PyTree,
    meta: dict[str, Any],
    *,
    score: float | None = None,
) -> None:
    """Writes a checkpoint in the background; a step that exists already is left alone.

    Args:
      folder: from `open_folder`.
      step: number of updates made.
      state: a pytree of arrays; may be used up by the next step at once, since its
        values are copied before this returns.
      meta: what JSON can hold.
      score: by which the best checkpoint is known: the lowest.

    Raises:
      CheckpointError: the step was not taken, or an earlier one failed to be written.
    """
    if _place_of(folder.path) != folder.place:  # orbax would make another
        raise CheckpointError(
            f"the folder of checkpoints must stay at {folder.path} while it is in use; "
            "got another in its place, or none. Bring it back, and start again."
        )
    if step in folder.steps():
        return
    leaves = manifest.by_path(state)
    arrays = {
        path: _of_one_device(manifest.stored(leaf)) for path, leaf in leaves.items()
    }
    for array in arrays.values():
        if isinstance(array, jax.Array) and array.is_fully_addressable:
            array.copy_to_host_async()
    held = {path: manifest.parts(array) for path, array in arrays.items()}
    items = ocp.args.Composite(
        # Orbax refuses what has no elements, and the manifest says all of it.
        state=ocp.args.PyTreeSave({p: x for p, x in arrays.items() if x.size}),
        manifest=_ManifestSave(leaves=leaves, held=held, meta=meta, score=score),
    )
    folder.keep.scores[step] = score
    try:
        taken = folder.manager.save(step, args=items)
    except Exception as error:
        what = f"checkpoint {step}, or the one before it,"
        raise _unwritable(what, folder.path, error) from error
    if not taken:
        raise CheckpointError(
            f"checkpoint {step} must be newer than those in {folder.path}; "
            f"got {folder.steps()[-1]} as the latest there. Use a new folder."
        )


def wait(folder: Folder) -> None:
    """Waits until all is written; raises CheckpointError where that failed."""
    try:
        folder.manager.wait_until_finished()
        folder.manager.check_for_errors()
    except Exception as error:  # orbax raises whatever the disk did
        raise _unwritable("the last checkpoint", folder.path, error) from error


def restore(
    folder: Folder,
    like: PyTree,
    sharding: PyTree,
    step: int | None = None,
    *,
    strict: bool = False,
) -> Restored:
    """Returns the newest checkpoint that verifies, or the one that is asked for.

    Args:
      folder: from `open_folder`.
      like: a pytree of arrays or `jax.ShapeDtypeStruct` of the same structure.
      sharding: where the arrays go, one `jax.sharding.Sharding` for all or a tree of
        them like `like`: on any number of devices, whatever wrote them.
      step: which one; the newest that verifies when not given.
      strict: whether the newest one must verify.

    Raises:
      CheckpointError: there is none, none verifies, or it does not fit `like`.
    """
    known, skipped = folder.steps()[::-1], []
    if not known or step not in (None, *known):
        raise CheckpointError(
            f"a checkpoint must be in {folder.path}; got steps "
            f"{known[::-1]}. Train first, or give another run."
        )
    if isinstance(sharding, jax.sharding.Sharding):
        one = sharding
        sharding = jax.tree.map(lambda _: one, like)
    for tried in known if step is None else [step]:
        path = folder.path / str(tried)
        try:
            about, arrays = _read_everywhere(path)
        except _DamagedError as error:
            if strict or step is not None:
                raise
            skipped.append(Skipped(tried, error.why))
            continue
        _check_fits(path, about.leaves, like)
        state = _placed(arrays, like, sharding)
        return Restored(state, about.meta, tried, skipped)
    said = "; ".join(f"{step}: {why}" for step, why in skipped)
    raise CheckpointError(
        f"a checkpoint in {folder.path} must be what was written there; got, by "
        f"step, {said}. Bring one back from a copy, or start a new run."
    )


def set_aside(folder: Folder, damaged: Sequence[Skipped]) -> list[Path]:
    """Returns where checkpoints that did not verify are after renaming them.

    Their steps can then be written again, and nothing that is left of them is lost.
    """
    moved = []
    for step, _ in damaged:
        path = folder.path / str(step)
        to = path.with_name(f"{step}.damaged")
        if jax.process_index() == 0:
            count = 1
            while to.exists():
                count += 1
                to = path.with_name(f"{step}.damaged{count}")
            path.rename(to)
        moved.append(to)
    if damaged:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set_aside")
        folder.manager.reload()
    return moved


def verify(path: str | os.PathLike[str]) -> manifest.Manifest:
    """Returns what a checkpoint says of itself after comparing all of it.

    Args:
      path: of the checkpoint, <folder>/<step>.

    Raises:
      CheckpointError: it is not what was written there.
    """
    return _read(Path(path))[0]


def _place_of(path: Path) -> tuple[int, int]:
    """Which folder is at a path; (0, 0) where there is none."""
    with suppress(OSError):
        return path.stat().st_dev, path.stat().st_ino
    return 0, 0


def _read_everywhere(path: Path) -> tuple[manifest.Manifest, dict[str, np.ndarray]]:
    """As `_read`; where one host finds it damaged it is so for all."""
    if jax.process_count() == 1:
        return _read(path)
    error: _DamagedError | None = None
    try:
        found = _read(path)
    except _DamagedError as damaged:
        error = damaged
    bad = multihost_utils.process_allgather(np.asarray(error is not None))
    if error is not None:
        raise error
    if bad.any():
        raise _DamagedError(path, f"other bytes on host {int(np.argmax(bad))}")
    return found


def _read(path: Path) -> tuple[manifest.Manifest, dict[str, np.ndarray]]:
    """Returns what a checkpoint says of itself, and its arrays, compared."""
    try:
        about = manifest.read(path / "manifest")
        empty = {p: x for p, x in about.leaves.items() if 0 in x.shape}
        target = dict.fromkeys(about.leaves.keys() - empty.keys(), 0)
        how = dict.fromkeys(target, ocp.RestoreArgs(restore_type=np.ndarray))
        with _whatever_is_damaged():
            arrays = ocp.PyTreeCheckpointHandler().restore(
                epath.Path(path) / "state",
                args=ocp.args.PyTreeRestore(item=target, restore_args=how),
            )
        arrays |= {p: np.zeros(x.shape, jnp.dtype(x.dtype)) for p, x in empty.items()}
        manifest.check(about.leaves, arrays)
    except manifest.UnverifiedError as error:
        raise _DamagedError(path, str(error)) from error
    return about, arrays


@contextmanager
def _whatever_is_damaged() -> Iterator[None]:
    """Raises UnverifiedError for all kinds that orbax raises for damaged data."""
    hook = sys.unraisablehook
    # After the first error the other reads, in threads of tensorstore, end into an
    # event loop that is closed, and say so on stderr.
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception as error:
        time.sleep(0.02)  # by then they have ended
        first = str(error).strip().split("\n")[0][:100]
        raise manifest.UnverifiedError(f"data that cannot be read ({first})") from error
    finally:
        sys.unraisablehook = hook


def _placed(arrays: dict[str, np.ndarray], like: PyTree, sharding: PyTree) -> PyTree:
    """Returns the tree of arrays by path, which are used up, on their devices."""
    paths = jax.tree.unflatten(jax.tree.structure(like), manifest.by_path(like))

    def place(path: str, leaf: Any, at: jax.sharding.Sharding) -> jax.Array:
        return _place(arrays.pop(path), leaf, at)

    return jax.tree.map(place, paths, like, sharding)


def _place(array: np.ndarray, like: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns an array on its devices, as the leaf that it was."""
    placed = jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.array(array[index])
    )
    if not manifest.is_key(like):
        return placed
    return jax.random.wrap_key_data(placed, impl=like.dtype)


def _of_one_device(x: Any) -> Any:
    """Returns an array that every device has whole as that of the first.

    To choose among copies orbax would compile a program for each shape, and take two
    seconds for the first checkpoint. On several hosts it has to.
    """
    shared = isinstance(x, jax.Array) and x.is_fully_replicated
    return x.addressable_data(0) if shared and jax.process_count() == 1 else x


def _check_fits(path: Path, stored: Mapping[str, manifest.Leaf], like: PyTree) -> None:
    """Raises CheckpointError unless what is stored has the leaves of `like`.

    Orbax itself casts another dtype without a word.
    """

    def words(leaf: Any) -> str:
        if leaf is None:
            return "nothing"
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    wanted = manifest.by_path(like)
    had = {path: words(leaf) for path, leaf in stored.items()}
    want = {path: words(leaf) for path, leaf in wanted.items()}
    differing = [
        f"{path}: {had.get(path, 'nothing')} for {want.get(path, 'nothing')}"
        for path in sorted(had.keys() | want.keys())
        if had.get(path) != want.get(path)
    ]
    if differing:
        count = len(differing)
        more = f"; and {count - LISTED} more" if count > LISTED else ""
        raise CheckpointError(
            f"checkpoint {path} must fit the network and the optimizer of this "
            f"configuration; got {count} of {len(had.keys() | want.keys())} leaves "
            f"that do not: {'; '.join(differing[:LISTED])}{more}. Use the "
            "configuration that wrote it, or a new folder."
        )


def _unwritable(what: str, path: Any, error: Exception) -> CheckpointError:
    said = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return CheckpointError(
        f"{what} must be written whole to {path}; got {said}. Make room there or check "
        "the permissions, and start again: the run goes on from the last whole one."
    )


class _ManifestHandler(ocp.AsyncCheckpointHandler):
    """Writes the manifest in the background, as part of the checkpoint."""

    async def async_save(self, directory: Any, args: Any) -> list[Any]:
        async def write() -> None:
            text = manifest.describe(args.leaves, args.held, args.meta, args.score)
            name = f"process_{jax.process_index()}.json"
            (Path(directory) / name).write_text(text)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="manifest")]

    def save(self, directory: Any, args: Any) -> None:
        raise NotImplementedError("written in the background only")

    def restore(self, directory: Any, args: Any = None) -> Any:
        raise NotImplementedError("read by manifest.read")


@ocp.args.register_with_handler(_ManifestHandler, for_save=True)
@dataclasses.dataclass
class _ManifestSave(ocp.args.CheckpointArgs):
    leaves: dict[str, Any]
    held: dict[str, list[manifest.Part]]
    meta: dict[str, Any]
    score: float | None


@ocp.args.register_with_handler(_ManifestHandler, for_restore=True)
@dataclasses.dataclass
class _ManifestRestore(ocp.args.CheckpointArgs):
    """Orbax wants one of each handler."""
