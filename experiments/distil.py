"""Trains a student that draws in few steps: `experiments.distil RUN [METHOD]`.

RUN is the teacher, any trained run or network in a file. METHOD is one of

  ect                   ends of the data's paths, by shrinking steps (default)
  consistency           ends of the teacher's paths, by derivatives; slow
  consistency_training  ends of the data's paths, by derivatives; slow
  progressive           two steps of DDIM become one, again and again

The student is a run of its own, named after both, which all commands take. All else is
as in experiments.train: flags, checkpoints, averages, devices, exit codes.
"""

from collections.abc import Sequence

from diffusion_jax.errors import raise_unknown
from diffusion_jax.lab.process import entry, flags
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import Config, Experiment
from diffusion_jax.lab.schema.few import DISTILLED
from diffusion_jax.lab.schema.students import student
from diffusion_jax.lab.training import arguments


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns RUN and METHOD, as far as they are given, and the flags."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return list(argv[: min(count, 2)]), list(argv[min(count, 2) :])


def main(argv: Sequence[str]) -> int:
    """Trains the student of the arguments; returns the exit code."""
    named, rest = split(argv)
    asked = named[1] if len(named) > 1 else DISTILLED[0]
    if asked not in DISTILLED:
        raise_unknown("METHOD", asked, DISTILLED)
    method = next(known for known in DISTILLED if known == asked)
    if named or not flags.asked(rest):
        run = runs.find(named[0] if named else None)
        source = str(run.network.path if run.network else run.folder)
        config = student(runs.read_config(run), method, init_from=source)
    else:
        config = student(Config(), method, init_from="RUN")
    given = arguments.parse_training(
        [config.name, *rest],
        {config.name: Experiment(config, __doc__ or "")},
        prog=entry.typed("distil"),
        of="RUN [METHOD]",
    )
    # Loads Flax and Optax, which no mistake in the arguments should wait for.
    from diffusion_jax.lab.training import loop

    return loop.train(given.config, strict=given.strict, force=given.force)


if __name__ == "__main__":
    entry.guarded(main, several=True)
