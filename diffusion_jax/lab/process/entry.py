"""Runs a command: joins the hosts of its job, prints one error, gives the exit code."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from diffusion_jax import errors
from diffusion_jax.lab.process import flags, joining
from diffusion_jax.lab.schema import checks

# Exit code of errors that a user can mend, which are printed without a traceback.
BAD_INPUT = 2

Options = TypeVar("Options")


def quiet() -> None:
    """Silences the logs of orbax and tensorstore, whose errors we print ourselves."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _unraisable(error: Any) -> None:
    # After one failed read or write the others report that their event loop is closed.
    if str(error.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(error)


def note_warnings() -> None:
    """Prints each warning as a note of one line, above a bar if there is one."""

    def show(message: Any, category: Any, *_: Any, **__: Any) -> None:
        # Such an image is refused by an error of its own.
        if category.__name__ != "DecompressionBombWarning":
            tqdm.write(f"note: {message}", file=sys.stderr)

    warnings.showwarning = show


def guarded(main: Callable[[Sequence[str]], int], *, several: bool = False) -> None:
    """Runs a command and exits with its code; with 2 and one message for bad input.

    `several` is whether it works on several hosts.
    """
    from diffusion_jax.checkpoints.checkpoint import CheckpointError

    quiet()
    note_warnings()
    for stream in (sys.stdout, sys.stderr):
        # A path may have bytes that are no text: they are printed escaped.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    ours = errors.ConfigError, errors.DataError, errors.MissingError, CheckpointError
    code, said = BAD_INPUT, ""
    try:
        _run(main, several)
    except (*ours, ValueError) as error:
        # Those of the library say what must hold; what was got; what to do.
        if not isinstance(error, ours) and "; got " not in str(error):
            raise
        said = f"error: {error}"
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = (
            f"error: cannot go on: {str(error).splitlines()[0][:200]}. Give a smaller "
            "batch, or, in training, --train.accumulate 4 and then --net.remat."
        )
    except BrokenPipeError:
        # Whatever reads our output, head for instance, has stopped reading.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        code = 1
    except OSError as error:
        said = (
            f"error: cannot read or write {error.filename or 'a file'}: "
            f"{error.strerror or error}. Check the path, its permissions and the disk."
        )
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    if said:
        print(said, file=sys.stderr)
    joining.leave(code)
    raise SystemExit(code)


def _run(main: Callable[[Sequence[str]], int], several: bool) -> None:
    """Raises SystemExit with the exit code of a command."""
    try:
        raise SystemExit(main(join_hosts(sys.argv[1:], several=several)))
    except SystemExit as left:
        if several and left.code == 0 and flags.asked(sys.argv):
            print(joining.HELP if flags.HELP_ALL in sys.argv else joining.HINT)
        if left.code == BAD_INPUT:  # by a flag that this host alone may have wrong
            joining.leave(BAD_INPUT)
        raise


def parse(
    options: type[Options], argv: Sequence[str], command: str, description: str | None
) -> Options:
    """Returns a command's options as the arguments give them.

    Raises:
      ConfigError: a value that is not as its field says.
      SystemExit: `--help`, or a flag that does not exist or has another type.
    """
    found: Options = flags.read(
        options, args=argv, prog=typed(command), description=description
    )
    checks.of_options(found)
    return found


def typed(command: str) -> str:
    """Returns how a command was called, for its `--help`.

    >>> typed("train")
    'python -m experiments.train'
    """
    if any(Path(word).stem == "diffusion-jax" for word in sys.orig_argv[:2]):
        return f"diffusion-jax {command}"
    return f"python -m experiments.{command}"


def join_hosts(argv: Sequence[str], *, several: bool) -> list[str]:
    """Returns the command's own arguments after joining the other hosts of its job.

    Those about hosts are taken out. `several` is whether the command works on several.

    Raises:
      ConfigError: it does not, or the hosts cannot be found.
    """
    given, rest = joining.split(argv)
    if flags.asked(rest):
        return rest
    job = joining.decide(given, os.environ)
    if job is None:
        said = None if given else joining.note(os.environ)
        if several and said:
            print(said, file=sys.stderr)
        return rest
    if not several:
        raise errors.ConfigError(
            "this command must run on one host, with any number of devices; got "
            f"several hosts by {job.source}. Start it once, with --hosts 1."
        )
    joining.join(job)
    return rest
