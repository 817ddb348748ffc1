"""What TensorBoard reads of a run: all that was logged, each step once."""

import os
import shutil
import signal
import struct
import subprocess
import sys

import conftest
import pytest
from processes import QUICK, ROOT
from small_run import SMALL

from diffusion_jax.lab.run_folder import board, runs
from diffusion_jax.lab.schema.config import replace
from experiments import train

pytest.importorskip("tensorboardX")
EVERY = ["--train.log-every", "2", "--train.checkpoint-every", "4", "--sample.every"]
FLAGS = ["digits", *SMALL, *EVERY, "4"]
ASKED = "--train.tensorboard"
KILLED = f"""
import os, sys
from diffusion_jax.lab.run_folder import board
before = board.Board.line
def line(self, line, speed):
    before(self, line, speed)
    if line["step"] == 6:
        os.kill(os.getpid(), {signal.SIGKILL.value})
board.Board.line = line
from experiments import train
train.main(sys.argv[1:])
"""


def events(run):
    """Returns (tag, step, value) of all events, in their order, by their format."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = run.folder.glob("events.out.tfevents.*")
    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        found += [(value.tag, event.step, value) for value in event.summary.value]
    return found


def steps(run, tag):
    return [step for name, step, _ in events(run) if name == tag]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed after step 6, with a checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("board")
    words = [*FLAGS, "--output", str(folder), ASKED]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(conftest.CACHE)}
    env = {**os.environ, **QUICK, **cache, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, *words]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return runs.Run(folder / "digits")


def test_after_a_kill_every_step_is_there_once(killed):
    assert steps(killed, "loss") == [2, 4, 6]
    assert steps(killed, "samples") == [4]
    (path,) = killed.folder.glob("events.out.tfevents.*")
    with path.open("ab") as file:
        file.write(b"half of an event")
    other = path.with_name("events.out.tfevents.1.host")
    other.touch()
    assert train.main([*FLAGS, "--output", str(killed.folder.parent), ASKED]) == 0
    other.unlink()  # what another program wrote was left alone
    for tag in ("loss", "grad_norm", "learning_rate", "images_per_second"):
        assert steps(killed, tag) == [2, 4, 6, 8, 10, 12], tag
    assert steps(killed, "samples") == [4, 8, 12]
    logged = {line["step"]: line["loss"] for line in runs.read_lines(killed.metrics)}
    for tag, step, value in events(killed):
        if tag == "loss":
            assert value.simple_value == pytest.approx(logged[step])
        if tag == "samples":
            grid = killed.samples / f"step_{step:08d}.png"
            assert value.image.encoded_image_string == grid.read_bytes()


def test_what_was_logged_before_it_was_asked_for_is_there_too(killed):
    """And a run that is complete gets its file."""
    for path in killed.folder.glob("events.*"):
        path.unlink()
    at = ["--output", str(killed.folder.parent)]
    assert train.main([*FLAGS, *at]) == 0
    assert not [*killed.folder.glob("events.*")]
    assert train.main([*FLAGS, *at, ASKED]) == 0
    assert steps(killed, "loss") == [2, 4, 6, 8, 10, 12]


def test_what_is_of_later_steps_is_left_out(killed, tmp_path):
    """As a grid that was drawn after the checkpoint that a run goes on from."""
    run = runs.Run(shutil.copytree(killed.folder, tmp_path / "again"))
    asked = replace(runs.read_config(run), "train", tensorboard=True)
    with board.opened(asked, run, 8) as opened:
        opened.scalar("more", 9, 0.5)
    assert steps(run, "samples") == [4, 8]
    assert steps(run, "more") == [9]


def test_numbers_that_are_none_are_left_out(tmp_path):
    class Kept:
        def write_event(self, event):
            said.append(event.summary.value[0].tag)

        def flush(self):
            pass

    said = []
    line = {"step": 1, "loss": None, "skipped": 2, "grad_norm": float("nan")}
    board.Board(Kept(), tmp_path).line(line, {})
    assert said == ["skipped"]
