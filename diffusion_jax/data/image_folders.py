"""Finds the images in a folder or a zip archive, and the class of each.

The class is what `dataset.json` says, as StyleGAN and EDM write it,

    {"labels": [["00000/img00000000.png", 3], ...]}

or else the subfolder that an image is in.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from diffusion_jax.errors import DataError

IMAGE_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif"),
    *(".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
TABLE = "dataset.json"
MOST_BYTES = 2**29
"""Of a file in an archive, unpacked; images of the most pixels have half of it."""


class Labels(NamedTuple):
    """The classes of images.

    Attributes:
      values: int32 [N].
      names: of the classes 0, 1, ...; empty where they have none.
    """

    values: np.ndarray
    names: tuple[str, ...]


class Files(NamedTuple):
    """Images in files, of which none is decoded yet.

    Attributes:
      where: the folder or file that holds them.
      names: one an image, in order.
      open: from a place in 0..N-1 to what Pillow opens; called in several threads.
      labels: reads the labels; DataError where there are none, or not for all.
    """

    where: Path
    names: Sequence[str]
    open: Callable[[int], Path | BinaryIO]
    labels: Callable[[], Labels]


def find(where: str | Path) -> Files:
    """Returns the images in a folder or a zip archive, with all its subfolders.

    They are sorted by path; hidden ones are left out, and other files are warned of, by
    ending. Broken links are among them, to be named with what cannot be read.

    Raises:
      DataError: nothing of the kind is there, or no image is in it.
    """
    where = Path(where)
    read: Callable[[str], bytes]
    opened: Callable[[str], Path | BinaryIO]
    if where.is_dir():
        seen = [
            file.relative_to(where).as_posix()
            for file in where.rglob("*")
            if file.is_file() or (file.is_symlink() and not file.exists())
        ]
        opened = lambda name: where / name  # noqa: E731
        read = lambda name: (where / name).read_bytes()  # noqa: E731
    else:
        archive = _archive(where)
        seen = [info.filename for info in archive.infolist() if not info.is_dir()]
        read = partial(_member, archive)
        opened = lambda name: io.BytesIO(read(name))  # noqa: E731
    names = _images(seen, where)
    labels = partial(_labels, where, seen, names, read)
    return Files(where, names, lambda i: opened(names[i]), labels)


def _images(seen: list[str], where: Path) -> list[str]:
    """Returns the paths of images among those seen, sorted."""
    seen = [name for name in seen if not any(p[:1] == "." for p in name.split("/"))]
    endings = {name: Path(name).suffix.lower() for name in seen}
    images = sorted(name for name in seen if endings[name] in IMAGE_ENDINGS)
    others = Counter(
        ending or "no ending"
        for name, ending in endings.items()
        if ending not in IMAGE_ENDINGS and name != TABLE
    )
    if not images:
        raise DataError(
            f"a folder of images must hold files ending in "
            f"{', '.join(IMAGE_ENDINGS)}; got none under {where}. Check the path, "
            "or convert the images."
        )
    if others:
        counted = ", ".join(f"{n} of {ending}" for ending, n in others.most_common())
        warnings.warn(f"left out files that are no images: {counted}", stacklevel=4)
    return images


def _archive(where: Path) -> zipfile.ZipFile:
    if not where.is_file() or not zipfile.is_zipfile(where):
        raise DataError(
            f"a folder of images, or a zip archive of one, must exist; got {where}, "
            "which is neither. Check the path."
        )
    try:
        archive = zipfile.ZipFile(where)
        if len({*archive.namelist()}) < len(archive.namelist()):
            raise ValueError("two members of one name")
        return archive
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{where} must be a whole zip archive; got {error}. It was cut off or "
            "damaged: make or download it again."
        ) from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > MOST_BYTES:
        raise ValueError(f"{info.file_size} bytes, over the limit of {MOST_BYTES}")
    return archive.read(info)


def _labels(
    where: Path, seen: list[str], names: list[str], read: Callable[[str], bytes]
) -> Labels:
    if TABLE in seen:
        return Labels(_of_table(where, names, lambda: read(TABLE)), ())
    return _of_subfolders(where, names)


def _of_subfolders(where: Path, names: list[str]) -> Labels:
    """Returns the class of each image: the index of its subfolder."""
    top = [name for name in names if "/" not in name]
    if top:
        raise DataError(
            f"every image must be in the subfolder of its class, or named in {TABLE}, "
            f"to have a label; got {len(top):,} of {len(names):,} beside each other in "
            f"{where}, {top[0]} first. Move them into subfolders, or do without labels."
        )
    folders = [name.partition("/")[0] for name in names]
    classes = sorted({*folders})
    place = {name: i for i, name in enumerate(classes)}
    return Labels(np.array([place[f] for f in folders], np.int32), tuple(classes))


def _of_table(where: Path, names: list[str], read: Callable[[], bytes]) -> np.ndarray:
    """Returns the labels that `dataset.json` gives to images, int32 [N]."""

    def wrong(got: str, advice: str) -> DataError:
        return DataError(
            f"{where / TABLE} must give a class, 0, 1, ..., to each image, as in "
            f'{{"labels": [["a/b.png", 3], ...]}}; got {got}. {advice}'
        )

    correct = "Correct it, or remove it where subfolders are the classes."
    try:
        listed = json.loads(read())["labels"]
        if listed is None:
            raise ValueError("no labels, null")
        known: dict[str, Any] = {str(name): label for name, label in listed}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise wrong(f"{type(error).__name__}: {str(error)[:200]}", correct) from error
    unknown = [name for name in names if name not in known]
    if unknown:
        got = f"none for {len(unknown):,} of {len(names):,}, {unknown[0]} first"
        raise wrong(got, "Add them, or remove those images.")
    labels = [known[name] for name in names]
    for name, label in zip(names, labels, strict=True):
        if type(label) is not int or not 0 <= label < 2**31:
            raise wrong(f"{str(label)[:60]} for {name}", correct)
    if len(known) > len(names):
        gone = min(known.keys() - {*names})
        warnings.warn(
            f"{where / TABLE} names {len(known) - len(names):,} images that are not "
            f"there, {gone} first",
            stacklevel=3,
        )
    return np.array(labels, np.int32)
