"""Checkpoints of any pytree, written in the background by orbax.

A checkpoint is the state and a small dictionary beside it (the configuration, what is
left to log). A step that is being written is invisible until it is whole.

On several hosts all call every function here alike, with a folder that they share:
each writes the parts of the arrays that it holds, the first one all the rest.
"""

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

PyTree = Any


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


def open_folder(
    directory: str | os.PathLike[str], *, keep: int = 3, read_only: bool = False
) -> ocp.CheckpointManager:
    """Returns the manager of a folder of checkpoints; close it, or use `with`.

    Args:
      directory: the folder; made when missing, unless read_only.
      keep: how many of the newest steps stay.
      read_only: whether nothing may be written or tidied away.

    Raises:
      CheckpointError: read_only, and there is no such folder.
    """
    path = Path(directory).resolve()
    if read_only and not path.is_dir():
        raise CheckpointError(
            f"a folder of checkpoints must be at {path}; got nothing there. Train "
            "first, or give the folder of another run."
        )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not read_only,
        # One host looks which steps there are and tells the others, lest they differ.
        single_host_load_and_broadcast=jax.process_count() > 1,
    )
    return ocp.CheckpointManager(path, options=options)


def save(
    manager: ocp.CheckpointManager, step: int, state: PyTree, meta: dict[str, Any]
) -> None:
    """Writes a checkpoint in the background; a step that exists already is left alone.

    Args:
      manager: from `open_folder`.
      step: number of updates made.
      state: a pytree of arrays; may be used up by the next step at once, since its
        values are copied before this returns.
      meta: what JSON can hold.

    Raises:
      CheckpointError: the step was not taken, or an earlier one failed to be written.
    """
    if step in manager.all_steps():
        return
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(jax.tree.map(_of_one_device, state)),
        meta=ocp.args.JsonSave(meta),
        arrays=ocp.args.JsonSave(_arrays(state)),
    )
    try:
        taken = manager.save(step, args=items)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {step} must be written to {manager.directory}; got "
            f"{error}. Make room or check the permissions, and start again: the run "
            "goes on from the last whole checkpoint."
        ) from error
    if not taken:
        raise CheckpointError(
            f"checkpoint {step} must be newer than those in {manager.directory}; "
            f"got {manager.latest_step()} as the latest there. Use a new folder."
        )


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until all is written; raises CheckpointError where that failed."""
    try:
        manager.wait_until_finished()
        manager.check_for_errors()
    except Exception as error:
        raise CheckpointError(
            f"the last checkpoint must be written whole to {manager.directory}; got "
            f"{error}. Make room or check the permissions, and start again."
        ) from error


def restore(
    manager: ocp.CheckpointManager,
    like: PyTree,
    sharding: PyTree,
    step: int | None = None,
) -> tuple[PyTree, dict[str, Any]]:
    """Returns the state and the dictionary of a checkpoint.

    Args:
      manager: from `open_folder`.
      like: a pytree of arrays or `jax.ShapeDtypeStruct` of the same structure.
      sharding: where the arrays go, one `jax.sharding.Sharding` for all or a tree of
        them like `like`: on any number of devices, whatever wrote them.
      step: which one; the latest when not given.

    Raises:
      CheckpointError: there is none, or it does not fit `like`.
    """
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise CheckpointError(
            f"a checkpoint must be in {manager.directory}; got steps "
            f"{sorted(manager.all_steps())}. Train first, or give another run."
        )
    if isinstance(sharding, jax.sharding.Sharding):
        one = sharding
        sharding = jax.tree.map(lambda _: one, like)
    target = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        like,
        sharding,
    )
    items = ocp.args.Composite(
        state=ocp.args.StandardRestore(target),
        meta=ocp.args.JsonRestore(),
        arrays=ocp.args.JsonRestore(),
    )
    try:
        described = manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.JsonRestore())
        )["arrays"]
        _check_fits(f"checkpoint {step} in {manager.directory}", described, like)
        restored = manager.restore(step, args=items)
    except CheckpointError:
        raise
    except Exception as error:  # orbax raises bare Exception for damaged data
        raise CheckpointError(
            f"checkpoint {step} in {manager.directory} must be whole; got {error}. "
            f"Delete the folder {step} there to go on from the one before."
        ) from error
    return restored["state"], restored["meta"]


def _of_one_device(x: Any) -> Any:
    """Returns an array that every device has whole as that of the first.

    To choose among copies orbax would compile a program for each shape, and take two
    seconds for the first checkpoint. On several hosts it has to.
    """
    shared = isinstance(x, jax.Array) and x.is_fully_replicated
    return x.addressable_data(0) if shared and jax.process_count() == 1 else x


def _arrays(tree: PyTree) -> dict[str, str]:
    """Returns type and shape of every leaf by its path, such as 'float32[3,3]'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{x.dtype}[{','.join(map(str, x.shape))}]"
        for path, x in leaves
    }


def _check_fits(what: str, stored: dict[str, str], like: PyTree) -> None:
    """Raises CheckpointError unless what is stored has the leaves of `like`.

    Orbax itself casts another dtype without a word.
    """
    wanted = _arrays(like)
    differing = [
        f"{path}: {stored.get(path, 'nothing')} for {wanted.get(path, 'nothing')}"
        for path in sorted(stored.keys() | wanted.keys())
        if stored.get(path) != wanted.get(path)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{what} must fit the network and the optimizer of this configuration; got "
            f"{'; '.join(differing[:3])}{more}. Use the configuration that wrote it, "
            "or a new folder."
        )
