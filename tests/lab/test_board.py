"""What TensorBoard reads of a run: all that was logged, each step once."""

import shutil
import struct

import pytest
from small_run import SMALL

from diffusion_jax.lab.run_folder import board, runs
from diffusion_jax.lab.schema.config import replace
from experiments import train

pytest.importorskip("tensorboardX")
EVERY = ["--train.log-every", "2", "--train.checkpoint-every", "4", "--sample.every"]
FLAGS = ["digits", *SMALL, *EVERY, "4"]
ASKED = "--train.tensorboard"


def events(run):
    """Returns (tag, step, value) of all events, in their order, by their format."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = run.folder.glob("events.out.tfevents.*")
    content, found = path.read_bytes(), []
    while len(content) > 16:
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
    line, lost = board.Board.line, {}

    def ends(self, values, speed):
        line(self, values, speed)
        if values["step"] == 6:
            lost[self.path] = self.path.read_bytes()  # as a kill leaves it
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board.Board, "line", ends)
        with pytest.raises(KeyboardInterrupt):
            train.main([*FLAGS, "--output", str(folder), ASKED])
    for path, content in lost.items():
        path.write_bytes(content + b"half of an event")
    return runs.Run(folder / "digits")


def test_after_a_kill_every_step_is_there_once(killed):
    assert steps(killed, "loss") == [2, 4, 6]
    assert steps(killed, "samples") == [4]
    other = killed.folder / "events.out.tfevents.1.host"
    other.touch()
    at = [*FLAGS, "--output", str(killed.folder.parent)]
    assert train.main([*at, ASKED]) == 0
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
    # What was logged before it was asked for is there too, of a complete run as well.
    for path in killed.folder.glob("events.*"):
        path.unlink()
    assert train.main(at) == 0
    assert not [*killed.folder.glob("events.*")]
    assert train.main([*at, ASKED]) == 0
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
