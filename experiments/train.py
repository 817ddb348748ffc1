"""Trains a network: `python -m experiments.train [EXPERIMENT] [--field value ...]`.

The same command again goes on where the run stopped (resume).

Exit codes: 0 when the run is complete, or stopped at train.stop_at; 2 for what can be
mended (arguments, files, a disk that is full, another process in the same folder); 3
when it diverged; 128 + n after signal n, SIGINT (130) or SIGTERM (143): after the first
with a checkpoint of the step it came in, after a second at once.
"""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # While the rest is loaded, Ctrl-C ends this silently.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
from collections.abc import Sequence
from contextlib import suppress

from diffusion_jax.errors import DivergedError
from diffusion_jax.lab.process import entry
from diffusion_jax.lab.training import arguments
from diffusion_jax.training import compilation
from experiments.configs import EXPERIMENTS, table

DIVERGED = 3
"""The exit code of a run that is given up."""


def main(argv: Sequence[str]) -> int:
    """Trains as the arguments say; returns the exit code."""
    given = arguments.parse_training(
        argv, EXPERIMENTS, prog=entry.typed("train"), overview=table()
    )
    # Loads Flax and Optax, which no mistake in the arguments should wait for.
    from diffusion_jax.lab.training import loop

    return loop.train(given.config, strict=given.strict, force=given.force)


def command(argv: Sequence[str]) -> int:
    """As `main`, with an exit code and a message for a run that diverged."""
    try:
        return main(argv)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED


if __name__ == "__main__":
    if "--train.deterministic" in sys.argv:
        # The flag must be set before JAX looks for devices, which it does when hosts
        # join, before `main`. `train` says what is wrong.
        with suppress(ValueError):
            compilation.ask()
    try:
        entry.guarded(command, several=True)
    except SystemExit as left:
        if left.code != entry.BAD_INPUT:
            raise
        # The usual exit waits for the threads of orbax, which never end after a save
        # whose folder could not be made.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(entry.BAD_INPUT)
