"""Verified checkpoints of any pytree, written in the background by orbax.

A checkpoint is the state, a small dictionary beside it, and a manifest with the type,
shape and sha256 of every leaf. One that is being written is invisible until it is
whole; one that is read is compared with its manifest, leaf by leaf.

    <folder>/<step>/state/                     its leaves by path, in orbax's format
    <folder>/<step>/manifest/process_<i>.json  what process i wrote
    <folder>/<step>.damaged/                   one that did not verify, renamed

On several hosts all must call every function here alike, with a folder that they share:
each writes the parts of the arrays that it holds, and the first one all the rest.
"""

import functools
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.checkpoints import manifest, orbax_files, retention
from diffusion_jax.checkpoints.orbax_files import CheckpointError
from diffusion_jax.errors import first_of
from diffusion_jax.storage import trees

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

PyTree = Any


class Skipped(NamedTuple):
    """A checkpoint that was skipped."""

    step: int
    why: str


class Restored(NamedTuple):
    """The content of a checkpoint."""

    state: PyTree
    meta: dict[str, Any]
    step: int
    skipped: list[Skipped]
    """Newer ones that did not verify, the newest first."""


class Folder(NamedTuple):
    """An open folder of checkpoints."""

    manager: "ocp.CheckpointManager"
    keep: retention.Keep
    path: Path
    place: tuple[int, int]
    """Device and inode of the folder that was opened."""

    def steps(self) -> list[int]:
        """Returns the steps of its checkpoints, in order."""
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

    Unless read_only, what an interrupted save has left there is removed.

    Args:
      directory: the folder; made when missing, unless read_only.
      keep: how many of the newest steps are kept, beside the one saved with the lowest
        score.
      keep_every: steps that are multiples of it are kept for good.
      read_only: whether nothing may be written or removed.

    Raises:
      CheckpointError: read_only, and there is no such folder; it cannot be made or
        written; or on leaving, the last checkpoint was not written whole.
    """
    import orbax.checkpoint as ocp  # as in `orbax_files.read`

    from diffusion_jax.checkpoints import handlers

    handlers.stop_leaks()
    path = Path(directory).resolve()
    if read_only and not path.is_dir():
        raise CheckpointError(
            f"a folder of checkpoints must be at {path}; got nothing there. Train "
            "first, or give the folder of another run."
        )
    if not read_only and jax.process_index() == 0:
        for left in path.glob(f"*{orbax_files.PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
    policy = retention.Keep(keep, keep_every, {}, path)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        async_options=ocp.options.AsyncOptions(
            post_finalization_callback=functools.partial(orbax_files.to_disk, path)
        ),
        read_only=read_only,
        create=not read_only,
        # One host lists the steps for all, so that these cannot differ.
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
        # `wait` or the block has raised the same error already.
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
      state: a pytree of arrays; the next step may use it up at once, since its values
        are copied before this returns.
      meta: a dictionary that JSON can hold.
      score: the best checkpoint is the one of the lowest.

    Raises:
      CheckpointError: the step was not taken, or an earlier one failed to be written.
    """
    import orbax.checkpoint as ocp

    from diffusion_jax.checkpoints.handlers import ManifestSave

    if _place_of(folder.path) != folder.place:  # orbax would make another
        raise CheckpointError(
            f"the folder of checkpoints must stay at {folder.path} while it is in use; "
            "got another in its place, or none. Bring it back, and start again."
        )
    if step in folder.steps():
        return
    orbax_files.trim_memory()  # which the last save took
    leaves = trees.by_path(state)
    arrays = {
        path: _of_one_device(manifest.stored(leaf)) for path, leaf in leaves.items()
    }
    for array in arrays.values():
        for shard in array.addressable_shards if isinstance(array, jax.Array) else []:
            if shard.replica_id == 0:
                shard.data.copy_to_host_async()
    held = {path: manifest.parts(array) for path, array in arrays.items()}
    items = ocp.args.Composite(
        # Orbax refuses arrays without elements; the manifest is enough for them.
        state=ocp.args.PyTreeSave({p: x for p, x in arrays.items() if x.size}),
        manifest=ManifestSave(leaves=leaves, held=held, meta=meta, score=score),
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


def check(folder: Folder) -> None:
    """Raises CheckpointError where the last save has failed by now; does not wait.

    On several hosts, which would not all know it at once, only `save` and `wait` raise.
    """
    if jax.process_count() == 1 and not folder.manager.is_saving_in_progress():
        wait(folder)


def wait(folder: Folder) -> None:
    """Waits until all is written; raises CheckpointError where that failed."""
    try:
        folder.manager.wait_until_finished()
        folder.manager.check_for_errors()
    except Exception as error:  # orbax raises errors of all types
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
        them like `like`: on any number of devices, whatever number wrote them.
      step: which one; the newest that verifies when not given.
      strict: whether the newest one must verify.

    Raises:
      CheckpointError: there is none, none verifies, or it does not fit `like`.
    """
    known, skipped = folder.steps()[::-1], []
    if not known:
        raise CheckpointError(
            f"a checkpoint must be in {folder.path}; got none. Train first, or give "
            "another run."
        )
    if step not in (None, *known):
        raise CheckpointError(
            f"step must be one of {known[::-1]}, those in {folder.path}; got {step}. "
            "Give one of them, or leave it out for the newest."
        )
    if isinstance(sharding, jax.sharding.Sharding):
        one = sharding
        sharding = jax.tree.map(lambda _: one, like)
    for tried in known if step is None else [step]:
        path = folder.path / str(tried)
        try:
            about, arrays = _read_everywhere(path)
        except orbax_files.DamagedError as error:
            if step is None and not path.is_dir():
                # Training that is running has deleted it, for newer ones.
                folder.manager.reload()
                return restore(folder, like, sharding, strict=strict)
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
    """Returns the new paths of checkpoints that did not verify, after renaming them.

    Their steps can then be written again, and what is left of them is not lost.
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
    """Returns the manifest of a checkpoint after comparing all of it.

    Args:
      path: of the checkpoint, <folder>/<step>.

    Raises:
      CheckpointError: it is damaged.
    """
    return orbax_files.read(Path(path))[0]


def _place_of(path: Path) -> tuple[int, int]:
    """Returns device and inode of a folder; (0, 0) where there is none."""
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return 0, 0


def _read_everywhere(path: Path) -> tuple[manifest.Manifest, dict[str, np.ndarray]]:
    """As `orbax_files.read`, but damaged for all hosts where it is for one."""
    if jax.process_count() == 1:
        return orbax_files.read(path)
    error: orbax_files.DamagedError | None = None
    try:
        found = orbax_files.read(path)
    except orbax_files.DamagedError as damaged:
        error = damaged
    bad = multihost_utils.process_allgather(np.asarray(error is not None))
    if error is not None:
        raise error
    if bad.any():
        raise orbax_files.DamagedError(
            path, f"other bytes on host {int(np.argmax(bad))}"
        )
    return found


def _placed(arrays: dict[str, np.ndarray], like: PyTree, sharding: PyTree) -> PyTree:
    """Returns the tree of arrays by path, which are used up, on their devices."""
    paths = jax.tree.unflatten(jax.tree.structure(like), trees.by_path(like))

    def place(path: str, leaf: Any, at: jax.sharding.Sharding) -> jax.Array:
        array = arrays.pop(path)
        placed = jax.make_array_from_callback(array.shape, at, array.__getitem__)
        if not manifest.is_key(leaf):
            return placed
        return jax.random.wrap_key_data(placed, impl=leaf.dtype)

    return jax.tree.map(place, paths, like, sharding)


def _of_one_device(x: Any) -> Any:
    """Returns the first device's copy of an array that every device has whole.

    To choose among copies orbax would compile a program for each shape, two seconds for
    the first checkpoint. On several hosts it has to.
    """
    shared = isinstance(x, jax.Array) and x.is_fully_replicated
    return x.addressable_data(0) if shared and jax.process_count() == 1 else x


def _check_fits(path: Path, held: Mapping[str, manifest.Leaf], like: PyTree) -> None:
    """Raises CheckpointError unless a checkpoint has the leaves of `like`.

    Orbax itself casts another dtype silently.
    """
    wanted = trees.by_path(like)
    if wrong := trees.misfits(held, wanted):
        raise CheckpointError(
            f"checkpoint {path} must fit the network and the optimizer of this "
            f"configuration; got {len(wrong)} of {len(held.keys() | wanted.keys())} "
            f"leaves that do not: {first_of(wrong, 10)}. Use the "
            "configuration that wrote it, or a new folder."
        )


def _unwritable(what: str, path: Any, error: Exception) -> CheckpointError:
    inner: BaseException = error
    while inner := inner.__cause__ or inner.__context__:  # type: ignore[assignment]
        if isinstance(inner, OSError):
            error = inner  # the first cause; the others follow from it
    # tensorstore has the code of the system's error in a long text.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    said = (
        os.strerror(int(code[1])) if code else str(error).strip().split("\n")[0][:200]
    )
    said = said or type(error).__name__
    return CheckpointError(
        f"{what} must be written whole to {path}; got {said}. Make room there, "
        "check the permissions and whether a host was lost, and start again: the run "
        "resumes from the last whole one."
    )
