"""Shows a run in TensorBoard: what is logged goes to <run>/events.out.tfevents.* too.

These files are made of metrics.jsonl, speed.jsonl and samples/, and made anew when a
run goes on. So each step is there once, whatever was killed, and also what was logged
before `train.tensorboard` was asked for.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_jax.errors import needs
from diffusion_jax.lab.process import hosts
from diffusion_jax.lab.run_folder import results, runs
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.json_fields import is_finite

SUFFIX = ".diffusion_jax"
"""At the end of the names of our files: only these are made anew."""


def check(config: Config) -> None:
    """Raises MissingError where TensorBoard is asked for, and nothing can write it."""
    if config.train.tensorboard:
        needs("tensorboardX", "write for TensorBoard", "tensorboard")


class Board:
    """A file of events that is being written; of no file, where none is wanted."""

    def __init__(self, writer: Any = None, path: Path | None = None) -> None:
        """Takes the writer of a file, and its path."""
        self.writer, self.path = writer, path

    def line(self, line: dict[str, Any], speed: dict[str, Any]) -> None:
        """Adds a line of metrics.jsonl, and that of speed.jsonl for the same step."""
        quarters = line.get("loss_by_time") or []
        values = {
            **{name: line.get(name) for name in ("loss", "held_out_loss", "grad_norm")},
            **{name: line.get(name) for name in ("learning_rate", "skipped")},
            **{f"loss_by_time/quarter_{i}": x for i, x in enumerate(quarters, 1)},
            "images_per_second": speed.get("images_per_second"),
        }
        for name, value in values.items():
            if is_finite(value):
                self.scalar(name, line["step"], value, speed.get("time"))

    def scalar(
        self, name: str, step: int, value: float, at: float | None = None
    ) -> None:
        """Adds a number."""
        self._add(step, at, tag=name, simple_value=value)

    def picture(self, step: int, path: Path) -> None:
        """Adds a grid of samples, as it is in its PNG file."""
        if self.writer is None or not path.exists():
            return
        with Image.open(path) as image:
            about = {"width": image.width, "height": image.height}
        png = {"encoded_image_string": path.read_bytes(), "colorspace": 3, **about}
        self._add(step, path.stat().st_mtime, tag="samples", image=png)

    def _add(self, step: int, at: float | None, **value: Any) -> None:
        if self.writer is None or self.path is None:
            return
        from tensorboardX.proto.event_pb2 import Event

        summary = {"value": [value]}
        event = Event(step=step, wall_time=at or time.time(), summary=summary)
        with runs.naming(self.path):
            self.writer.write_event(event)
            self.writer.flush()


@contextmanager
def opened(config: Config, run: runs.Run, step: int) -> Iterator[Board]:
    """Opens a file of events that has all of a run up to a step.

    The configuration says whether there is to be one. The first host alone writes.
    """
    if not (config.train.tensorboard and hosts.first()):
        yield Board()
        return
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    for path in run.folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        path.unlink()
    with runs.naming(run.folder):
        writer = EventsWriter(str(run.folder / "events"), SUFFIX)
    try:
        board = Board(writer, Path(writer._file_name))
        # Whoever looks on forgets what it had read.
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(session_log=start, wall_time=time.time()))
        _catch_up(board, run, step)
        yield board
    finally:
        writer.close()


def _catch_up(board: Board, run: runs.Run, step: int) -> None:
    """Adds what was logged up to a step."""
    speeds = {line["step"]: line for line in runs.read_lines(run.speed)}
    for line in runs.read_lines(run.metrics):
        board.line(line, speeds.get(line["step"], {}))
    for path in sorted(run.samples.glob("step_*.png")):
        drawn = path.stem.removeprefix("step_")
        if drawn.isdecimal() and int(drawn) <= step:
            board.picture(int(drawn), path)
    for at, value in sorted(results.in_training(run).items()):
        if at <= step:
            board.scalar("distance", at, value)
