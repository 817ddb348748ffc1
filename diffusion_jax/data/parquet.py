"""Data sets of the Hugging Face hub that lie on this machine, as Parquet files.

An image is a struct of `bytes`, a file of any kind that Pillow reads, and `path`. Only
what is on this machine is read: nothing here downloads.
"""

from __future__ import annotations

import io
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np

from diffusion_jax.data.arrays import as_labels
from diffusion_jax.data.image_folders import Files, Labels
from diffusion_jax.errors import DataError, first_of, needs

SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\b")
# Of row groups that are held, for those who read one image after the other.
_GROUPS = 2


def find(argument: str, split: str = "train") -> Files:
    """Returns the images of one split.

    Args:
      argument: a Parquet file, or a folder of them, and after a comma the column of the
        labels, where it is not the only one of classes nor called label or labels.
      split: "train" or "test": the files so named, as in train-00000-of-00002.parquet
        or train/0000.parquet. Files of which none is named so, or one that is given by
        itself, are "train".

    Raises:
      DataError: nothing of the kind is there, or a file is missing or damaged.
      MissingError: PyArrow is not installed.
    """
    needs("pyarrow", "read Parquet files", "parquet")
    path, _, label = argument.rpartition(",")
    if not path or Path(argument).expanduser().exists():  # with a comma of its own
        path, label = argument, ""
    where = Path(path).expanduser()
    shards = _shards(where, split)
    columns, groups = _read_headers(where, shards)
    image = _image_column(where, columns)
    names, rows = [], Counter[Path]()
    for shard, _, count in groups:
        names += [f"{shard.name}, row {rows[shard] + row}" for row in range(count)]
        rows[shard] += count
    if not names:
        raise DataError(f"{where} must hold images; got no rows. Check the path.")
    return Files(
        where,
        names,
        _opener(groups, image),
        partial(_labels, where, shards, columns, label),
    )


def _shards(where: Path, split: str) -> list[Path]:
    """Returns the files of a split, in order."""
    if where.is_file() and split == "train":
        return [where]
    found = sorted(
        file
        for file in where.rglob("*.parquet")
        if not any(part.startswith(".") for part in file.relative_to(where).parts)
    )
    if not found:
        raise DataError(
            "a data set of Parquet must be a file, or a folder of files ending in "
            f".parquet; got {where} for the split {split}. Check the path; a split "
            "other than train takes a folder."
        )
    shards = [file for file in found if _split_of(file, where) == split]
    if not shards and split == "train" and not any(_split_of(f, where) for f in found):
        shards = found
    if not shards:
        raise DataError(
            f"the split {split} must be in files named {split}-*.parquet; got "
            f"{first_of([str(f.relative_to(where)) for f in found])} in {where}. Name "
            "another folder, or one of these files."
        )
    folders = sorted({str(file.parent.relative_to(where)) for file in shards})
    if len(folders) > 1:
        raise DataError(
            f"the files of a split must be in one folder; got {first_of(folders)} in "
            f"{where}. Name one of them."
        )
    _check_whole(where, shards)
    return shards


def _split_of(file: Path, where: Path) -> str | None:
    """Returns the split in a file's or its folder's name, or None."""
    words = [re.split(r"[-.]", file.name)[0]]
    words += [file.parent.name] if file.parent != where else []
    return next((word for word in words if word in SPLITS), None)


def _check_whole(where: Path, shards: Sequence[Path]) -> None:
    """Raises DataError where a shard is missing, by the counts in their names."""
    numbered = [match for file in shards if (match := _SHARD.search(file.name))]
    numbers = [int(match[1]) for match in numbered]
    totals = {int(match[2]) for match in numbered}
    if numbered and (len(totals) > 1 or numbers != list(range(*totals))):
        raise DataError(
            f"{where} must hold each of its files once, as their names count them; got "
            f"{len(shards)}: {first_of([file.name for file in shards])}. Download the "
            "others, or remove those of another version."
        )


def _read_headers(
    where: Path, shards: Sequence[Path]
) -> tuple[Any, list[tuple[Path, int, int]]]:
    """Returns the columns, and of each row group its file, its place and its length."""
    import pyarrow.parquet

    columns, groups = None, []
    for shard in shards:
        try:
            with pyarrow.parquet.ParquetFile(shard) as file:
                schema, meta = file.schema_arrow, file.metadata
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            _damaged(shard, error)
        if columns is not None and schema.names != columns.names:
            raise DataError(
                f"the files of {where} must have the same columns; got "
                f"{', '.join(schema.names)} in {shard.name}, and before it "
                f"{', '.join(columns.names)}. Put other data sets elsewhere."
            )
        columns = schema if columns is None else columns
        lengths = (meta.row_group(i).num_rows for i in range(meta.num_row_groups))
        groups += [(shard, i, count) for i, count in enumerate(lengths)]
    return columns, groups


def _damaged(shard: Path, error: Exception) -> NoReturn:
    raise DataError(
        f"{shard} must be a whole Parquet file; got {type(error).__name__}: "
        f"{str(error)[:200]}. Download it again: of a repository cloned without git "
        "lfs there are only the names."
    ) from error


def _image_column(where: Path, columns: Any) -> str:
    """Returns the only column of images, or the one called image."""
    import pyarrow

    found = [
        field.name
        for field in columns
        if pyarrow.types.is_struct(field.type)
        and any(part.name == "bytes" for part in field.type)
    ]
    if len(found) == 1:
        return str(found[0])
    if "image" in found:
        return "image"
    all_of_them = ", ".join(f"{field.name} ({field.type})" for field in columns)
    raise DataError(
        f"{where} must have one column of images, structs of bytes and path, or call "
        f"one image; got {len(found)} among {all_of_them}. Rename one, or export the "
        "images to a folder."
    )


def _opener(
    groups: list[tuple[Path, int, int]], image: str
) -> Callable[[int], BinaryIO]:
    """Returns the function from a row to the image file in it."""
    import pyarrow.parquet

    starts = np.cumsum([0, *(count for _, _, count in groups)])
    lock = threading.Lock()  # so that no group is read by two threads at once

    @lru_cache(maxsize=_GROUPS)
    def group(place: int) -> Any:
        shard, number, _ = groups[place]
        with pyarrow.parquet.ParquetFile(shard) as file:
            return file.read_row_group(number, columns=[image]).column(0)

    def opened(i: int) -> BinaryIO:
        place = int(np.searchsorted(starts, i, side="right")) - 1
        with lock:
            cell = group(place)[i - int(starts[place])].as_py()
        if cell is None or cell["bytes"] is None:
            raise ValueError("no image in it, but the path of one")
        return io.BytesIO(cell["bytes"])

    return opened


def _labels(where: Path, shards: Sequence[Path], columns: Any, label: str) -> Labels:
    import pyarrow.parquet

    named = _class_names(columns)
    integers = {f.name for f in columns if pyarrow.types.is_integer(f.type)}
    likely = [n for n in named if n in integers] or sorted(
        integers & {"label", "labels"}
    )
    found = [label] if label in integers else [] if label else likely
    if len(found) != 1:
        got = f"{label!r}" if label else f"{len(found)} ({', '.join(found) or 'none'})"
        raise DataError(
            f"{where} must have one column of labels, whole numbers; got {got}, among "
            f"{', '.join(columns.names)}. Name it after a comma, hf:PATH,COLUMN, or do "
            "without labels."
        )
    try:
        parts = [pyarrow.parquet.read_table(s, columns=found).column(0) for s in shards]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        _damaged(where, error)
    if any(part.null_count for part in parts):
        raise DataError(
            f"each image of {where} must have a label; got {found[0]} with "
            f"{sum(part.null_count for part in parts):,} that are null. Leave those "
            "rows out, or do without labels."
        )
    values = np.concatenate([part.to_numpy() for part in parts])
    labels = cast(np.ndarray, as_labels(values, len(values), where))
    return Labels(labels, named.get(found[0], ()))


def _class_names(columns: Any) -> dict[str, tuple[str, ...]]:
    """Returns the class names in Hugging Face's metadata, by column."""
    try:
        words = json.loads((columns.metadata or {})[b"huggingface"])
        features = words["info"]["features"]
        return {
            name: tuple(map(str, feature["names"]))
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}  # written by something else
