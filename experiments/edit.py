"""Edits images with a trained network: `python -m experiments.edit [RUN] COMMAND ...`.

RUN is a run's folder or name, before the command; the newest in runs/ when not given.
The image files may be anything that Pillow reads; one of another size than the run's
is cut to the shape of the run's images and resized, as the files of a data folder are.

A command writes a picture, with what it was given at the sides, and beside it a folder
of the results as single PNGs of the run's own size.
"""

from collections.abc import Sequence
from typing import Any

import jax

from diffusion_jax.errors import ConfigError, counted
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.drawing import edit_options
from diffusion_jax.lab.process import entry, flags, progress
from diffusion_jax.lab.schema.checks import of_denoiser, of_options, with_sampling


def main(argv: Sequence[str]) -> int:
    """Edits as the arguments ask; returns the exit code."""
    name, command, options = parse(argv)
    of_options(options)
    of_options(options.shared)
    # Load Flax, which no mistake in the arguments should wait for.
    from diffusion_jax.lab.drawing import edits, outputs
    from diffusion_jax.lab.trained import opening, weights
    from diffusion_jax.lab.wiring import build

    shared: edit_options.Shared = options.shared
    run, config = opening.opened(name, options, which=shared.which)
    of_denoiser(config)
    sampled = edits.deterministic if command == "slerp" else with_sampling
    config = sampled(config, shared.how)
    chosen = config.net.classes or config.sample.classifier_guidance
    if chosen and config.sample.label is None:
        raise ConfigError(
            "label must be given with a run that has classes, or a classifier that "
            "guides; got none. Name the class of the image with --label."
        )
    if config.sample.sampler == "ode" and build.is_continuous(config):
        raise ConfigError(
            "sampler must be one that walks steps, for a run in continuous time; got "
            "ode. Use --sampler ddim."
        )
    out = shared.out or run.folder / "edit" / default_name(command, options)
    if out.suffix.lower() != ".png":
        raise ConfigError(
            f"out must end in .png; got {out}. The single images go to a folder of "
            "that name without the ending."
        )
    folder = out.with_suffix("")
    outputs.check_file(out, overwrite=shared.overwrite)
    outputs.check_folder(folder)
    draw = getattr(edits, command.replace("-", "_"))(config, options)
    drawable, step, kind = opening.load(config, run, shared.which)
    told = weights.describe(kind, step)
    print(f"{run.folder}: {told}")
    with progress.clock(f"drawing: {command}"):
        edited = draw(drawable, jax.random.key(shared.seed))
    made = outputs.about("edit", argv, config, drawable, told, shared.seed)
    outputs.save_each(iter([edited.results]), folder, made)
    print(f"{command}: {pictures.save(edits.picture(edited), out, made)}")
    many = len(edited.results)
    print(f"{counted(many, 'image')}: {folder}/000000.png{' and on' * (many > 1)}")
    return 0


def default_name(command: str, options: Any) -> str:
    """Returns the file that a picture goes to, by all that decides what is in it."""
    from diffusion_jax.lab.drawing import outputs

    shared: edit_options.Shared = options.shared
    asked = outputs.other_than_usual(options)
    how = outputs.other_than_usual(shared.how, shared.which)
    return f"{command}{asked}_seed{shared.seed}{how}.png"


def parse(argv: Sequence[str]) -> tuple[str | None, str, Any]:
    """Returns the names of the run, if there is one, and the command, with its options.

    Raises:
      ConfigError: no such command.
      SystemExit: `--help`, or a flag that does not exist or has another type.
    """
    rest = list(argv)
    named = bool(rest) and not rest[0].startswith("-") and rest[0] not in COMMANDS
    name = rest.pop(0) if named else None
    # A word alone is no run, but a command that does not exist.
    rest = rest or [name or flags.HELP[-1]]
    prog = f"{entry.typed('edit')} [RUN]"
    return name, *flags.of_several(rest, prog, __doc__ or "", COMMANDS)


COMMANDS: dict[str, type] = {
    "interpolate": edit_options.Interpolate,
    "coarse-to-fine": edit_options.CoarseToFine,
    "slerp": edit_options.Slerp,
    "inpaint": edit_options.Inpaint,
    "colorize": edit_options.Colorize,
    "vary": edit_options.Vary,
}
"""What each takes; it is drawn by the function of its name in `lab.drawing.edits`."""


if __name__ == "__main__":
    entry.guarded(main)
