"""Shares numbers, files and the step to stop at between the hosts of a job."""

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.errors import ConfigError
from diffusion_jax.training import parallel

SEEN_WITHIN = 30.0
"""Seconds within which a file on a shared disk must be seen by all hosts."""
ASK_EVERY = 10
"""Steps between two questions whether any host was told to stop."""


def first() -> bool:
    """Returns whether this is the first host, which writes and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a note on stderr, on the first host."""
    if first():
        print(text, file=sys.stderr, flush=True)


def screen() -> Any:
    """Returns where progress is shown: None, the usual place, on the first host."""
    return None if first() else open(os.devnull, "w")


def tell(value: int) -> int:
    """Returns the first host's number on every host; all must call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def tell_number(value: float) -> float:
    """Returns the first host's number on every host, to the bit of a float32."""
    return float(np.int32(tell(int(np.float32(value).view(np.int32)))).view(np.float32))


def check_same(what: str, text: str) -> None:
    """Raises ConfigError on all hosts unless all have the same text.

    What differs would otherwise be found by hosts that wait for each other for ever.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.int32)
    every = np.asarray(multihost_utils.process_allgather(mine))
    others = [i for i in range(len(every)) if (every[i] != every[0]).any()]
    if others:
        raise ConfigError(
            f"{what} must be the same on all hosts; got another on host "
            f"{', '.join(map(str, others))} than on host 0. Start the same command, "
            "with the same files, on each."
        )


def check_shared(folder: Path) -> None:
    """Raises ConfigError on all hosts unless all see what the first writes in a folder.

    Also where the hosts are several, but never joined.

    The folder is made when missing.
    """
    if jax.process_count() == 1:
        return
    if not jax.distributed.is_initialized():
        raise ConfigError(
            f"{jax.process_count()} hosts must be joined, to write checkpoints "
            "together; got devices of all without a coordinator. Add: --hosts auto."
        )
    token = tell(uuid.uuid4().int & 0x7FFFFFFF)
    file = folder / f".hosts_{token:08x}"
    if first():
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    tell(0)  # by now it is there
    until = time.monotonic() + SEEN_WITHIN
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.1)
    seen = np.asarray(multihost_utils.process_allgather(np.asarray(file.exists())))
    if first():
        file.unlink(missing_ok=True)
    if not seen.all():
        blind = ", ".join(str(i) for i in np.flatnonzero(~seen.ravel()))
        raise ConfigError(
            f"{folder.resolve()} must be on a disk that all hosts share; got nothing "
            f"on host {blind} of what host 0 wrote there. Give a folder on a shared "
            "disk, by its whole path: RUN, or in training --output /shared/runs."
        )


def make_stop(requested: list[int]) -> Callable[[int, bool], bool]:
    """Returns a function of (step, last) that says whether to stop after this step.

    On one host that is as soon as a signal is in the list, or at the last step. On
    several all stop at the same step, whichever got the signal: every `ASK_EVERY` steps
    the devices find the largest number in the list of any host, which is read one step
    later, so that no step waits for it. Then, and at the last step, all have it in
    their lists.

    The list has the signals that came, by number; see `stopping.requests`.
    """
    if jax.process_count() == 1:
        return lambda step, last: last or bool(requested)
    mesh = parallel.make_mesh()
    largest = jax.jit(lambda x: x.max(), out_shardings=parallel.replicated(mesh))
    asked: list[jax.Array] = []

    def ask() -> jax.Array:
        mine = np.full(jax.local_device_count(), max(requested, default=0), np.int32)
        return largest(parallel.shard(mine, mesh))

    def stop(step: int, last: bool) -> bool:
        number = int(asked.pop()) if asked else 0
        if last:
            number = int(ask())
        if last or number:
            requested[:] = [number] * bool(number)
            return True
        if step % ASK_EVERY == 0:
            asked.append(ask())
        return False

    return stop
