"""Sources of images, and the order in which training sees them."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import nonsense
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_data import archive, binary_members, idx, random_batches

from diffusion_jax.data import datasets, sources
from diffusion_jax.data.datasets import Dataset
from diffusion_jax.data.image_files import LazyImages
from diffusion_jax.errors import DataError

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**64 - 1)


def stream(seed: int, start: int, stop: int, size: int, batch: int) -> np.ndarray:
    steps = range(start, stop)
    return np.concatenate([datasets.batch_indices(seed, k, size, batch) for k in steps])


@settings(deadline=None, max_examples=60)
@given(SEEDS, SIZES, SIZES)
@example(2**64 - 1, 7, 20)  # batches longer than two epochs
def test_every_epoch_is_a_permutation(seed, size, batch):
    """Cut into lengths of the data set, the stream visits each image once a piece."""
    epochs = 3
    steps = -(-epochs * size // batch)
    order = stream(seed, 0, steps, size, batch)[: epochs * size]
    for epoch in order.reshape(epochs, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(0, 12), SIZES, SIZES)
def test_order_depends_neither_on_where_one_starts_nor_on_the_batch(
    seed, step, size, batch
):
    """Resuming at step k continues the very stream that one large batch has."""
    whole = stream(seed, 0, 1, size, 13 * batch)
    datasets._permutation.cache_clear()
    np.testing.assert_array_equal(
        stream(seed, step, 13, size, batch), whole[step * batch :]
    )


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [stream(s, e, e + 1, 200, 200) for s in (0, 1, 2) for e in (0, 1, 2)]
    assert len({order.tobytes() for order in orders}) == 9
    # Independent permutations agree in one place on average.
    agree = [np.mean(a == b) for a in orders for b in orders if a is not b]
    assert np.mean(agree) < 3 / 200


def test_indices_are_cheap_and_the_callers_own():
    mine = datasets.batch_indices(0, 0, 50_000, 128)
    before, start = mine.copy(), time.perf_counter()
    mine[:] = 0
    for step in range(200):
        datasets.batch_indices(0, step, 50_000, 128)
    assert time.perf_counter() - start < 0.5
    np.testing.assert_array_equal(datasets.batch_indices(0, 0, 50_000, 128), before)
    assert before.dtype == np.int64


@given(st.integers(1, 50), st.integers(1, 50))
def test_hosts_are_disjoint_and_complete(share, hosts):
    batch = np.arange(share * hosts)
    parts = [batch[datasets.host_slice(len(batch), i, hosts)] for i in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts), batch)
    assert {len(part) for part in parts} == {share}


INDICES, SLICE = datasets.batch_indices, datasets.host_slice
OUT_OF_RANGE = [
    (INDICES, (-1, 0, 10, 2), "seed must be .* 0 <= seed < 18446744073709551616"),
    (INDICES, (2**64, 0, 10, 2), "seed must be"),
    (INDICES, (0.5, 0, 10, 2), "seed must be"),
    (INDICES, (0, -1, 10, 2), "step must be .* 0 <= step; got -1"),
    (INDICES, (0, 0, 0, 2), "num_examples must be"),
    (INDICES, (0, 0, 10, None), "batch_size must be"),
    (SLICE, (10, 0, 4), r"process_count; got 10 for 4 hosts\. Give 8 or 12"),
    (SLICE, (2, 0, 4), r"Give 4\."),
    (SLICE, (8, 4, 4), "process_index"),
    (SLICE, (8, 0, 0), "process_count"),
    (SLICE, (0, 0, 1), "batch_size"),
]


def test_what_is_out_of_range_is_refused():
    for function, arguments, message in OUT_OF_RANGE:
        with pytest.raises(DataError, match=message):
            function(*arguments)


def test_batch_at():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    dataset = Dataset(images, np.arange(5, dtype=np.int32) * 2, "five")
    batch = datasets.batch_at(dataset, np.array([4, 0, 4]))
    assert batch["image"].ravel().tolist() == [4, 0, 4]
    assert batch["label"].tolist() == [8, 0, 8]
    assert set(datasets.batch_at(dataset._replace(labels=None), np.array([1]))) == {
        "image"
    }


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    """No data set, cache or proxy of this machine's reaches a test."""
    nonsense.alone(monkeypatch, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("where", ["file", "package"])
def test_digits_are_those_of_scikit_learn(where, monkeypatch):
    if where == "package":  # as where its files are laid out in another way
        monkeypatch.setattr(sources, "find_spec", lambda name: None)
    from sklearn.datasets import load_digits

    expected = load_digits()
    digits = datasets.load("digits")
    np.testing.assert_array_equal(digits.labels, expected.target)
    np.testing.assert_array_equal(
        digits.images[..., 0], np.round(expected.images * (255 / 16))
    )
    assert (digits.images.dtype, digits.labels.dtype) == (np.uint8, np.int32)
    assert digits.name == "digits"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("cifar", {}, "Did you mean 'cifar10'"),
        ("folder", {}, "Did you mean 'folder:<path>'"),
        ("digits:8", {}, "got 'digits:8'"),
        ("digits", {"split": "test"}, "split of digits must be 'train'.*got 'test'"),
        ("digits", {"data_dir": "x"}, "data_dir must not be given for digits"),
        ("digits", {"image_size": 4}, "at least .*; got image_size=4 for 8x8.*Give 8"),
        ("digits", {"image_size": 0}, "image_size must be a whole number"),
        ("digits", {"image_size": 16, "fit": "stretch"}, "fit must be"),
        ("digits", {"channels": 3}, "channels must be the images' own 1"),
        ("folder:x", {}, "image files must be loaded with image_size"),
        ("folder:x", {"image_size": 8, "fit": "pad"}, "fit='pad'"),
        ("folder:x", {"image_size": 8, "channels": 4}, "channels=4"),
        ("hf:x", {"split": "all"}, "split of hf must be 'train' or 'test'"),
        ("mnist", {}, "mnist must have train-images-idx3-ubyte.*no data_dir"),
    ],
)
def test_load_refuses(source, options, message):
    with pytest.raises(DataError, match=message):
        datasets.load(source, **options)


def test_padding_is_black_and_in_the_middle_and_a_crop_shrinks():
    digits = datasets.load("digits")
    padded = datasets.load("digits", image_size=13).images
    inside = np.pad(digits.images, ((0, 0), (2, 3), (2, 3), (0, 0)))
    np.testing.assert_array_equal(padded, inside)
    own = digits.images.astype(float)
    wide = datasets.load("digits", image_size=(2, 4), fit="crop").images[..., 0]
    means = own[:, 2:6].reshape(-1, 2, 2, 4, 2).mean(axis=(2, 4))
    assert abs(wide - means).mean() < 12


@pytest.mark.filterwarnings("ignore:each batch of the official CIFAR-10")
@pytest.mark.parametrize("where", ["file", "folder", "cache"])
def test_cifar10_is_found(tmp_path, where):
    folder = tmp_path / ("cache/diffusion_jax" if where == "cache" else "mine")
    path = archive(folder / "cifar-10-binary.tar.gz", binary_members())
    data_dir = {"file": path, "folder": folder, "cache": None}[where]
    test = datasets.load("cifar10", split="test", data_dir=data_dir)
    images, labels = random_batches()["test_batch"]
    np.testing.assert_array_equal(test.images, images)
    np.testing.assert_array_equal(test.labels, labels)
    train = datasets.load("cifar10", data_dir=data_dir, image_size=36)
    assert train.images.shape == (20, 36, 36, 3)


@pytest.mark.parametrize("network", ["refused", "forbidden"])
def test_cifar10_without_network_names_every_way(tmp_path, monkeypatch, network):
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{closed.getsockname()[1]}/cifar-10-binary.tar.gz"
    monkeypatch.setattr(sources, "CIFAR10_URL", url)
    start = time.monotonic()
    with closed, pytest.raises(DataError) as caught:
        datasets.load("cifar10", download=network != "forbidden")
    assert time.monotonic() - start < 2
    message = str(caught.value)
    cache = str(tmp_path / "cache" / "diffusion_jax")
    ways = ["data_dir", url, cache, "cifar-10-python.tar.gz", "tfds.builder", "digits"]
    assert [way for way in ways if way not in message] == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.filterwarnings("ignore:each batch of the official CIFAR-10")
def test_cifar10_is_downloaded_once(tmp_path, monkeypatch):
    calls = []

    def fetch(url, path, *, sha256):
        calls.append((url, path.name, sha256[:4]))
        archive(path, binary_members())

    monkeypatch.setattr(sources.downloading, "fetch", fetch)
    for _ in range(2):
        assert len(datasets.load("cifar10").images) == 20
    assert calls == [(sources.CIFAR10_URL, "cifar-10-binary.tar.gz", "c4a3")]


def test_cifar10_given_path_is_not_replaced_by_another_copy(tmp_path):
    cached = tmp_path / "cache/diffusion_jax/cifar-10-binary.tar.gz"
    archive(cached, binary_members())
    for data_dir in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match=f"nothing at {data_dir}"):
            datasets.load("cifar10", data_dir=data_dir)


@pytest.mark.parametrize("kind", ["mnist", "fashion_mnist"])
def test_mnist_folder(tmp_path, kind):
    rng, labels = np.random.default_rng(0), idx(np.arange(4, dtype=np.uint8))
    images = {s: rng.integers(0, 256, (4, 28, 28), np.uint8) for s in ("train", "t10k")}
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images["train"]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(images["t10k"]))
    train = datasets.load(kind, data_dir=tmp_path, image_size=32)
    np.testing.assert_array_equal(train.images[:, 2:30, 2:30, 0], images["train"])
    assert train.labels.tolist() == [0, 1, 2, 3]
    assert train.labels.dtype == np.int32
    with pytest.raises(DataError, match="t10k-labels"):
        datasets.load(kind, data_dir=tmp_path, split="test")
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(labels)
    test = datasets.load(kind, data_dir=tmp_path, split="test")
    np.testing.assert_array_equal(test.images[..., 0], images["t10k"])


def test_fashion_mnist_missing_names_the_package(monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST_FOLDER", "/nowhere")
    with pytest.raises(DataError, match=r"dataset-fashion-mnist.*'tfds:fashion_mnist'"):
        datasets.load("fashion_mnist")


@pytest.mark.skipif(
    not Path(sources.FASHION_MNIST_FOLDER).is_dir(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)
def test_fashion_mnist_of_debian():
    for split, num in (("train", 60_000), ("test", 10_000)):
        dataset = datasets.load("fashion_mnist", split=split)
        assert dataset.images.shape == (num, 28, 28, 1)
        assert np.bincount(dataset.labels).tolist() == [num // 10] * 10


def test_idx_and_npz_sources(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 4, 6), np.uint8)
    arrays = {"a,b": images, "c": images, "few": np.uint8([0, 1, 2])}
    for name, array in {**arrays, "labels": np.arange(4, dtype=np.uint8)}.items():
        (tmp_path / name).write_bytes(idx(array))
    with_comma = datasets.load(f"idx:{tmp_path / 'a,b'}")
    np.testing.assert_array_equal(with_comma.images[..., 0], images)
    assert with_comma.labels is None
    both = datasets.load(f"idx:{tmp_path / 'c'},{tmp_path / 'labels'}")
    assert both.labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match="4 whole numbers"):
        datasets.load(f"idx:{tmp_path / 'c'},{tmp_path / 'few'}")
    np.savez(tmp_path / "a.npz", images=images)
    npz = datasets.load(f"npz:{tmp_path / 'a.npz'}", image_size=(4, 8))
    np.testing.assert_array_equal(npz.images[:, :, 1:7, 0], images)
    with pytest.raises(DataError, match=r"\(8, 5\) for 4x6 images .*Give 4 6 or more"):
        datasets.load(f"npz:{tmp_path / 'a.npz'}", image_size=(8, 5))


@pytest.mark.parametrize("lazy", [False, True])
def test_held_out_images_are_others_and_always_the_same(lazy):
    array = np.arange(10, dtype=np.uint8)[:, None, None, None]
    images = LazyImages(lambda i: array[i], array.shape) if lazy else array
    whole = Dataset(images, np.arange(10, dtype=np.int32), "ten")
    train, held = datasets.held_out(whole, 0.3)
    for part, count in ((train, 7), (held, 3)):
        shown = part.images[np.arange(count)].ravel()
        np.testing.assert_array_equal(shown, part.labels)
    assert sorted([*train.labels, *held.labels]) == list(range(10))
    assert held.labels.tolist() != [0, 1, 2]
    again = datasets.held_out(whole, 0.3)[1]
    np.testing.assert_array_equal(again.labels, held.labels)
    with pytest.raises(DataError, match="more than those held out; got 1 in one"):
        datasets.held_out(Dataset(array[:1], None, "one"), 0.5)
