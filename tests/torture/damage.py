"""Checkpoints that rot: never silently wrong.

Every file of a checkpoint is cut, removed and has bits of it flipped. What is restored
then is to the bit what was saved, or else the damage is seen: then the checkpoint
before is restored and the damaged one named, or with strict nothing.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .cases import Outcome, check, outcome

FLIPS = 240
"""Single bits, spread over all files: at least some in each."""
NEWEST, BEFORE = 8, 4
"""The steps that are there."""


class Sample(NamedTuple):
    """A folder of two checkpoints, and what they hold."""

    folder: Path
    like: Any
    states: dict[int, dict[str, bytes]]


def cases(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes."""
    rng = random.Random(seed)
    sample = made(folder / "whole")
    newest = sample.folder / str(NEWEST)
    found = (path for path in newest.rglob("*") if path.is_file())
    files = sorted(path.relative_to(sample.folder) for path in found)
    sizes = {path: (sample.folder / path).stat().st_size for path in files}
    bits = [flipped(path, at) for path, at in chosen(sizes, rng)]
    cuts = [
        cut(path, length)
        for path in files
        for length in sorted({0, 1, sizes[path] // 2, sizes[path] - 1})
        if length < sizes[path]
    ]
    removals = [removed(path) for path in files]
    folders = sorted({path.parent for path in files if len(path.parts) > 2})
    gone = [removed(path) for path in folders]
    grown = [lengthened(path) for path in files]
    swapped = [replaced(path) for path in files]
    for name, damages in (
        (f"{len(bits)} single bits flipped in {len(files)} files", bits),
        (f"{len(cuts)} files cut off", cuts),
        (f"{len(removals)} files removed", removals),
        (f"{len(gone)} folders removed", gone),
        (f"{len(grown)} files with bytes after their end", grown),
        (f"{len(swapped)} files replaced by those of the step before", swapped),
        ("the newest folder empty", [EMPTIED]),
        ("a newer folder, empty", [NEWER]),
        ("a file in the place of the newest folder", [FILE_IN_PLACE]),
    ):
        yield outcome(name, lambda damages=damages: all_seen(sample, damages))
    yield outcome("what an interrupted save left is removed", lambda: stale(sample))
    yield outcome("both damaged: refused", lambda: none_left(sample))


class Damage(NamedTuple):
    """Something that happens to a folder of checkpoints."""

    what: str
    do: Callable[[Path], object]
    """To the folder, or a copy of it."""


def chosen(sizes: dict[Path, int], rng: random.Random) -> list[tuple[Path, int]]:
    """Returns which bits to flip: a share in each file, the rest by size."""
    files = [path for path, size in sizes.items() if size]
    share = FLIPS // (2 * len(files)) + 1
    each = [path for path in files for _ in range(share)]
    left = max(0, FLIPS - len(each))
    weights = [sizes[path] for path in files]
    rest = rng.choices(files, weights=weights, k=left)
    return [(path, rng.randrange(8 * sizes[path])) for path in (*each, *rest)]


def rewritten(path: Path, what: str, change: Callable[[bytes], bytes]) -> Damage:
    """A file of other bytes."""

    def do(folder: Path) -> None:
        (folder / path).write_bytes(change((folder / path).read_bytes()))

    return Damage(f"{path} {what}", do)


def flipped(path: Path, bit: int) -> Damage:
    def change(data: bytes) -> bytes:
        at, one = bit // 8, 1 << (bit % 8)
        return data[:at] + bytes([data[at] ^ one]) + data[at + 1 :]

    return rewritten(path, f"with bit {bit} flipped", change)


def cut(path: Path, length: int) -> Damage:
    return rewritten(path, f"cut to {length} bytes", lambda data: data[:length])


def lengthened(path: Path) -> Damage:
    return rewritten(path, "lengthened", lambda data: data + bytes(100))


def removed(path: Path) -> Damage:
    def do(folder: Path) -> None:
        gone = folder / path
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()

    return Damage(f"{path} removed", do)


def replaced(path: Path) -> Damage:
    """The same file of the step before; what has its name, where none is the same."""

    def do(folder: Path) -> None:
        older = folder / str(BEFORE) / Path(*path.parts[1:])
        data = older.read_bytes() if older.exists() else b"of something else"
        (folder / path).write_bytes(data)

    return Damage(f"{path} replaced", do)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder / str(NEWEST))
    (folder / str(NEWEST)).mkdir()


def _file_in_place(folder: Path) -> None:
    shutil.rmtree(folder / str(NEWEST))
    (folder / str(NEWEST)).write_text("in the way")


EMPTIED = Damage("empty", _emptied)
NEWER = Damage("a newer one, empty", lambda folder: (folder / str(NEWEST + 1)).mkdir())
FILE_IN_PLACE = Damage("a file", _file_in_place)


def made(folder: Path) -> Sample:
    """Returns a folder with two checkpoints of a small state of all kinds of leaves."""
    import jax

    from diffusion_jax.checkpoints import checkpoint

    states = {}
    with checkpoint.open_folder(folder) as opened:
        for step in (BEFORE, NEWEST):
            made = init(step)
            checkpoint.save(opened, step, made, {"pending": [{"loss": 0.1 * step}]})
            states[step] = raw(made)
    return Sample(folder, jax.eval_shape(lambda: init(0)), states)


def init(seed: int, rows: int = 24) -> Any:
    """Returns the state of a training, with leaves of all kinds."""
    import jax
    import jax.numpy as jnp
    import optax

    from diffusion_jax.training import state

    w = jax.random.normal(jax.random.key(seed), [rows, 16])
    params = {"w": w, "half": w[0].astype(jnp.bfloat16), "zero": jnp.zeros(40)}
    return state.init(jax.random.key(seed), params, optax.adam(1e-3))


def raw(tree: Any) -> dict[str, bytes]:
    """Returns the bytes of all leaves by their paths."""
    import jax
    import numpy as np

    def data(leaf: Any) -> bytes:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes()

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): data(leaf) for path, leaf in leaves}


def restored(sample: Sample, folder: Path, *, strict: bool) -> Any:
    """Returns what is restored from a folder."""
    from diffusion_jax.checkpoints import checkpoint
    from diffusion_jax.training import parallel

    one = parallel.replicated(parallel.make_mesh(1))
    with checkpoint.open_folder(folder, read_only=True) as opened:
        return checkpoint.restore(opened, sample.like, one, strict=strict)


def all_seen(sample: Sample, damages: list[Damage]) -> str:
    """Checks that no damage is silently wrong; counts what was made of it."""
    from diffusion_jax.checkpoints.checkpoint import CheckpointError

    harmless, seen = 0, 0
    work = sample.folder.with_name("work")
    for damage in damages:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(sample.folder, work)
        damage.do(work)
        what = damage.what
        found = restored(sample, work, strict=False)
        check(
            raw(found.state) == sample.states[found.step],
            f"{what}: step {found.step} restored with other numbers",
        )
        expected = [{"loss": 0.1 * found.step}]
        check(found.meta["pending"] == expected, f"{what}: other metrics")
        if found.step == NEWEST and not found.skipped:
            harmless += 1
            continue
        seen += 1
        reported = [skipped for skipped in found.skipped if skipped.step >= NEWEST]
        whole = found.step == (NEWEST if damage is NEWER else BEFORE)
        check(whole, f"{what}: step {found.step} restored")
        if damage is not FILE_IN_PLACE:  # which is no checkpoint
            check(reported and reported[0].why, f"{what}: nothing said of it")
        elif not reported:
            continue
        try:
            restored(sample, work, strict=True)
        except CheckpointError:
            continue
        check(False, f"{what}: restored although strict")
    shutil.rmtree(work)
    return f"{seen} seen and the one before restored, {harmless} changed nothing"


def stale(sample: Sample) -> str:
    """Checks that the folder of an interrupted save is ignored, and removed."""
    import numpy as np

    from diffusion_jax.checkpoints import checkpoint

    work = sample.folder.with_name("stale")
    shutil.copytree(sample.folder, work)
    left = f"{NEWEST + 1}.orbax-checkpoint-tmp"
    shutil.copytree(work / str(BEFORE), work / left)
    found = restored(sample, work, strict=True)
    check(found.step == NEWEST, f"step {found.step} restored")
    check(raw(found.state) == sample.states[NEWEST], "other numbers")
    with checkpoint.open_folder(work) as opened:
        checkpoint.save(opened, NEWEST + 1, {"x": np.zeros(2)}, {})
    there = sorted(path.name for path in work.iterdir())
    wanted = [str(step) for step in (BEFORE, NEWEST, NEWEST + 1)]
    check(there == wanted, f"there are {there}")
    shutil.rmtree(work)
    return left


def none_left(sample: Sample) -> str:
    """Checks that nothing is restored where no checkpoint verifies."""
    from diffusion_jax.checkpoints.checkpoint import CheckpointError

    work = sample.folder.with_name("none")
    shutil.copytree(sample.folder, work)
    for step in (BEFORE, NEWEST):
        for path in (work / str(step)).rglob("*"):
            if path.is_file() and path.stat().st_size:
                half = 8 * (path.stat().st_size // 2)
                flipped(path.relative_to(work), half).do(work)
    try:
        found = restored(sample, work, strict=False)
    except CheckpointError as error:
        said = str(error)
        for step in (BEFORE, NEWEST):
            check(f"{step}:" in said, f"{step} is not named: {said}")
        return f"{said[:90]!r}"
    check(False, f"step {found.step} restored")
    return None
