"""Data sets prepared by tensorflow-datasets, read without TensorFlow or network."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import nonsense
import numpy as np
import pytest
from image_data import greys, png

from diffusion_jax.data import datasets, image_files, prepared_tfds
from diffusion_jax.errors import DataError


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    """No prepared data set of this machine's reaches a test."""
    nonsense.alone(monkeypatch, tmp_path)


def prepare(folder, name, features, examples, version="1.0.0") -> None:
    """Prepares a tfds data set with splits train and test, in array_record form."""
    tfds = pytest.importorskip("tensorflow_datasets")
    generated = lambda self, start: enumerate(examples[start:])  # noqa: E731
    methods = {
        "name": name,
        "VERSION": tfds.core.Version(version),
        "_info": lambda self: tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        ),
        "_split_generators": lambda self, manager: {
            "train": generated(self, 0),
            "test": generated(self, len(examples) - 2),
        },
        "_generate_examples": generated,
    }
    base = tfds.core.GeneratorBasedBuilder
    builder = type(name, (base,), methods, skip_registration=True)
    builder(data_dir=str(folder), file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    images = np.full((6, 8, 8, 3), np.arange(6)[:, None, None, None], np.uint8)
    image, tensor = tfds.features.Image, tfds.features.Tensor
    label = tfds.features.ClassLabel(num_classes=10)
    pngs = [{"image": png(image), "label": i} for i, image in enumerate(images)]
    prepare(folder, "toy_png", {"image": image(shape=(8, 8, 3)), "label": label}, pngs)
    arrays = {"image": tensor(shape=(8, 8, 3), dtype=np.uint8)}
    prepare(folder, "toy_tensor", arrays, [{"image": image} for image in images])
    sizes = [{"image": png(np.full((9, 9 + i, 3), i, np.uint8))} for i in range(6)]
    prepare(folder, "toy_sizes", {"image": image(shape=(None, None, 3))}, sizes)
    sounds = [{"sound": np.zeros(4, np.float32)}] * 3
    features = {"sound": tensor(shape=(4,), dtype=np.float32)}
    prepare(folder, "toy_sound", features, sounds)
    return folder


@pytest.mark.parametrize("memory_limit", [2**31, 100])
@pytest.mark.parametrize("name", ["toy_png", "toy_tensor"])
def test_tfds(tfds_dir, name, memory_limit):
    options = {"data_dir": tfds_dir, "memory_limit": memory_limit}
    train = datasets.load(f"tfds:{name}", **options)
    assert isinstance(train.images, image_files.LazyImages) == (memory_limit == 100)
    assert train.images.shape == (6, 8, 8, 3)
    order = greys(train.images)  # tfds shuffles as it prepares
    assert sorted(order) == list(range(6))
    labels = train.labels
    assert labels is None if name == "toy_tensor" else labels.tolist() == order
    assert len(datasets.load(f"tfds:{name}", split="test", **options).images) == 2
    half = datasets.load(f"tfds:{name}", split="train[:50%]", image_size=10, **options)
    assert half.images.shape == (3, 10, 10, 3)
    padded = half.images[np.arange(3)]
    assert padded[:, 1:9, 1:9].sum() == padded.sum()
    assert "tensorflow" not in sys.modules


def test_tfds_images_of_many_sizes_are_cropped(tfds_dir):
    options = {"data_dir": tfds_dir, "image_size": 8}
    images = datasets.load("tfds:toy_sizes", fit="crop", **options).images
    assert sorted(greys(images)) == list(range(6))
    assert images.shape == (6, 8, 8, 3)
    with pytest.raises(DataError, match=r"differently sized.*fit='crop'"):
        datasets.load("tfds:toy_sizes", **options)
    with pytest.raises(DataError, match="image_size must be given"):
        datasets.load("tfds:toy_sizes", data_dir=tfds_dir)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("toy_png", "valid", "split must name a part of toy_png.*'valid'.*train"),
        ("toy_sound", "train", "feature named image.*got features sound"),
        ("cifar10", "train", "tfds:cifar10 must be prepared in array_record form"),
        ("no_such_name", "train", "must be prepared.*no_such_name not found"),
        ("huggingface:mnist", "train", "got 'huggingface:mnist'"),
    ],
)
def test_tfds_refuses_at_once(tfds_dir, monkeypatch, name, split, message):
    """Nothing unprepared reaches for the network; the folder looked in is named."""

    def network(*_, **__):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", network)
    with pytest.raises(DataError, match=message) as caught:
        datasets.load(f"tfds:{name}", split=split, data_dir=tfds_dir)
    if "must be prepared" in message:
        assert str(tfds_dir) in str(caught.value)
        assert "download_and_prepare" in str(caught.value)


def test_tfds_folder(tmp_path, monkeypatch):
    assert prepared_tfds.tfds_folder() == tmp_path / "nowhere" / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert prepared_tfds.tfds_folder() == tmp_path
    assert prepared_tfds.tfds_folder("elsewhere") == Path("elsewhere")
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket")
    with pytest.raises(DataError, match="must be on this machine; got gs://bucket"):
        datasets.load("tfds:cifar10")


def test_tfds_in_another_format_says_so(tfds_dir, tmp_path):
    own = tfds_dir / "toy_png/1.0.0"
    folder = shutil.copytree(own, tmp_path / "toy_png/1.0.0")
    info = (own / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"another format at .*toy_png"):
        datasets.load("tfds:toy_png", data_dir=tmp_path)


def test_cifar10_prepared_by_tfds_is_found(monkeypatch, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    examples = [
        {"image": png(np.full((32, 32, 3), i, np.uint8)), "label": i} for i in range(4)
    ]
    version = str(tfds.builder("cifar10").version)
    prepare(tmp_path, "cifar10", features, examples, version)
    given = datasets.load("cifar10", data_dir=tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for dataset in (given, datasets.load("cifar10", download=False)):
        assert greys(dataset.images) == dataset.labels.tolist()
        assert len(dataset.labels) == 4
