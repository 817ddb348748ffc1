"""Writes drawings to files that say how they were made, and replace nothing else."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import ConfigError, first_of
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.process import replaceable
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import chains
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.storage import files

MARKS = pictures.MARK, b"about.npy"
"""By which a drawing is known: a PNG, or an npz."""


def about(
    command: str,
    argv: Sequence[str],
    config: Config,
    drawable: Drawable,
    words: str,
    seed: int,
) -> dict[str, Any]:
    """Returns how a drawing was made, as JSON has it, to be kept in its file.

    `argv` is what was typed after the command, `words` what the weights are.
    """
    return {
        "command": replaceable.typed(command, argv),
        "network": config.name,
        "weights": words,
        "weights_sha256": drawable.sha256,
        "seed": seed,
        **chains.describe_sampling(config),
    }


def other_than_usual(*options: Any) -> str:
    """Returns the end of a file's name: the options that are not their default.

    Of a file that they name it has the last folder too: sets of images have the same
    names. Options within options are left out.

    >>> from diffusion_jax.lab.schema.sampling import Sampling
    >>> other_than_usual(Sampling(sampler="ddim", steps=10)), other_than_usual()
    ('_ddim_steps10', '')
    """
    said = []
    for group in options:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if value == field.default or dataclasses.is_dataclass(value):
                continue
            plain = field.name == "sampler" or isinstance(value, Path)
            if isinstance(value, Path):
                value = *filter(None, [value.parent.name]), value.stem
            if isinstance(value, tuple):
                value = "-".join(map(str, value))
            shown = "" if value is True else value
            said.append(f"_{'' if plain else field.name}{shown}")
    return re.sub(r"[^\w.+-]+", "-", "".join(said))


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raises ConfigError where a drawing would take the place of something else."""
    replaceable.check_file(path, *MARKS, overwrite=overwrite)


def check_folder(folder: Path) -> None:
    """Raises ConfigError where a set of images would stand among other files."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"cannot write {folder}: that is no folder. Name another.")
    set_ = _set_of(folder)
    others = sorted(path.name for path in folder.glob("*") if path not in set_)
    if others:
        raise ConfigError(
            f"cannot write images to {folder}: there is {first_of(others)}, which is "
            "no part of an earlier set of images. Name an empty folder."
        )


def save_each(batches: Iterator[np.ndarray], folder: Path, made: Any) -> None:
    """Writes one PNG an image, 000000.png, 000001.png, ..., and removes older ones.

    The images are uint8, [B, H, W, C], and the folder is checked by `check_folder`.
    """
    first = next(batches)  # where nothing can be drawn, nothing is lost
    for old in _set_of(folder):
        old.unlink()
    for index, image in enumerate(
        itertools.chain(first, itertools.chain.from_iterable(batches))
    ):
        one = pictures.grid(image[None], side=image.shape[0], gap=0)
        pictures.save(one, folder / f"{index:06d}.png", {**made, "image": index})


def save_npz(drawn: np.ndarray, path: Path, made: Any) -> None:
    """Writes `images`, and as JSON text in `about` how they were made."""
    with files.replacing(path) as file:
        np.savez_compressed(file, about=json.dumps(made), images=drawn)


def _set_of(folder: Path) -> list[Path]:
    """Returns what `save_each` wrote into a folder."""
    found = folder.glob("[0-9]" * 6 + ".png")
    return [p for p in found if p.is_file() and replaceable.has(p, *MARKS)]
