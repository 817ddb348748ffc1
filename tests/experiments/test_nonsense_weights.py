"""Files of weights that make no sense: networks, extractors, classifiers, snapshots."""

import json
import struct

import hypothesis
import nonsense
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st
from nonsense import tensor_entry, tensors

from diffusion_jax.errors import DataError
from diffusion_jax.interop import inception_weights
from diffusion_jax.lab.measure import judges
from diffusion_jax.lab.network_files import networks
from diffusion_jax.lab.wiring import guides
from diffusion_jax.storage import tensor_files
from diffusion_jax.training import averages

FORMAT = networks.FORMAT


CONTENT = {
    "text": b"weights",
    "a header of 2 GB": struct.pack("<Q", 2**31) + b'{"a":' + bytes(100),
    "a header of all numbers": b"\xff" * 8 + b'{"a":' + bytes(100),
    "a header cut off": tensors({"a": tensor_entry([1], 0, 4)})[:20],
    "a header nested without end": tensors(b'{"a":' * 50_000),
    "a header with a space in front": tensors(b' {"a": {}}'),
    "a tensor beyond the file": tensors({"a": tensor_entry([100], 0, 400)}, bytes(4)),
    "a tensor that comes round": tensors({"a": tensor_entry([2**62, 4], 0, 0)}),
    "a tensor below 0": tensors({"a": tensor_entry([1], -4, 0)}, bytes(4)),
    "a hole": tensors({"a": tensor_entry([1], 4, 8)}, bytes(8)),
    "a type of no name": tensors({"a": tensor_entry([1], 0, 4, "F31")}, bytes(4)),
    "words that are no text": tensors({"__metadata__": {FORMAT: 5}}),
    "a pickle": nonsense.evil,
    # Behind the number that PyTorch's files began with before 2020.
    "a pickle of the old PyTorch": lambda folder: (
        tensor_files._PYTORCH_MAGIC + b"." + nonsense.evil(folder)
    ),
    "a pickle of the new PyTorch": lambda folder: nonsense.npz(
        {"archive/data.pkl": nonsense.evil(folder)}
    ),
    "an npz of objects": lambda folder: nonsense.npz(
        {"arr_0.npy": nonsense.objects(folder)}
    ),
}
READERS = (
    *(tensor_files.read, networks.find, averages.header, inception_weights.load),
    *(judges.load, guides.load),
)


@pytest.mark.parametrize("name", CONTENT)
def test_files_of_tensors_are_refused_by_all_that_read_them(name, tmp_path):
    for read in READERS:
        nonsense.refuse_file(read, CONTENT[name], tmp_path / "a_8x8x1.safetensors")


WORDS = {"num_classes": "10", "accuracy": "0.9"}
CLASSIFIERS = {
    "no words": {},
    "classes of a word": WORDS | {"num_classes": "ten"},
    "classes below 0": WORDS | {"num_classes": "-1"},
    "a million million classes": WORDS | {"num_classes": str(10**12)},
    "an accuracy nan": WORDS | {"accuracy": "nan"},
    "weights of nothing": WORDS,
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_are_refused(name, tmp_path):
    content = safetensors.numpy.save({}, CLASSIFIERS[name])
    for read in (judges.load, guides.load):
        nonsense.refuse_file(read, content, tmp_path / "a_8x8x1.safetensors")


TREE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}


def snapshot(about=None, **arrays):
    said = {"version": 1, "step": 5, "length": 0.1} if about is None else about
    text = said if isinstance(said, str) else json.dumps(said)
    return safetensors.numpy.save(TREE | arrays, {averages.FORMAT: text})


SNAPSHOTS = {
    "no words": safetensors.numpy.save(TREE, {"by": "others"}),
    "words that are no JSON": snapshot("no JSON"),
    "a list of words": snapshot("[]"),
    "no version": snapshot({"step": 3, "length": 0.05}),
    "no step": snapshot({"version": 1, "length": 0.05}),
    "a length of nothing": snapshot({"version": 1, "step": 3, "length": []}),
    "words nested without end": snapshot("[" * 100_000),
    "a step of infinity": snapshot('{"version": 1, "step": Infinity, "length": 0.1}'),
    "a step below 0": snapshot({"version": 1, "step": -5, "length": 0.1}),
    "a length nan": snapshot('{"version": 1, "step": 5, "length": NaN}'),
    "a length of 7": snapshot({"version": 1, "step": 5, "length": 7}),
    "another version": snapshot({"version": 2, "step": 5, "length": 0.1}),
    "weights of another shape": snapshot(w=np.zeros(3, np.float32)),
    "weights nan": snapshot(w=TREE["w"] * np.float32("nan")),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshots_are_refused(name, tmp_path):
    def read(path):
        found = averages.header(path)
        averages.solve([found, averages.Snapshot(9, 0.1)], 9, 0.05)
        averages.load(path, TREE)

    nonsense.put(SNAPSHOTS[name], tmp_path / "a")
    nonsense.refuse(lambda _: read(tmp_path / "a"), [], tmp_path)


@nonsense.PROFILE
@hypothesis.given(
    header=st.dictionaries(
        st.sampled_from("abc"),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F64", "U8", "BOOL", "X", 5]),
                "shape": st.lists(st.integers(-1, 2**62), max_size=3) | st.none(),
                "data_offsets": st.lists(st.integers(-1, 2**62), max_size=3),
            }
        ),
        min_size=1,
    ),
    size=st.integers(0, 64),
)
def test_a_header_that_lies_is_refused(header, size, tmp_path_factory):
    path = tmp_path_factory.mktemp("lies") / "a.safetensors"
    path.write_bytes(tensors(header, bytes(size)))
    with nonsense.little_memory(), nonsense.little_time():
        try:
            found = tensor_files.read(path)
        except DataError as error:
            nonsense.check_words(f"error: {error}")
        else:  # it may tell the truth
            assert sum(a.nbytes for a in found.arrays.values()) == size
