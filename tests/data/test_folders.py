"""Folders and zip archives of images: what is in them, and of which class."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_data import greys, png

from diffusion_jax.data import datasets, image_folders
from diffusion_jax.errors import ConfigError, DataError
from diffusion_jax.lab.schema.config import Config, Data, Net
from diffusion_jax.lab.wiring import build


def image(grey: int) -> bytes:
    return png(np.full((8, 8, 3), grey, np.uint8))


def stored(place: Path, kind: str, files: dict[str, bytes]) -> Path:
    """Writes files into a folder or an archive; returns its path."""
    where = place / ("images" if kind == "folder" else "images.zip")
    if kind == "folder":
        for name, raw in files.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(raw)
        return where
    with zipfile.ZipFile(where, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("empty")
        for name, raw in files.items():
            archive.writestr(name, raw)
    return where


def load(where: Path, **options) -> datasets.Dataset:
    return datasets.load(f"folder:{where}", image_size=8, labelled=True, **options)


@pytest.fixture(params=["folder", "zip"])
def write(request, tmp_path):
    return lambda files: stored(tmp_path, request.param, files)


NAMES = ["dog/b.png", "cat/z/c.png", "cat/a.png", "10/a.png"]  # 10, cat, dog
FILES = {name: image(i) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize("memory_limit", [2**31, 0])
def test_a_subfolder_is_a_class(write, memory_limit):
    where = write({**FILES, ".hidden/a.png": image(9), "cat/._a.png": b""})
    found = load(where, memory_limit=memory_limit)
    assert greys(found.images) == [3, 2, 1, 0]
    assert found.labels.dtype == np.int32
    assert found.labels.tolist() == [0, 1, 1, 2]
    assert found.classes == ("10", "cat", "dog")
    batch = datasets.batch_at(found, np.array([3, 0]))
    assert batch["label"].tolist() == [2, 0]
    assert greys(batch["image"]) == [0, 3]
    bare = datasets.load(f"folder:{where}", image_size=8)
    assert (bare.labels, bare.classes) == (None, ())


def test_labels_are_of_the_images_that_are_left(write):
    where = write({**FILES, "cat/b.png": b"no image"})
    with pytest.raises(DataError, match=r"got 1 of 5 .*cat/b\.png"):
        load(where)
    with pytest.warns(UserWarning, match="left out unreadable"):
        found = load(where, skip_unreadable=True)
    assert greys(found.images) == [3, 2, 1, 0]
    assert found.labels.tolist() == [0, 1, 1, 2]


def table(**labels) -> bytes:
    return json.dumps({"labels": [*map(list, labels.items())]}).encode()


def test_a_table_comes_before_subfolders(write):
    labels = {name: 5 - i for i, name in enumerate(NAMES)}
    where = write({**FILES, "dataset.json": table(**labels, **{"gone.png": 0})})
    with pytest.warns(UserWarning, match=r"names 1 images .* there, gone\.png first"):
        found = load(where)
    assert found.labels.tolist() == [2, 3, 4, 5]
    assert found.classes == ()


ONE = {"a/b.png": 3}
REFUSED = {
    "2 of 3 beside each other": (["a.png", "b.png", "c/a.png"], None),
    "2 of 2 beside each other": (["a.png", "b.png"], None),
    "none for 1 of 2, c/a.png first": (["a/b.png", "c/a.png"], table(**ONE)),
    "ValueError: no labels, null": (["a/b.png"], b'{"labels": null}'),
    "KeyError: 'labels'": (["a/b.png"], b'{"label": []}'),
    "TypeError": (["a/b.png"], b"[]"),
    "JSONDecodeError": (["a/b.png"], b"{"),
    "RecursionError": (["a/b.png"], b"[" * 100_000),
    "[0, 1] for a/b.png": (["a/b.png"], table(**{"a/b.png": [0, 1]})),
    "True for a/b.png": (["a/b.png"], table(**{"a/b.png": True})),
    "-1 for a/b.png": (["a/b.png"], table(**{"a/b.png": -1})),
    "1.0 for a/b.png": (["a/b.png"], table(**{"a/b.png": 1.0})),
}


@pytest.mark.parametrize("got", REFUSED)
def test_labels_that_are_not_there_for_all_are_refused(got, write, refuses):
    names, said = REFUSED[got]
    extra = {} if said is None else {"dataset.json": said}
    where = write({**dict.fromkeys(names, image(0)), **extra})
    with refuses(got):
        load(where)
    unasked = datasets.load(f"folder:{where}", image_size=8)
    assert len(unasked.images) == len(names)


def test_archives_that_are_none_or_damaged_are_refused(tmp_path, refuses, monkeypatch):
    where = stored(tmp_path, "zip", {"a/b.png": image(0), "a/c.png": image(1)})
    whole = where.read_bytes()
    where.write_bytes(whole[:-40])
    with refuses("which is neither"):
        load(where)
    at = whole.index(b"PK\x01\x02")
    where.write_bytes(whole[:at] + b"??" + whole[at + 2 :])
    with refuses("Bad magic number"):
        load(where)
    at = whole.index(b"a/b.png") + 20
    where.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with refuses("a/b.png ("):
        load(where)
    monkeypatch.setattr(image_folders, "MOST_BYTES", 2**10)
    with refuses("1025 bytes, over the limit of 1024"):
        load(stored(tmp_path, "zip", {"a/b.png": bytes(1025)}))


def test_training_asks_for_as_many_classes_as_there_are(tmp_path):
    where = stored(tmp_path, "folder", {name: image(0) for name in NAMES})
    data = Data(source=f"folder:{where}", image_size=8, channels=3)
    found = build.load_data(Config(data=data, net=Net(classes=3)))
    assert found.labels.tolist() == [0, 1, 1, 2]
    assert build.load_data(Config(data=data)).labels is None
    said = r"must be 3, .*: 10; cat; dog; got 4\. In training, set --net\.classes to 3"
    with pytest.raises(ConfigError, match=said):
        build.load_data(Config(data=data, net=Net(classes=4)))
    (where / "a.png").write_bytes(image(0))
    with pytest.raises(DataError, match=r"In training --net\.classes 0 does without"):
        build.load_data(Config(data=data, net=Net(classes=3)))
