"""The command line: an experiment's name, then its fields as flags."""

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from experiments import config
from experiments.configs import EXPERIMENTS

# What a user can mend. Such an error is shown as it is, without a traceback.
BAD_INPUT = 2


def parse(argv: Sequence[str], *, prog: str) -> config.Config:
    """Returns the checked configuration that the arguments describe.

    Args:
      argv: an experiment's name (digits when the first one is a flag), then flags.
      prog: how the command is called, for `--help`.

    Raises:
      ConfigError: an unknown experiment, or values that do not fit.
      SystemExit: `--help`, or a flag that does not exist or has another type.
    """
    name, flags = "digits", list(argv)
    if flags and not flags[0].startswith("-"):
        name = flags.pop(0)
    if name not in EXPERIMENTS:
        raise config.ConfigError(
            f"the experiment must be one of {', '.join(EXPERIMENTS)}; got {name!r}. "
            f"Say, for instance: {prog} cifar10"
        )
    module = EXPERIMENTS[name]
    others = ", ".join(other for other in EXPERIMENTS if other != name)
    chosen: config.Config = tyro.cli(
        config.Config,
        default=module.CONFIG,
        args=flags,
        prog=f"{prog} {name}",
        description=f"{inspect.getdoc(module)}\n\nOther experiments: {others}.",
    )
    config.validate(chosen)
    return chosen


def guarded(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a command and leaves with its exit code; 2 and one message for bad input."""
    from diffusion_jax.training.checkpoint import CheckpointError
    from diffusion_jax.training.data import DataError

    # Orbax reports through absl what it does anyway and nobody needs to read.
    logging.getLogger("absl").setLevel(logging.ERROR)
    expected: tuple[Any, ...] = (config.ConfigError, CheckpointError, DataError)
    try:
        code = main(sys.argv[1:])
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    raise SystemExit(code)
