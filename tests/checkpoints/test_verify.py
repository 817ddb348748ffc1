"""What was not written so is never read: damage of every kind, at every place."""

import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import nonsense
import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import no_file_beyond
from test_checkpoint import bits, on

from diffusion_jax.checkpoints import checkpoint, manifest, orbax_files
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import config
from diffusion_jax.training import parallel
from experiments import checkpoints
from experiments.configs import EXPERIMENTS

FLIPS = 7 * nonsense.PROFILE.max_examples


def state(step):
    noise = np.random.default_rng(step).normal(size=[40, 8]).astype(np.float32)
    return {
        "params": {"w": jnp.asarray(noise), "half": jnp.ones(5, jnp.bfloat16) * step},
        "averages": (jnp.asarray(noise[:3]), jnp.zeros([0, 4])),
        "count": jnp.array(step),
        "key": jax.random.key(step),
    }


def save(path, step, tree, **options):
    with checkpoint.open_folder(path) as folder:
        checkpoint.save(folder, step, tree, {"pending": [{"loss": step}]}, **options)


def restore(path, like=None, **options):
    like = like or jax.eval_shape(lambda: state(0))
    with checkpoint.open_folder(path, read_only=True) as folder:
        return checkpoint.restore(folder, like, on(1), **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written")
    for step in (1, 2):
        save(path, step, state(step))
    return path


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "c")


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def manifest_of(path):
    return path / "2" / "manifest" / "process_0.json"


def refused(said):
    return pytest.raises(checkpoint.CheckpointError, match=said)


def outcome(path):
    """The step that is restored; what is restored is what was written, or it fails."""
    found = restore(path)
    assert bits(found.state) == bits(state(found.step))
    assert found.meta == {"pending": [{"loss": found.step}]}
    assert [s.step for s in found.skipped] == ([2] if found.step == 1 else [])
    return found.step


def test_no_flipped_bit_comes_back(folder):
    draw, seen, inside = random.Random(0), {}, files(folder / "2")
    size = sum(file.stat().st_size for file in inside)
    for file in inside:
        content = file.read_bytes()
        # Half by size, half by file, lest the small ones be left out.
        share = (len(content) / size + 1 / len(inside)) / 2
        for _ in range(round(FLIPS * share) if content else 0):
            bad = bytearray(content)
            bad[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(bad)
            kind = file.suffix or file.parent.name
            seen.setdefault(kind, []).append(outcome(folder))
        file.write_bytes(content)
    assert outcome(folder) == 2
    # A manifest vouches for itself; data files for nothing.
    assert set(seen[".json"]) == {1}
    assert seen["d"].count(1) > 5
    # Nor is a number of the manifest believed that no leaf depends on.
    path = manifest_of(folder)
    path.write_text(path.read_text().replace('"loss": 2', '"loss": 3'))
    assert outcome(folder) == 1


@pytest.mark.parametrize("options", [{"strict": True}, {"step": 2}], ids=str)
def test_who_wants_the_newest_gets_no_other(folder, options):
    (folder / "2" / "state" / "manifest.ocdbt").unlink()
    assert outcome(folder) == 1
    with refused(r"/2 must be what was .*; got"):
        restore(folder, **options)


def test_no_lost_or_shortened_file_or_folder_comes_back(folder):
    changed, newest, kept = 0, folder / "2", folder.with_name("kept")
    for file in files(newest):
        content = file.read_bytes()
        older = folder / "1" / file.relative_to(newest)
        swapped = older.read_bytes() if older.exists() else b"of something else"
        file.unlink()
        changed += outcome(folder) == 1
        for bad in (b"", content[: len(content) // 2], content + b"x", swapped):
            file.write_bytes(bad)
            changed += outcome(folder) == 1
        file.write_bytes(content)
    assert changed > 10
    for place in (*(path for path in newest.rglob("*") if path.is_dir()), newest):
        shutil.move(place, kept)
        # Its step is gone with it, or is none.
        assert restore(folder).step == 1 or outcome(folder) == 2
        if place == newest:
            place.write_text("in the way")
            assert restore(folder).step == 1
            place.unlink()
        shutil.move(kept, place)
    assert outcome(folder) == 2


def test_every_part_of_every_leaf_is_vouched_for(tmp_path):
    whole = {**state(1), "cut": jnp.arange(2048.0).reshape(64, 32)}
    placed = parallel.state_sharding(whole, parallel.make_mesh(8, 4))
    save(tmp_path, 1, jax.device_put(whole, placed))
    about, arrays = orbax_files.read(tmp_path / "1")
    assert len(about.leaves["cut"].parts) == 4
    manifest.check(about.leaves, arrays)
    # Equal bytes of another type or shape are not the same.
    w = arrays["params/w"]
    wrong = {
        "another type in params/w": {"params/w": w.view(np.int32)},
        "another shape in params/w": {"params/w": w[..., None]},
    }
    for said, others in wrong.items():
        with pytest.raises(manifest.UnverifiedError, match=said):
            manifest.check(about.leaves, {**arrays, **others})
    # As if the manifest itself had been written of other values, or of too few.
    for name, leaf in about.leaves.items():
        for i, (start, stop, _) in enumerate(leaf.parts):
            other, rest = [(start, stop, "0" * 64)], leaf.parts[i + 1 :]
            for instead in (other, []) if 0 not in leaf.shape else (other,):
                parts = [*leaf.parts[:i], *instead, *rest]
                leaves = {**about.leaves, name: leaf._replace(parts=parts)}
                with pytest.raises(manifest.UnverifiedError, match=name):
                    manifest.check(leaves, arrays)


def test_what_is_no_checkpoint_is_passed_over_and_set_aside(folder):
    left, why = folder / "8.orbax-checkpoint-tmp", "cut off, or of an older version"
    for path in (folder / "9", folder / "7" / "manifest", left):
        path.mkdir(parents=True)
    found = restore(folder)
    whys = [(skipped.step, skipped.why) for skipped in found.skipped]
    assert whys == [(step, f"no manifest: {why}") for step in (9, 7)]
    assert left.exists()  # who only reads tidies nothing away
    with checkpoint.open_folder(folder) as opened:
        moved = checkpoint.set_aside(opened, found.skipped)
        assert [path.name for path in moved] == ["9.damaged", "7.damaged"]
        assert opened.steps() == [1, 2]
        checkpoint.save(opened, 7, state(7), {"pending": [{"loss": 7}]})
    assert not left.exists()
    assert outcome(folder) == 7
    (folder / "9").mkdir()
    with checkpoint.open_folder(folder) as opened:
        [moved] = checkpoint.set_aside(opened, [checkpoint.Skipped(9, "")])
    assert moved.name == "9.damaged2"


def test_all_that_does_not_fit_is_listed(folder):
    like = jax.eval_shape(lambda: state(0))
    like["params"]["w"] = jax.ShapeDtypeStruct((40, 9), jnp.float32)
    like["params"]["half"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    like["more"] = like.pop("count")
    misfits = (
        "count: int32[] for nothing; more: nothing for int32[]; "
        "params/half: bfloat16[5] for float32[5]; "
        "params/w: float32[40,8] for float32[40,9]"
    )
    said = f"must fit the net.*got 4 of 7 leaves that do not: {re.escape(misfits)}. Use"
    with refused(said):
        restore(folder, like)


def test_newest_best_and_every_kth_stay(tmp_path):
    scores = {1: 0.9, 2: 0.4, 3: 0.5, 4: None, 5: 0.8, 6: 0.4, 7: 0.7, 8: 0.6}
    kept = {}
    for step, score in scores.items():  # a start for each: scores are read again
        with checkpoint.open_folder(tmp_path, keep=2, keep_every=5) as folder:
            checkpoint.save(folder, step, {"x": jnp.zeros(2)}, {}, score=score)
        kept[step] = checkpoint.steps(tmp_path)
    assert kept[4] == [2, 3, 4]
    assert kept[5] == [2, 4, 5]
    assert kept[6] == [5, 6]  # as good, and newer
    assert kept[8] == [5, 6, 7, 8]


def test_the_list_says_what_each_is_good_for(folder, capsys, monkeypatch):
    run = runs.Run(folder.parent / "run")
    runs.write_json(run.config, config.to_dict(EXPERIMENTS["digits"].config))
    folder = folder.rename(run.checkpoints)
    (folder / "3").mkdir()
    for step, score in ((4, 0.5), (10, 0.7)):
        with checkpoint.open_folder(folder, keep=9) as opened:
            checkpoint.save(opened, step, state(step), {}, score=score)
    assert checkpoints.main([str(run.folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}/"
    assert [line.split()[0] for line in lines[1:]] == ["step", "1", "2", "3", "4", "10"]
    assert lines[4].endswith("-  damaged: no manifest: cut off, or of an older version")
    assert lines[5].endswith("0.5000  verified, best")
    assert lines[6].endswith("0.7000  verified, latest")
    shutil.rmtree(folder / "3")
    monkeypatch.chdir(run.folder.parent)
    assert checkpoints.main([run.folder.name]) == 0


def test_what_cannot_be_read_now_is_not_taken_for_damaged(folder, monkeypatch):
    def fails(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: no memory for it")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "restore", fails)
        with refused(r"cannot read checkpoint .*RESOURCE"):
            restore(folder)
    body = json.loads(manifest_of(folder).read_text())
    del body["sha256"]
    body["format"] += 1
    manifest_of(folder).write_text(manifest._seal(body))
    with refused("of format 1; got another"):
        restore(folder)
    assert checkpoint.steps(folder) == [1, 2]


def test_one_that_is_deleted_meanwhile_is_no_damage(folder):
    with checkpoint.open_folder(folder, read_only=True) as opened:
        shutil.rmtree(folder / "2")
        like = jax.eval_shape(lambda: state(0))
        found = checkpoint.restore(opened, like, on(1))
    assert (found.step, found.skipped) == (1, [])


def test_a_failed_save_is_known_before_the_next(folder):
    def save_and_look():
        with checkpoint.open_folder(folder) as opened:
            checkpoint.check(opened)
            checkpoint.save(
                opened, 3, {"w": np.random.default_rng(0).random(2**18)}, {}
            )
            for _ in range(3000):
                checkpoint.check(opened)
                time.sleep(0.01)
            pytest.fail("nothing was said of it")

    with no_file_beyond(2**16), refused("got File too large"):
        save_and_look()
    # And the last one stays.
    assert outcome(folder) == 2
    save(folder, 3, state(3))
    assert outcome(folder) == 3


def test_all_is_on_the_disk_before_it_has_its_name(folder, monkeypatch):
    seen = []

    def fsync(file):
        seen.append(Path(os.readlink(f"/proc/self/fd/{file}")))

    monkeypatch.setattr(orbax_files.os, "fsync", fsync)
    save(folder, 3, state(3))
    partial = folder / "3.orbax-checkpoint-tmp"
    assert partial in seen
    assert all(path.is_relative_to(partial) for path in seen)
    names = {path.name for path in files(folder / "3") if path.suffix != ".txt"}
    assert names <= {path.name for path in seen}
