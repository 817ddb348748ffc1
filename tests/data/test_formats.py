"""Files in the real formats, whole and damaged, official and hostile."""

from __future__ import annotations

import contextlib
import gzip
import pickle
import struct
import tarfile

import hypothesis
import nonsense
import numpy as np
import pytest
from hypothesis import strategies as st
from image_data import archive, binary, binary_members, idx, random_batches

from diffusion_jax.data import sources
from diffusion_jax.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:each batch of the official CIFAR-10")


def python(images: np.ndarray, labels: np.ndarray) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    content = {b"labels": labels.tolist(), b"data": np.ascontiguousarray(planes)}
    return pickle.dumps(content, protocol=4)


def python2(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Returns the pickle that Python 2 wrote, as the official archive has it."""

    def string(raw: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(raw)) + raw

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
    array += string(b"b") + b"\x87R(K\x01J" + struct.pack("<i", len(images))
    array += b"M\x00\x0c\x86cnumpy\ndtype\n"  # 3072
    array += string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|")
    array += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += string(images.transpose(0, 3, 1, 2).tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([x]) for x in labels.tolist()) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + listed + b"u."


def members(write) -> dict[str, bytes]:
    if write == binary:
        return binary_members()
    batches = random_batches().items()
    return {f"cifar-10-batches-py/{name}": write(*batch) for name, batch in batches}


@pytest.mark.parametrize(
    ("write", "where"),
    [
        (binary, "archive"),
        (binary, "beside"),
        (binary, "parent"),
        (python2, "folder"),
        (python, "beside"),
    ],
)
def test_cifar10_round_trip(tmp_path, write, where):
    """Every official form gives the same pixels, channels last, and the labels."""
    content = members(write)
    if where in ("archive", "beside"):
        name = f"cifar-10-{'binary' if write == binary else 'python'}.tar.gz"
        path = archive(tmp_path / name, content)
        path = path if where == "archive" else tmp_path
    else:
        for name, raw in content.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(raw)
        path = tmp_path / name.split("/")[0] if where == "folder" else tmp_path
    batches = random_batches()
    images, labels = sources.read_cifar10(path, "train")
    expected = [batches[f"data_batch_{i}"] for i in range(1, 6)]
    np.testing.assert_array_equal(images, np.concatenate([b[0] for b in expected]))
    np.testing.assert_array_equal(labels, np.concatenate([b[1] for b in expected]))
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    images, _ = sources.read_cifar10(path, "test")
    np.testing.assert_array_equal(images, batches["test_batch"][0])


def test_cifar10_of_unofficial_size_warns(tmp_path):
    path = archive(tmp_path / "a.tar.gz", binary_members())
    with pytest.warns(UserWarning, match="10000 images"):
        sources.read_cifar10(path, "test")


ROW = np.zeros((1, 3072), np.uint8)
BIN, PY = "cifar-10-batches-bin/test_batch.bin", "cifar-10-batches-py/test_batch"
HELD = "must hold labels and 3072 pixels for each; got "
DAMAGED = [
    (BIN, b"", "whole records of 3073 bytes; got 0"),
    (BIN, bytes(3073 * 2 - 1), "whole records of 3073 bytes; got 6145"),
    (BIN, bytes([10]) + bytes(3072), r"0\.\.9; got 10"),
    ("../test_batch.bin", bytes(3073), r"none named test_batch\.bin"),
    (f"{BIN}/../test_batch.bin", bytes(3073), r"none named test_batch\.bin"),
    (PY, {b"labels": [], b"data": ROW[:0]}, f"{HELD}0 labels"),
    (PY, {b"labels": [1, 2], b"data": ROW}, f"{HELD}2 labels and 3072 bytes"),
    (PY, {b"labels": [1], b"data": ROW.astype(float)}, f"{HELD}1 labels and 24576"),
    (PY, {b"labels": [-1], b"data": ROW}, r"0\.\.9; got -1"),
    (PY, python(*random_batches()["test_batch"])[:-1], "whole pickle; got "),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_cifar10_damaged_batch(tmp_path, name, content, message):
    raw = content if isinstance(content, bytes) else pickle.dumps(content, 4)
    path = archive(tmp_path / "inside" / "a.tar.gz", {name: raw})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        sources.read_cifar10(path, "test")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("protocol", range(6))
def test_cifar10_pickles_are_not_run(tmp_path, protocol):
    """Neither refused ones nor, where the program is beside the data, others."""
    program = nonsense.Evil(tmp_path / "canary")
    content = {b"code": program, b"labels": [3], b"data": ROW}
    path = archive(tmp_path / "a.tar.gz", {PY: pickle.dumps(content, protocol)})
    with contextlib.suppress(DataError):
        sources.read_cifar10(path, "test")
    assert not program.canary.exists()


@nonsense.PROFILE
@hypothesis.given(st.data())
def test_damaged_pickles_are_read_or_refused(tmp_path_factory, data):
    raw = bytearray(pickle.dumps({b"labels": [3], b"data": ROW}, 4))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "test_batch"
    path.write_bytes(raw)
    with contextlib.suppress(DataError):
        sources.read_cifar10(path.parent, "test")


def test_cifar10_links_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(binary(*random_batches()["test_batch"]))
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(BIN)
        info.type, info.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(info)
    with pytest.raises(DataError, match="every batch"):
        sources.read_cifar10(path, "test")


def test_cifar10_missing_batch_and_path(tmp_path):
    content = binary_members()
    path = archive(tmp_path / "cut.tar.gz", content)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match="whole tar archive"):
        sources.read_cifar10(path)
    del content["cifar-10-batches-bin/data_batch_3.bin"]
    path = archive(tmp_path / "a.tar.gz", content)
    with pytest.raises(DataError, match="data_batch_3"):
        sources.read_cifar10(path)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(bytes(3073))
    assert len(sources.read_cifar10(tmp_path, "test")[0]) == 1
    with pytest.raises(DataError, match="data_batch_1"):
        sources.read_cifar10(tmp_path)
    with pytest.raises(DataError, match="none"):
        sources.read_cifar10(tmp_path / "absent")


@pytest.mark.parametrize(
    ("shape", "zipped"), [((7,), False), ((3, 5, 4), True), ((2, 3, 4, 3), False)]
)
def test_idx_round_trip(tmp_path, zipped, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    raw = idx(array)
    (tmp_path / "a").write_bytes(gzip.compress(raw, mtime=0) if zipped else raw)
    np.testing.assert_array_equal(sources.read_idx(tmp_path / "a"), array)


IDX = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "got nothing"),
        (b"\x89PNG" + IDX, "got 89 50 4e 47"),
        (IDX.replace(b"\x08", b"\x0d", 1), "got 00 00 0d 03"),  # floats
        (IDX[:10], "requires a buffer of 12 bytes"),
        (IDX[:-1], "24 bytes .* got 23"),
        (IDX + b"x", "24 bytes .* got more"),
        (gzip.compress(IDX, mtime=0)[:-12], "EOFError"),
    ],
)
def test_idx_damaged(tmp_path, raw, message):
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        sources.read_idx(tmp_path / "a")
    with pytest.raises(DataError, match="No such file"):
        sources.read_idx(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("images", (3, 5, 4)), ("arr_0", (3, 5, 4, 3)), ("any", (3, 5, 4))],
)
def test_npz_round_trip(tmp_path, name, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for others, expected in (({"labels": np.arange(3)}, [0, 1, 2]), ({}, None)):
        np.savez_compressed(tmp_path / "a.npz", **{name: images}, **others)
        found, labels = sources.read_npz(tmp_path / "a.npz")
        np.testing.assert_array_equal(found, images.reshape(3, 5, 4, -1))
        np.testing.assert_array_equal(labels, expected)
        assert labels is None or labels.dtype == np.int32


GOOD = np.zeros((3, 5, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GOOD + np.float32(1.5)}, "got float32 from 1.5 to 1.5. Convert"),
        ({"images": np.full((1, 4, 4), np.float16(0.7))}, "float16 from 0.7"),  # scale?
        ({"images": np.ones((3, 5, 4), int)}, "int64 from 1 to 1"),
        ({"images": GOOD.astype("M8[s]")}, "got datetime64"),
        ({"images": GOOD[0]}, r"must be uint8 of shape .*got uint8 of shape \(5, 4\)"),
        ({"images": GOOD[..., None].repeat(4, 3)}, r"5x4 with 4\. Of RGBA"),
        ({"a": GOOD, "b": GOOD}, "got a, b"),
        ({"images": GOOD, "labels": np.arange(2)}, "3 whole numbers"),
        ({"images": GOOD, "labels": np.array([1, 2, 2**40])}, "2\\*\\*31"),
    ],
)
def test_npz_of_other_content(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        sources.read_npz(tmp_path / "a.npz")


def test_other_types_and_orders_of_axes_are_read_where_they_are_plain(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3)
    narrow = pixels[:, :3]  # where either axis may be the channels
    for images, expected, warns in (
        (pixels.transpose(0, 3, 1, 2), pixels, False),
        (pixels.astype(np.int64), pixels, False),
        (pixels.astype(np.float16), pixels, False),  # whole numbers up to 255
        ((pixels / 255).astype(np.float16), pixels, True),
        ((pixels / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2), pixels, True),
        (narrow, narrow, False),
    ):
        np.savez(tmp_path / "a.npz", images)
        with pytest.warns(match="rounded to") if warns else contextlib.nullcontext():
            found, _ = sources.read_npz(tmp_path / "a.npz")
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.uint8


def test_npz_of_other_files(tmp_path):
    np.save(tmp_path / "a.npy", GOOD)
    np.savez(tmp_path / "whole.npz", images=GOOD)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:100])
    (tmp_path / "folder.npz").mkdir()
    for name in ("a.npy", "cut.npz", "folder.npz", "absent.npz"):
        with pytest.raises(DataError, match=r"must be an npz file .*; got .*Check the"):
            sources.read_npz(tmp_path / name)
