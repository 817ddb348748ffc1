"""The command line: an experiment's name, then its fields as flags."""

import dataclasses
import inspect
import io
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from diffusion_jax.lab.process import hosts
from diffusion_jax.lab.schema import checks, config
from diffusion_jax.lab.training import initial
from experiments.configs import EXPERIMENTS

# What a user can mend. Such an error is shown as it is, without a traceback.
BAD_INPUT = 2


# Its fields are flags without a prefix.
_Unnamed = Annotated[config.Config, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class Training:
    """What is to be trained, and how to take what is there already."""

    strict: bool = False
    """Refuse to go on where the newest checkpoint is damaged, instead of going on from
    the newest that verifies."""
    force: bool = False
    """Go on with other values than the run was begun with. What the network and the
    optimizer are made of must still fit the checkpoint."""
    official: bool = False
    """Train with the arithmetic of the authors' code: float32, TensorFlow's Adam, the
    gradient clipped in eight parts, an average without a ramp. Exact, and on one device
    nearly five times slower."""
    config: _Unnamed = dataclasses.field(default_factory=config.Config)


def parse(argv: Sequence[str], *, prog: str) -> config.Config:
    """Returns the configuration of `parse_training`."""
    return parse_training(argv, prog=prog).config


def parse_training(argv: Sequence[str], *, prog: str) -> Training:
    """Returns what the arguments describe, checked.

    Args:
      argv: an experiment's name (digits when the first one is a flag), then flags.
      prog: how the command is called, for `--help`.

    Raises:
      ConfigError: an unknown experiment, or values that do not fit.
      SystemExit: `--help`, or a flag that does not exist or has another type.
    """
    name, flags = _experiment(argv, prog)
    experiment = EXPERIMENTS[name]
    others = ", ".join(other for other in EXPERIMENTS if other != name)

    def read(default: config.Config) -> Training:
        return tyro.cli(
            Training,
            default=Training(config=default),
            args=flags,
            prog=f"{prog} {name}",
            # Indented, a table keeps its lines.
            description=f"{textwrap.indent(inspect.cleandoc(experiment.doc), '  ')}\n\n"
            f"Other experiments, to be named before the first flag: {others}.",
        )

    base = experiment.config
    given = read(base)
    if given.official:  # flags of its fields still count
        base = config.official(base)
        given = read(base)
    chosen = initial.resolved(given.config, force=given.force)
    if chosen.init_from is not None:
        # Flags replace what the weights say, and the weights what the experiment says.
        default = initial.like(base, initial.given(chosen, force=given.force))
        chosen = dataclasses.replace(read(default).config, init_from=chosen.init_from)
    checks.validate(chosen)
    checks.of_training(chosen)
    return dataclasses.replace(given, config=chosen)


def join_hosts(argv: Sequence[str], *, several: bool) -> list[str]:
    """Returns the command's own arguments after joining the other hosts of its job.

    Args:
      argv: all arguments; those about hosts are taken out.
      several: whether the command works on several hosts.

    Raises:
      ConfigError: it does not, or the hosts cannot be found.
    """
    given, rest = hosts.split(argv)
    if {"-h", "--help"} & set(rest):
        return rest
    job = hosts.decide(given, os.environ)
    if job is None:
        said = None if given else hosts.note(os.environ)
        if several and said:
            print(said, file=sys.stderr)
        return rest
    if not several:
        raise config.ConfigError(
            "this command must run on one host, with any number of devices; got "
            f"several hosts by {job.source}. Start it once, with --hosts 1."
        )
    hosts.join(job)
    return rest


def parse_with(
    options: Any, argv: Sequence[str], *, prog: str, description: str | None
) -> Any:
    """Returns the options of a command that has a configuration among them, `config`.

    Args:
      options: their dataclass.
      argv: an experiment's name (digits when the first one is a flag), then flags.
      prog: how the command is called.
      description: what `--help` says of it.

    Raises:
      ConfigError: as `parse`.
    """
    name, flags = _experiment(argv, prog)
    found = tyro.cli(
        options,
        default=options(config=EXPERIMENTS[name].config),
        args=flags,
        prog=f"{prog} {name}",
        description=description,
    )
    if found.config.init_from is not None:
        raise config.ConfigError(
            "init_from must be left out: the values of weights change nothing here; "
            f"got {found.config.init_from!r}. Say what the network is by its fields."
        )
    checks.validate(found.config)
    return found


def _experiment(argv: Sequence[str], prog: str) -> tuple[str, list[str]]:
    """Returns the experiment that comes first, and the flags after it."""
    name, flags = "digits", list(argv)
    if flags and not flags[0].startswith("-"):
        name = flags.pop(0)
    if name not in EXPERIMENTS:
        raise config.ConfigError(
            f"the experiment must be one of {', '.join(EXPERIMENTS)}; got {name!r}. "
            f"Say, for instance: {prog} cifar10"
        )
    return name, flags


def quiet() -> None:
    """Silences what orbax and tensorstore say of errors that we say ourselves."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _unraisable(error: Any) -> None:
    """Says what failed where nobody could catch it."""
    # After a failed read or write all others end into an event loop that is gone.
    if str(error.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(error)


def guarded(main: Callable[[Sequence[str]], int], *, several: bool = False) -> None:
    """Runs a command and leaves with its exit code; 2 and one message for bad input.

    Args:
      main: from the arguments to the exit code.
      several: whether it works on several hosts.
    """
    from diffusion_jax.checkpoints.checkpoint import CheckpointError
    from diffusion_jax.data.datasets import DataError

    quiet()
    for stream in (sys.stdout, sys.stderr):
        # A path may be no text in any encoding, and is shown all the same.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    expected: tuple[Any, ...] = (config.ConfigError, CheckpointError, DataError)
    try:
        raise SystemExit(main(join_hosts(sys.argv[1:], several=several)))
    except SystemExit as left:
        if several and left.code == 0 and {"-h", "--help"} & set(sys.argv):
            print(hosts.HELP)
        if left.code == BAD_INPUT:  # by a flag that this host alone may have wrong
            hosts.leave(BAD_INPUT)
        raise
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
    hosts.leave(code)
    raise SystemExit(code)
