"""The command line: an experiment's name, then its fields as flags."""

import dataclasses
import inspect
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from experiments import config, initial, validation
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
    experiment = EXPERIMENTS[name]
    others = ", ".join(other for other in EXPERIMENTS if other != name)

    def read(default: config.Config) -> config.Config:
        return tyro.cli(
            config.Config,
            default=default,
            args=flags,
            prog=f"{prog} {name}",
            # Indented, a table keeps its lines.
            description=f"{textwrap.indent(inspect.cleandoc(experiment.doc), '  ')}\n\n"
            f"Other experiments, to be named before the first flag: {others}.",
        )

    chosen = initial.resolved(read(experiment.config))
    if chosen.init_from is not None:
        # Flags replace what the weights say, and the weights what the experiment says.
        default = initial.like(experiment.config, initial.given(chosen))
        chosen = dataclasses.replace(read(default), init_from=chosen.init_from)
    validation.validate(chosen)
    validation.of_training(chosen)
    return chosen


def join_hosts() -> None:
    """Joins the other hosts of a job, where the environment names a coordinator.

    JAX_COORDINATOR_ADDRESS, and JAX_NUM_PROCESSES and JAX_PROCESS_ID where JAX cannot
    tell them from the cluster's own environment. Only the first host prints.

    Raises:
      ConfigError: the two numbers are not numbers.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        return
    import jax

    given = [os.environ.get(n) for n in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    try:
        count, index = (None if text is None else int(text) for text in given)
    except ValueError as error:
        raise config.ConfigError(
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers; got "
            f"{given[0]!r} and {given[1]!r}. Leave them out where JAX detects the "
            "cluster."
        ) from error
    jax.distributed.initialize(address, count, index)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def quiet() -> None:
    """Silences what Orbax reports through absl: it does it anyway."""
    logging.getLogger("absl").setLevel(logging.ERROR)


def guarded(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a command and leaves with its exit code; 2 and one message for bad input."""
    from diffusion_jax.training.checkpoint import CheckpointError
    from diffusion_jax.training.data import DataError

    quiet()
    expected: tuple[Any, ...] = (config.ConfigError, CheckpointError, DataError)
    try:
        join_hosts()
        code = main(sys.argv[1:])
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    except (ValueError, ImportError) as error:
        # The library's own: what must hold; what was got; what to do.
        if "; got " not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    except BrokenPipeError:
        # Whoever read what was printed, head for instance, has seen enough.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        code = 1
    except OSError as error:
        where = error.filename or "a file"
        print(
            f"error: {where} must be there and be ours to read or write; got "
            f"{error.strerror or error}. Check the path, its permissions and the disk.",
            file=sys.stderr,
        )
        code = BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code)
