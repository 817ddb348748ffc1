"""A disk that is full: the path is named, nothing is lost, and the run goes on later.

A limit on the size of a file stands for it: to write beyond fails as on a full disk,
for the interpreter and for what writes checkpoints alike.
"""

import os

import numpy as np
import pytest
from PIL import Image
from processes import no_file_beyond

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.training import averages

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
WEIGHTS = {"w": np.ones(500, np.float32)}
WRITERS = (
    lambda path: pictures.save(Image.fromarray(NOISE), path),
    lambda path: averages.save(path, WEIGHTS, 3, 0.1),
    lambda path: runs.write_json(path, {"a": [1] * 500}),
    lambda path: runs.cut_lines(path, 10_000),
)


@pytest.mark.parametrize("write", WRITERS)
def test_what_cannot_be_written_leaves_what_was_there(write, tmp_path):
    path = tmp_path / "file"
    before = b"".join(b'{"step": %d}\n' % n for n in range(500))
    path.write_bytes(before)
    with no_file_beyond(1000), pytest.raises(OSError, match="large") as caught:
        write(path)
    assert str(caught.value.filename).startswith(str(tmp_path))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]
    write(path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", WRITERS[1:])
def test_what_a_run_needs_is_on_the_disk_before_it_has_its_name(
    write, tmp_path, monkeypatch
):
    path, synced = tmp_path / "file", []
    path.write_text('{"step": 1}\n')

    def fsync(file):
        partial = os.readlink(f"/proc/self/fd/{file}")
        synced.append((os.path.dirname(partial), os.path.getsize(partial)))
        assert path.read_text() == '{"step": 1}\n'

    monkeypatch.setattr(os, "fsync", fsync)
    write(path)
    assert synced == [(str(tmp_path), path.stat().st_size)]


def test_lines_are_synced_when_asked_for(tmp_path, monkeypatch):
    run, synced = runs.Run(tmp_path), []
    monkeypatch.setattr(os, "fsync", synced.append)
    runs.append_line(run.metrics, {"step": 1})
    runs.append_line(run.speed, {"step": 1})
    assert synced == []
    runs.to_disk(run)
    assert len(synced) == 2


def test_a_line_that_was_cut_off_is_dropped_and_written_again(tmp_path):
    path = tmp_path / "lines"
    runs.append_line(path, {"step": 1, "text": "a" * 80})
    with no_file_beyond(150), pytest.raises(OSError, match="large") as caught:
        runs.append_line(path, {"step": 2, "text": "b" * 80})
    assert caught.value.filename == str(path)
    runs.cut_lines(path, 5)
    assert [line["step"] for line in runs.read_lines(path)] == [1]
    runs.append_line(path, {"step": 2})
    assert [line["step"] for line in runs.read_lines(path)] == [1, 2]


@pytest.mark.parametrize("line", ["3", '{"loss": 1}', "\0\0\0", "\xff"])
def test_a_log_that_somebody_damaged_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n', encoding="latin-1")
    with pytest.raises(ConfigError, match=rf"{path} must .*; got .* in line 2\. Rest"):
        runs.read_lines(path)


OTHERS = (
    '{"seed": 1',  # damaged
    "[1]",
    '{"seed": 2, "rule": ["ddim", 0.5], "table": [3]}',  # of another seed
    '{"rule": ["ddim", 0.5], "table": [3]}',
    '{"seed": 1, "rule": ["ddim", 0.5], "table": [3], "x": 0}',
    '{"seed": 1, "rule": ["ddim", 0.5]}',
    '{"seed": 1, "rule": ["ddim", 0.5], "table": 3}',
)


def test_a_result_is_taken_from_a_file_that_the_same_has_made(tmp_path):
    path, about = tmp_path / "a.json", {"seed": 1, "rule": ("ddim", 0.5)}
    runs.write_json(path, {**about, "table": [3, 4]})
    assert runs.recalled(path, about, lambda table: sum(table)) == 7
    for text in OTHERS:
        path.write_text(text)
        assert runs.recalled(path, about, lambda table: sum(table)) is None, text
    path.unlink()
    assert runs.recalled(path, about, dict) is None


def test_what_a_killed_process_began_to_write_is_removed(tmp_path):
    run = runs.Run(tmp_path)
    run.samples.mkdir()
    begun = [".config.json.7.tmp", ".metrics.jsonl.7.tmp", "samples/.step_1.png.7.tmp"]
    other = [".fid.json.7.tmp", "config.json", "metrics.jsonl"]
    for name in (*begun, *other):
        (tmp_path / name).write_text("")
    runs.remove_partials(run)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == set(other)


def test_room_is_asked_for_before_and_little_is_said(tmp_path, monkeypatch, capsys):
    state = {"w": np.zeros(1000, np.float32), "step": np.zeros((), np.int32)}

    def check(free, there=0):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: usage)
        runs.check_room(runs.Run(tmp_path), state, there, 3)
        return capsys.readouterr().err

    with pytest.raises(ConfigError, match=f"{tmp_path}: its disk has no room"):
        check(4003)
    assert "has room for 1 checkpoint of 0.00 MiB more; train.keep = 3" in check(4004)
    assert check(4004, there=4) == ""  # it takes the place of one that goes
    assert "takes up to 5" in check(5 * 4004 - 1)
    assert check(5 * 4004) == ""
