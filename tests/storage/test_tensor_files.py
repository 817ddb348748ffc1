"""Tensors in files: whole, damaged, and in disguise."""

import hashlib
import io
import itertools
import json
import pickle
import sys
from pathlib import Path

import jax.numpy as jnp
import nonsense
import numpy as np
import pytest
import safetensors.numpy
from nonsense import tensor_entry, tensors

from diffusion_jax.errors import MissingError
from diffusion_jax.storage import tensor_files, trees, waiting

rng = np.random.default_rng(0)
ARRAYS = {
    "double": rng.normal(size=(2, 3)),
    "transposed": rng.normal(size=(3, 5, 2)).astype(np.float32).transpose(2, 0, 1),
    "reversed": np.arange(7, dtype=np.int32)[::-2],
    "big-endian": np.arange(3, dtype=">f4"),
    "half": rng.normal(size=3).astype(np.float16),
    "brain": jnp.asarray([1.5, -2, jnp.inf, 3.4e38], jnp.bfloat16),
    "one": np.float32(3),
    "none": np.zeros((0, 4), np.int64),
    "bytes": np.arange(5, dtype=np.uint8),
    "true": np.array([True, False]),
}
META = {"z": "1", "a": 'words "ü\n', "k": "", "b": "{}"}


WHOLE = tensors({"a": tensor_entry([2], 0, 8)}, bytes(8))


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        array = np.asarray(array)
        assert actual[name].dtype == array.dtype.newbyteorder("=")
        assert actual[name].shape == array.shape
        np.testing.assert_array_equal(actual[name], array)


# Whole files.


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "new" / "a.bin"
    digest = tensor_files.write_safetensors(path, ARRAYS, META)
    found = tensor_files.read(path, progress=True)
    assert_same(found.arrays, ARRAYS)
    assert (found.meta, found.format) == (META, "safetensors")
    assert tensor_files.read_meta(path) == META
    assert found.sha256 == digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(path.parent.iterdir()) == [path]
    # For others it is a file like any.
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == META
        theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert_same(theirs, ARRAYS)


def test_file_is_the_same_whatever_the_order_of_its_words(tmp_path):
    some = {name: np.asarray(ARRAYS[name]) for name in ("half", "bytes")}
    orders = itertools.permutations(META.items())
    digests = {
        tensor_files.write_safetensors(tmp_path / "a", some, dict(order))
        for order in orders
    }
    assert len(digests) == 1
    for words in ({}, {"a": META["a"]}):  # where there is but one order
        tensor_files.write_safetensors(tmp_path / "a", some, words)
        expected = safetensors.numpy.save(some, words or None)
        assert (tmp_path / "a").read_bytes() == expected


def test_words_of_a_huge_file_are_read_alone(tmp_path):
    path = tmp_path / "a"
    size = 2**36
    entries = {"a": tensor_entry([size], 0, size, "U8"), "__metadata__": META}
    path.write_bytes(tensors(entries))
    with path.open("ab") as file:
        file.truncate(size + file.tell())
    assert tensor_files.read_meta(path) == META


@pytest.mark.parametrize(
    ("terminal", "asked"), [(True, True), (True, False), (False, True)]
)
def test_bar_counts_bytes_on_a_terminal_only(tmp_path, monkeypatch, terminal, asked):
    path = tmp_path / "a"
    tensor_files.write_safetensors(path, {"a": np.zeros(2**18, np.float32)})
    monkeypatch.setattr(waiting, "SECONDS_OF_QUIET", 0)
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    tensor_files.read(path, progress=asked)
    shown = screen.getvalue()
    assert ("0.00/1.05M" in shown) == bool(shown) == (terminal and asked)


# What is refused.


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickle_in_disguise_is_named_and_not_run(tmp_path, refuses, protocol):
    path, program = tmp_path / "a.safetensors", nonsense.Evil(tmp_path / "canary")
    for content in (program, {"a": program}, [program]):
        path.write_bytes(pickle.dumps(content, protocol))
        assert tensor_files.kind_of(path) == "pickle"
        with refuses("a pickle, which is a program. It was not run."):
            tensor_files.read(path)
        with refuses("begins with"):
            tensor_files.read_meta(path)
    assert not program.canary.exists()


ONE = json.dumps(tensor_entry([1], 0, 4))
TWICE = tensors(f'{{"a": {ONE}, "a": {ONE}}}'.encode(), bytes(4))


@pytest.mark.parametrize(
    ("content", "kind", "got"),
    [
        (b"", "unknown", "begins with b''"),
        (b"version https://git-lfs.github.com", "unknown", "https://git-lfs"),
        (b"<html>{ no such file", "unknown", "<html>"),
        (b"PK\x03\x04 an npz file", "unknown", "PK"),
        (WHOLE[:-1], "safetensors", "SafetensorError"),
        (
            tensors({"a": tensor_entry([2], 0, 2, "F8_E4M3")}, bytes(2)),
            "safetensors",
            "F8_E4M3.",
        ),
        (TWICE, "safetensors", "a twice."),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, refuses, content, kind, got):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert tensor_files.kind_of(path) == kind
    with refuses(got):
        tensor_files.read(path)
    if "Safetensor" in got or kind == "unknown":
        with refuses(got):
            tensor_files.read_meta(path)


def test_what_is_no_file_is_said(tmp_path, refuses):
    for path in (tmp_path / "nothing", tmp_path, Path(".")):
        for read in (tensor_files.kind_of, tensor_files.read, tensor_files.read_meta):
            with refuses(str(path)):
                read(path)


@pytest.mark.parametrize("head", [b"PK\x03\x04" + bytes(26) + b"a/data.pkl", None])
def test_pytorch_has_to_be_there_for_its_files(tmp_path, refuses, monkeypatch, head):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "a.safetensors"
    path.write_bytes(head or pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    assert tensor_files.kind_of(path) == "pytorch"
    with refuses("save the tensors as safetensors where it is installed"):
        tensor_files.read(path)


# Checkpoints of TensorFlow, as far as they go without it.

INDEX, DATA = "model.ckpt-7.index", "model.ckpt-7.data-00000-of-00001"
TABLE = bytes(40) + bytes.fromhex("57fb808b247547db")


def test_checkpoint_is_known_by_each_of_its_names(tmp_path, refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / INDEX).write_bytes(TABLE)
    (tmp_path / DATA).write_bytes(bytes(8))
    for name in (INDEX, DATA, "model.ckpt-7"):
        assert tensor_files.kind_of(tmp_path / name) == "tensorflow"
        with pytest.raises(MissingError, match="tensorflow is missing"):
            tensor_files.read(tmp_path / name)
    (tmp_path / "a.index").write_bytes(WHOLE)
    assert tensor_files.kind_of(tmp_path / "a.index") == "safetensors"
    for name in ("model.ckpt", "model.ckpt-8"):
        with refuses("No such file"):
            tensor_files.read(tmp_path / name)


@pytest.mark.parametrize(
    ("there", "got"), [(INDEX, "no data beside"), (DATA, "data without an index")]
)
def test_half_a_checkpoint_is_refused(tmp_path, refuses, there, got):
    (tmp_path / there).write_bytes(TABLE)
    for name in (there, "model.ckpt-7"):
        with refuses(got):
            tensor_files.read(tmp_path / name)


# What is not written.


@pytest.mark.parametrize(
    ("arrays", "meta"),
    [
        ({"a": np.array(["text"])}, {}),
        ({"a": np.array([None])}, {}),
        ({"a": np.zeros(2)}, {"step": 3}),
    ],
)
def test_other_content_is_not_written(tmp_path, refuses, arrays, meta):
    with refuses("Convert them first"):
        tensor_files.write_safetensors(tmp_path / "a", arrays, meta)
    assert not list(tmp_path.iterdir())


# Trees of the experiments.


def test_tree_comes_back_with_its_words(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    tree = {"params": {"dense": {"kernel": np.eye(2), "bias": jnp.zeros(2)}}}
    trees.write(path, tree, META)
    params, meta, digest = trees.read(path)
    np.testing.assert_array_equal(params["params"]["dense"]["kernel"], np.eye(2))
    assert params["params"]["dense"]["bias"].dtype == np.float32
    assert (meta, digest) == (META, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_tree_of_another_network_is_refused(tmp_path, refuses):
    path, like = tmp_path / "a", {"a": {"w": np.zeros(2, np.float32)}}
    for found, got in (
        ({}, "a.w: nothing for float32[2]"),
        (np.zeros(3, np.float32), "a.w: float32[3] for float32[2]"),
        (np.zeros(2), "a.w: float64[2] for float32[2]"),
        (np.array([1, np.inf], np.float32), "a.w: values that are not finite"),
        ({"w": like["a"]["w"], "v": np.zeros(1)}, "a.v: float64[1] for nothing"),
    ):
        tree = {"a": found} if isinstance(found, dict) else {"a": {"w": found}}
        with refuses(got):
            trees.check(tree, like, path)
    tensor_files.write_safetensors(path, {"a": np.zeros(1), "a.b": np.zeros(1)})
    with refuses("some below a."):
        trees.read(path)
