"""Parquet files of the Hugging Face hub: images, labels, splits, and what is amiss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from image_data import greys, png

from diffusion_jax.data import datasets

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet as files  # noqa: E402

IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


def cells(values: list[int | None]) -> list[dict | None]:
    """Grey images as cells of a column; None for one that is elsewhere."""
    shown = lambda v: png(np.full((8, 8, 3), v, np.uint8))  # noqa: E731
    return [{"bytes": v if v is None else shown(v), "path": f"{v}.png"} for v in values]


def write(
    path: Path,
    images: list[int | None],
    features: dict | None = None,
    column: str = "image",
    **labels,
) -> None:
    """Writes a shard, with labels."""
    table = pyarrow.table({column: pyarrow.array(cells(images), IMAGE), **labels})
    if features is not None:
        words = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": words})
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(table, path, row_group_size=2)


def load(where: Path | str, **options) -> datasets.Dataset:
    return datasets.load(f"hf:{where}", image_size=8, **{"labelled": True, **options})


CLASSES = {
    "image": {"_type": "Image"},
    "kind": {"_type": "ClassLabel", "names": ["cat", "dog"]},
}


@pytest.fixture
def shards(tmp_path):
    one, other = (f"data/train-0000{i}-of-00002.parquet" for i in (0, 1))
    write(tmp_path / one, [0, 1, 2], kind=[0, 1, 1], size=[8] * 3, features=CLASSES)
    write(tmp_path / other, [3, 4], kind=[1, 0], size=[8] * 2, features=CLASSES)
    test = tmp_path / "data/test-00000-of-00001.parquet"
    write(test, [5], kind=[0], size=[8], features=CLASSES)
    return tmp_path


@pytest.mark.parametrize("memory_limit", [2**31, 0])
def test_a_folder_of_shards(shards, memory_limit):
    train = load(shards, memory_limit=memory_limit)
    assert greys(train.images) == [0, 1, 2, 3, 4]
    assert train.labels.tolist() == [0, 1, 1, 1, 0]
    assert train.classes == ("cat", "dog")
    batch = datasets.batch_at(train, np.array([4, 1]))
    assert greys(batch["image"]) == [4, 1]
    test = load(shards / "data", split="test", labelled=False)
    assert (greys(test.images), test.labels, test.classes) == ([5], None, ())


def test_a_file_a_plain_folder_and_a_column_by_name(tmp_path):
    write(tmp_path / "a,b.parquet", [7, 8], label=[3, 1], fine=[0, 2], column="img")
    found = load(tmp_path / "a,b.parquet", channels=1)
    assert found.images.shape == (2, 8, 8, 1)
    assert (found.labels.tolist(), found.classes) == ([3, 1], ())
    assert load(f"{tmp_path / 'a,b.parquet'},fine").labels.tolist() == [0, 2]
    assert greys(load(tmp_path).images) == [7, 8]
    write(tmp_path / "b/train/0000.parquet", [9], label=[0])
    assert greys(load(tmp_path / "b").images) == [9]


def test_an_image_that_is_elsewhere_is_named_or_left_out(tmp_path, refuses):
    write(tmp_path / "a.parquet", [1, 2, None, 3], label=[0, 1, 2, 3])
    with refuses("a.parquet, row 2 (ValueError: no image in it"):
        load(tmp_path)
    with pytest.warns(UserWarning, match="left out unreadable"):
        found = load(tmp_path, skip_unreadable=True)
    assert (greys(found.images), found.labels.tolist()) == ([1, 2, 3], [0, 1, 3])


TWO = {"a": CLASSES["kind"], "b": CLASSES["kind"]}
PICTURE = pyarrow.array(cells([0]), IMAGE)
POINTER = b"version https://git-lfs.github.com/spec/v1\n"
REFUSED = {
    "absent": {},
    "Parquet magic bytes not found": {"train-0": POINTER},
    "no rows": {"a": {"images": [], "label": []}},
    "0 among text (string)": {"a": pyarrow.table({"text": ["a"]})},
    "2 among one ": {"a": pyarrow.table({"one": PICTURE, "two": PICTURE})},
    "0 (none), among image, text": {"a": {"text": ["a"]}},
    "2 (a, b), among": {"a": {"a": [0], "b": [1], "features": TWO}},
    "2 (label, labels)": {"a": {"label": [0], "labels": [1]}},
    "label with 1 that are null": {"a": {"images": [0, 1], "label": [0, None]}},
    "int64 of shape (1,)": {"a": {"label": [2**40]}},
    "1: train-00001-of-00002.parquet": {"train-00001-of-00002": {"label": [0]}},
    "one; two": {"one/train-0": {"label": [0]}, "two/train-0": {"label": [0]}},
    "validation-0.parquet": {"validation-0": {"label": [0]}},
    "image, more in b.parquet": {"a": {"label": [0]}, "b": {"more": [0]}},
}


@pytest.mark.parametrize("got", REFUSED)
def test_what_is_missing_or_ambiguous_is_refused(got, tmp_path, refuses):
    for name, content in REFUSED[got].items():
        path = tmp_path / f"{name}.parquet"
        if isinstance(content, dict):
            write(path, **{"images": [0], **content})
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            files.write_table(content, path)
    with refuses(got):
        load(tmp_path / got if got == "absent" else tmp_path)


def test_a_split_or_column_that_is_not_there_is_refused(shards, refuses):
    one = shards / "data/train-00000-of-00002.parquet"
    with refuses("for the split test"):
        load(one, split="test")
    with refuses("'colour', among image, kind, size"):
        load(f"{shards},colour")
    (shards / "data/test-00000-of-00001.parquet").unlink()
    with refuses("train-00000-of-00002.parquet; "):
        load(shards, split="test")
