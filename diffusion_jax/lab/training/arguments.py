"""The command line: an experiment's name, then its fields as flags."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import tyro

from diffusion_jax import errors
from diffusion_jax.lab.process import flags
from diffusion_jax.lab.schema import checks, config

# Its fields are flags without a prefix.
Unnamed = Annotated[config.Config, tyro.conf.arg(name="")]
DEFAULT = config.Config()


@dataclasses.dataclass(frozen=True)
class Training:
    """What is to be trained, and how to take what is there already."""

    strict: bool = False
    """Refuse to go on (resume) where the newest checkpoint is damaged, instead of going
    on from the newest that verifies."""
    force: bool = False
    """Go on with other values than the run was begun with. What the network and the
    optimizer are made of must still fit the checkpoint."""
    official: bool = False
    """Train with the arithmetic of the authors' code: float32, TensorFlow's Adam, the
    gradient clipped in eight parts, an average without a ramp. Exact, and on one device
    more than four times slower."""
    MAIN: ClassVar = (
        "name output init_from data.source data.image_size "
        "data.hold_out diffusion.schedule diffusion.prediction net.channels "
        "net.classes optimizer.learning_rate train.steps train.stop_at "
        "train.batch_size train.checkpoint_every "
        "sample.sampler"
    )
    config: Unnamed = DEFAULT


Experiments = Mapping[str, config.Experiment]
AGAIN = "The same command again goes on where the run stopped (resume)."


def parse(argv: Sequence[str], experiments: Experiments, *, prog: str) -> config.Config:
    """Returns the configuration of `parse_training`."""
    return parse_training(argv, experiments, prog=prog).config


def parse_training(
    argv: Sequence[str],
    experiments: Experiments,
    *,
    prog: str,
    overview: str = "",
    of: str | None = None,
) -> Training:
    """Returns what the arguments describe, checked.

    The arguments are an experiment's name (digits when the first one is a flag), then
    flags. `overview` is what `--help` says where no experiment is named, and `of` what
    stands there for its name.

    Raises:
      ConfigError: an unknown experiment, or values that do not fit.
      SystemExit: `--help`, or a flag that does not exist or has another type.
    """
    name, rest = _experiment(argv, experiments, prog)
    named, experiment = len(rest) < len(argv), experiments[name]
    doc = inspect.cleandoc(experiment.doc)
    others = "Other experiments, to be named before the first flag: " + ", ".join(
        other for other in experiments if other != name
    )

    def read(default: config.Config) -> Training:
        found: Training = flags.read(
            Training,
            default=Training(config=default),
            args=rest,
            prog=f"{prog} {of or name}" if named else f"{prog} [EXPERIMENT]",
            description=f"{doc}\n\n{others}\n\n{AGAIN}",
            brief=f"{doc if named else overview}\n\n{AGAIN}",
        )
        return found

    base = experiment.config
    given = read(base)
    if given.official:  # flags of its fields still count
        base = config.official(base)
        given = read(base)
    if given.config.data.source != base.data.source:
        # That half may be mirrored is known of the experiment's own: letters may not.
        other = config.replace(base, "data", flip=False, hold_out=0.0)
        given = read(other)
        print(inherited(name, base, given.config))
        base = other
    if given.config.train.epochs and given.config.train.steps != base.train.steps:
        raise errors.ConfigError(
            "train.steps must be left out with train.epochs, which decides it; got "
            f"{given.config.train.steps}. Change it with --train.epochs alone."
        )
    # Loads Flax and Optax: not for --help, nor for a flag that does not exist.
    from diffusion_jax.lab.training import initial

    chosen = initial.resolved(given.config, force=given.force)
    if chosen.init_from is not None:
        # Flags replace what the weights say, and the weights what the experiment says.
        default = initial.like(base, initial.given(chosen, force=given.force))
        chosen = dataclasses.replace(read(default).config, init_from=chosen.init_from)
    checks.validate(chosen)
    checks.of_training(chosen)
    return dataclasses.replace(given, config=chosen)


def inherited(name: str, base: config.Config, given: config.Config) -> str:
    """Returns in words what other images have of an experiment, and what not."""
    shape, ending = "x".join(map(str, given.data.shape)), ""
    if given.data.flip:
        shape += ", mirrored"
    elif base.data.flip:
        ending = f"; not mirrored, as those of {name} are: that is --data.flip"
    of = f"network and training of {name}"
    return f"images of {given.data.source} as {shape}, with the {of}{ending}"


def parse_with(
    options: Any,
    argv: Sequence[str],
    experiments: Experiments,
    *,
    prog: str,
    description: str | None,
) -> Any:
    """Returns the options of a command that has a configuration among them, `config`.

    The arguments are as of `parse_training`.

    Raises:
      ConfigError: as `parse`.
    """
    name, rest = _experiment(argv, experiments, prog)
    found = flags.read(
        options,
        default=options(config=experiments[name].config),
        args=rest,
        prog=f"{prog} {name}",
        description=description,
    )
    if found.config.init_from is not None:
        raise errors.ConfigError(
            "init_from must be left out: the values of weights change nothing here; "
            f"got {found.config.init_from!r}. Say what the network is by its fields."
        )
    if found.config.data.latent is not None:
        raise errors.ConfigError(
            "data.latent must be left out: nothing is looked up here; got "
            f"{found.config.data.latent!r}. Name an experiment on images."
        )
    checks.of_options(found)
    checks.validate(found.config)
    return found


def _experiment(
    argv: Sequence[str], experiments: Experiments, prog: str
) -> tuple[str, list[str]]:
    """Returns the experiment that comes first, and the rest after it."""
    name, rest = "digits", list(argv)
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
    if name not in experiments:
        close = difflib.get_close_matches(name, experiments, n=1)
        raise errors.ConfigError(
            f"the experiment must be one that {prog} --help lists; got {name!r}. "
            + (
                f"Did you mean {close[0]}?"
                if close
                else f"Say, for instance: {prog} digits"
            )
        )
    return name, rest
