"""Files of weights that make no sense: networks, extractors, classifiers, snapshots."""

import gzip
import json
import pickle
import struct

import graph_writer as graphs
import hypothesis
import jax
import nonsense
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st
from nonsense import cases, entry, refuse, tensors

from diffusion_jax.nets import graphdef, tensor_files
from diffusion_jax.training import averages
from diffusion_jax.training.formats import DataError
from experiments import (
    compare_samplers,
    config,
    convert,
    convert_inception,
    edit,
    eval_fid,
    eval_nll,
    interchange,
    legibility,
    networks,
    sample,
    train,
    train_classifier,
    train_noisy_classifier,
)

FORMAT = networks.FORMAT


def legacy(content):
    """A pickle behind the number that PyTorch's files began with before 2020."""
    return tensor_files._PYTORCH_MAGIC + b"." + content


CONTENT = {
    "empty": b"",
    "text": b"weights",
    "zeros": bytes(1000),
    "a page of a web site": b"<!DOCTYPE html><html><body>404</body></html>",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\n",
    "a gzip": gzip.compress(b"weights"),
    "a header of 2 GB": struct.pack("<Q", 2**31) + b'{"a":' + bytes(100),
    "a header of all numbers": b"\xff" * 8 + b'{"a":' + bytes(100),
    "a header of 200 MB": struct.pack("<Q", 2 * 10**8) + b'{"a":' + bytes(100),
    "a header of nothing": tensors(b""),
    "a header cut off": tensors({"a": entry([1], 0, 4)})[:20],
    "a header longer than it is": tensors(b'{"a"', length=50),
    "a header of a list": tensors([]),
    "a header of no JSON": tensors(b'{"a": nonsense}'),
    "a header of no text": tensors(b'{"a\xff": 1}'),
    "a header nested without end": tensors(b'{"a":' * 50_000),
    "a header with a space in front": tensors(b' {"a": {}}'),
    "a tensor of nothing": tensors({"a": {}}),
    "a tensor of text": tensors({"a": "F32"}),
    "a tensor beyond the file": tensors({"a": entry([100], 0, 400)}, bytes(4)),
    "a tensor of a terabyte": tensors({"a": entry([2**38], 0, 2**40)}, bytes(4)),
    "a tensor beyond all numbers": tensors(
        {"a": entry([2**62, 2**62], 0, 2**63)}, bytes(4)
    ),
    "a tensor that comes round": tensors({"a": entry([2**62, 4], 0, 0)}),
    "a tensor that ends before it begins": tensors({"a": entry([1], 8, 4)}, bytes(8)),
    "a tensor below 0": tensors({"a": entry([1], -4, 0)}, bytes(4)),
    "a shape below 0": tensors({"a": entry([-1], 0, 4)}, bytes(4)),
    "a shape of a fraction": tensors({"a": entry([1.5], 0, 4)}, bytes(4)),
    "a shape of text": tensors({"a": entry(["1"], 0, 4)}, bytes(4)),
    "a shape of another size": tensors({"a": entry([2], 0, 4)}, bytes(4)),
    "a hole": tensors({"a": entry([1], 4, 8)}, bytes(8)),
    "an overlap": tensors({n: entry([2], 0, 8) for n in "ab"}, bytes(8)),
    "bytes after the last": tensors({"a": entry([1], 0, 4)}, bytes(8)),
    "a name twice": tensors(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        bytes(4),
    ),
    "a type of no name": tensors({"a": entry([1], 0, 4, "F31")}, bytes(4)),
    "a type of 8 bits": tensors({"a": entry([4], 0, 4, "F8_E4M3")}, bytes(4)),
    "words that are no text": tensors({"__metadata__": {FORMAT: 5}}),
    "words that are a list": tensors({"__metadata__": [FORMAT]}),
    "words alone": tensors({"__metadata__": {"format": "pt"}}),
    "a pickle": lambda folder: nonsense.evil(folder),
    "a pickle, protocol 0": lambda folder: nonsense.evil(folder, 0),
    "a pickle, protocol 1": lambda folder: nonsense.evil(folder, 1),
    "a pickle, protocol 4": lambda folder: nonsense.evil(folder, 4),
    "a pickle, protocol 5": lambda folder: nonsense.evil(folder, 5),
    "a pickle of tensors": lambda folder: pickle.dumps(
        {"a": np.zeros(3), "b": nonsense.Evil(folder / "canary")}
    ),
    "a pickle of the old PyTorch": lambda folder: legacy(nonsense.evil(folder)),
    "a pickle of the new PyTorch": lambda folder: nonsense.npz(
        {"archive/data.pkl": nonsense.evil(folder)}
    ),
    "an npz of objects": lambda folder: nonsense.npz(
        {"arr_0.npy": nonsense.objects(folder)}
    ),
}


def described(change=None, *, drop=None, tensor=None, whole=None):
    """A network's file with its words, or its tensors, changed."""

    def make(folder):
        path = nonsense.write_network(folder / "made.safetensors")
        stored = tensor_files.read(path)
        words = json.loads(stored.meta[FORMAT])
        if change:
            change(words)
        arrays = dict(stored.arrays)
        if drop:
            arrays.pop(next(name for name in arrays if drop in name))
        if tensor:
            name = next(name for name in arrays if "conv_in" in name)
            arrays[name] = tensor(arrays[name])
        path.unlink()
        said = json.dumps(words) if whole is None else whole
        return safetensors.numpy.save(arrays, {FORMAT: said})

    return make


def put_in(*keys, value):
    def change(words):
        for key in keys[:-1]:
            words = words[key]
        words[keys[-1]] = value

    return change


NETWORKS = {
    "a tensor too few": described(drop="conv_out"),
    "a tensor nan": described(tensor=lambda x: x * np.nan),
    "a tensor of infinity": described(tensor=lambda x: x + np.inf),
    "a tensor of whole numbers": described(tensor=lambda x: x.astype(np.int32)),
    "a tensor of 64 bits": described(tensor=lambda x: x.astype(np.float64)),
    "a tensor of another shape": described(tensor=lambda x: x[..., :-1].copy()),
    "a tensor of more axes": described(tensor=lambda x: x[None]),
    "words of nothing": described(whole=""),
    "words of no JSON": described(whole="{"),
    "words of a list": described(whole="[]"),
    "words of null": described(whole="null"),
    "words nested without end": described(whole='{"version":' * 50_000),
    "words twice": described(whole='{"version": 1, "version": 1}'),
    "of another version": described(put_in("version", value=99)),
    "of no version": described(lambda words: words.pop("version")),
    "of no configuration": described(lambda words: words.pop("config")),
    "of a configuration of null": described(put_in("config", value=None)),
    "of a network of another size": described(
        put_in("config", "net", "channels", value=16)
    ),
    "of a huge network": described(put_in("config", "net", "channels", value=10**9)),
    "of a deep network": described(put_in("config", "net", "blocks", value=10**6)),
    "of a negative network": described(put_in("config", "net", "channels", value=-8)),
    "of a field of no name": described(put_in("config", "net", "evil", value=1)),
    "of weights of no name": described(put_in("about", "weights", value=5)),
    "of a step below 0": described(put_in("about", "step", value=-1)),
    "of a step that is true": described(put_in("about", "step", value=True)),
    "of scores of nothing": described(put_in("about", "scores", value={"a": None})),
    "of a story of null": described(put_in("about", value=None)),
}
CASES = [
    *cases("file of tensors", CONTENT),
    *cases("file of a network", NETWORKS),
]
TENSORS, WORDS = list(CASES[: len(CONTENT)]), list(CASES[len(CONTENT) :])


def put(case, path):
    made = case.make(path.parent) if callable(case.make) else case.make
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(made)
    return path


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path_factory, monkeypatch):
    """No cache of this machine's is reached."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / "nowhere"))
    monkeypatch.delenv("DIFFUSION_JAX_INCEPTION", raising=False)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return nonsense.write_network(tmp_path_factory.mktemp("net") / "net.safetensors")


def readers(path):
    """Every command that takes a network in place of a run."""
    return (
        (sample.main, [path]),
        (eval_fid.main, [path, "--data", "digits"]),
        (eval_nll.main, [path, "--data", "digits"]),
        (edit.main, [path, "vary", path]),
        (convert.main, [path, path.with_name("out.safetensors")]),
        (convert.main, [path, path.with_name("out")]),
        (compare_samplers.main, [path]),
        (legibility.main, [path]),
        (train.main, ["digits", "--init-from", path]),
    )


@pytest.mark.parametrize("case", TENSORS, ids=str)
def test_files_of_tensors_are_refused(case, tmp_path):
    path = put(case, tmp_path / "bad.safetensors")
    every = readers(path)
    turn = len(case.name) % 3
    for main, argv in every if nonsense.THOROUGH else every[turn::3]:
        refuse(main, argv, tmp_path, several=main in (train.main, sample.main))
    folder = tmp_path / "diffusers"
    write_diffusers(folder)
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        put(case, folder / name)
        said = refuse(convert.main, [folder, tmp_path / "out.safetensors"], tmp_path)
        assert name in said
        (folder / name).unlink()


@pytest.mark.parametrize("case", WORDS, ids=str)
def test_files_of_networks_are_refused(case, tmp_path):
    path = put(case, tmp_path / "bad.safetensors")
    for main, argv in readers(path)[3:6]:
        said = refuse(main, argv, tmp_path)
        assert "bad.safetensors" in said


UNET, SCHEDULER = interchange.to_diffusers(nonsense.SMALL)


def write_diffusers(folder, unet=UNET, scheduler=SCHEDULER):
    folder.mkdir(exist_ok=True)
    for name, values in (("config", unet), ("scheduler_config", scheduler)):
        text = values if isinstance(values, str) else json.dumps(values)
        (folder / f"{name}.json").write_text(text)


WRONG = (None, True, -1, 0, 2.5, 10**30, "x", [], {}, [1, "x"], float("nan"))
FIELDS = {
    "sample_size": ("x", -1, 2.5, 10**30, [8, 9], [], {}, True, float("nan")),
    "in_channels": WRONG,
    "out_channels": WRONG,
    "layers_per_block": WRONG,
    "norm_num_groups": WRONG,
    "block_out_channels": (*WRONG, [0], [8, 12], [8] * 50, [True]),
    "down_block_types": (*WRONG, ["Evil"], ["DownBlock2D"] * 2, [["DownBlock2D"]]),
    "up_block_types": (*WRONG, ["Evil"], ["UpBlock2D"] * 2),
    "dropout": ("x", -1, 2, None, [], {}, float("nan"), float("inf")),
    "num_class_embeds": ("x", -1, 0, 2.5, 10**30, [], {}, True),
    "norm_eps": ("x", None, -1, 1, [], {}, float("nan")),
    "act_fn": ("relu", 5, None, [], {}),
    "class_embed_type": ("timestep", 5, [], {}),
    "_class_name": ("os.system", "UNet2DConditionModel", None, 5, [], {}),
    "no_such_field": (1,),
}
SCHEDULES = {
    "num_train_timesteps": WRONG,
    "beta_start": ("x", None, True, -1, 0, 2, [], {}, float("nan"), float("inf")),
    "beta_end": ("x", None, True, -1, 0, 2, [], {}, float("nan"), float("inf")),
    "beta_schedule": ("x", None, 5, [], {}),
    "trained_betas": ("x", 5, {}, [], [0.1], [None] * 1000, [2.0] * 1000),
    "variance_type": ("x", None, 5, [], {}),
    "clip_sample": ("x", None, 5, [], {}),
    "clip_sample_range": ("x", None, 2, [], {}),
    "prediction_type": ("x", None, 5, [], {}, "flow_prediction"),
    "thresholding": ("x", None, 5, [], {}),
    "timestep_spacing": ("x", None, 5, [], {}),
    "_class_name": ("EulerDiscreteScheduler", None, 5, [], {}),
    "no_such_field": (1,),
}
DIFFUSERS = {
    f"{name} {value!r:.20} ({at})": (which, name, value)
    for which, table in enumerate((FIELDS, SCHEDULES))
    for name, values in table.items()
    for at, value in enumerate(values)
}
OF_DIFFUSERS = cases("value of diffusers", DIFFUSERS)
CASES += OF_DIFFUSERS


@pytest.mark.parametrize("case", OF_DIFFUSERS, ids=str)
def test_configurations_of_diffusers_are_refused(case, tmp_path):
    which, name, value = case.make
    changed = [dict(UNET), dict(SCHEDULER)]
    changed[which][name] = value
    write_diffusers(tmp_path / "folder", *changed)
    main, argv = readers(tmp_path / "folder")[len(case.name) % 3 * 3]
    refuse(main, argv, tmp_path)


ABOUT = {"num_classes": "10", "accuracy": "0.9"}


def classifier(change=None, **words):
    """The classifier of the digits, with a tensor or its words changed."""
    from diffusion_jax.nets.classifier import Classifier

    images = np.zeros((1, 8, 8, 1), np.uint8)
    net = Classifier(10, width=train_classifier.WIDTH)
    like = jax.eval_shape(lambda: net.init(jax.random.key(0), images))
    from flax import traverse_util

    flat = {
        name: np.zeros(leaf.shape, np.float32)
        for name, leaf in traverse_util.flatten_dict(like, sep=".").items()
    }
    if change:
        change(flat)
    said = {name: text for name, text in (ABOUT | words).items() if text is not None}
    return safetensors.numpy.save(flat, said)


def spoil(function):
    def change(flat):
        name = sorted(flat)[-1]
        flat[name] = function(flat[name])

    return change


CLASSIFIERS = {
    "no classes": lambda _: classifier(num_classes=None),
    "classes of a word": lambda _: classifier(num_classes="ten"),
    "classes of others": lambda _: classifier(num_classes="5"),
    "a million million classes": lambda _: classifier(num_classes=str(10**12)),
    "classes below 0": lambda _: classifier(num_classes="-1"),
    "no accuracy": lambda _: classifier(accuracy=None),
    "an accuracy of a word": lambda _: classifier(accuracy="high"),
    "an accuracy nan": lambda _: classifier(accuracy="nan"),
    "weights nan": lambda _: classifier(spoil(lambda x: x * np.nan)),
    "weights of another shape": lambda _: classifier(spoil(lambda x: x[:-1].copy())),
    "weights of whole numbers": lambda _: classifier(
        spoil(lambda x: x.astype(np.int32))
    ),
    "weights that are missing": lambda _: classifier(lambda flat: flat.popitem()),
    "weights too many": lambda _: classifier(
        lambda flat: flat.update(evil=np.zeros(3, np.float32))
    ),
    "a name within a name": lambda _: safetensors.numpy.save(
        {"params": np.zeros(1), "params.conv": np.zeros(1)}, ABOUT
    ),
    "no weights": lambda _: safetensors.numpy.save({}, ABOUT),
}
OF_CLASSIFIERS = cases("classifier", CLASSIFIERS) + [
    case._replace(kind="classifier that is no network") for case in TENSORS
]
CASES += OF_CLASSIFIERS


@pytest.mark.parametrize("case", OF_CLASSIFIERS, ids=str)
def test_classifiers_are_refused(case, net, tmp_path):
    run = tmp_path / "runs" / "digits"
    run.mkdir(parents=True)
    small = config.to_dict(config.replace(nonsense.SMALL, "data", source="digits"))
    (run / "config.json").write_text(json.dumps(small))
    put(case, tmp_path / "runs" / ".classifiers" / "digits_8x8x1.safetensors")
    for main in (eval_fid.main, compare_samplers.main):
        said = refuse(main, [run], tmp_path, several=main is eval_fid.main)
        assert "digits_8x8x1.safetensors" in said
    path = put(case, tmp_path / "classifier_noisy.safetensors")
    with pytest.raises(config.ConfigError) as caught:
        train_noisy_classifier.load(path)
    nonsense.check_words(f"error: {caught.value}")


def graph(*nodes):
    return b"".join(nodes)


def shaped(*dims, content=b"\0" * 4):
    """A constant whose shape is any list of numbers."""
    sizes = b"".join(graphs.field(2, graphs.varint(8) + graphs.varint(n)) for n in dims)
    proto = graphs.field(1, 1) + graphs.field(2, sizes) + graphs.field(5, content)
    value = graphs.attribute("value", graphs.field(8, proto))
    return graphs.node("conv/conv2d_params", "Const", value)


NAN = np.full((3, 3, 3, 32), np.nan)
NODE = graphs.constant("conv/conv2d_params", np.zeros((3, 3, 3, 32)))
GRAPHS = {
    "a node alone": NODE,
    "no nodes": b"\n\0",
    "cut off": NODE[:-10],
    "a length of more than there is": b"\n\xff\xff\xff\xff\x0f",
    "a number that does not end": b"\n" + b"\xff" * 20,
    "a group": b"\n\2\x0b\x0c",
    "a name of no text": b"\n\x04\n\2\xff\xfe",
    "a shape of a terabyte": shaped(2**40),
    "a shape beyond all numbers": shaped(2**63, 2**63),
    "a shape of 0 and all numbers": shaped(0, 2**64 - 1),
    "a shape of 0 and many": shaped(0, 2**62, content=b""),
    "a shape of 40 axes": shaped(*[1] * 40, 2),
    "a shape of 100 axes": shaped(*[1] * 100),
    "a number repeated a billion times": shaped(2**30),
    "numbers repeated to fill all memory": lambda _: shaped(2**27) * 20,
    "numbers repeated in many constants": shaped(2**20) * 40,
    "bytes of no number": shaped(3, content=b"abc"),
    "too many numbers": shaped(1, content=bytes(40)),
    "a constant nan": graphs.constant(
        "conv/conv2d_params", np.full((3, 3, 3, 32), np.nan)
    ),
    "an archive of nothing": gzip.compress(bytes(10_240)),
    "an archive cut off": gzip.compress(bytes(10_240))[:15],
    "an archive of text": gzip.compress(b"text"),
}
OF_GRAPHS = cases("graph", GRAPHS) + [
    case._replace(kind="extractor that is no graph") for case in TENSORS
]
CASES += OF_GRAPHS


@pytest.mark.parametrize("case", OF_GRAPHS, ids=str)
def test_extractors_are_refused(case, net, tmp_path):
    path = put(case, tmp_path / "inception.pb")
    argv = [net, "--data", "digits", "--extractor", "inception", "--weights", path]
    assert "inception.pb" in refuse(eval_fid.main, argv, tmp_path, several=True)
    out = tmp_path / "out.safetensors"
    assert "inception.pb" in refuse(convert_inception.main, [path, out], tmp_path)


TREE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}


def snapshot(about=None, **arrays):
    said = {"version": 1, "step": 5, "length": 0.1} if about is None else about
    text = said if isinstance(said, str) else json.dumps(said)
    return safetensors.numpy.save(TREE | arrays, {averages.FORMAT: text})


SNAPSHOTS = {
    "no words": safetensors.numpy.save(TREE),
    "words of a list": snapshot("[]"),
    "words of no JSON": snapshot("{"),
    "words nested without end": snapshot("[" * 100_000),
    "another version": snapshot({"version": 2, "step": 5, "length": 0.1}),
    "no step": snapshot({"version": 1, "length": 0.1}),
    "a step of infinity": snapshot('{"version": 1, "step": Infinity, "length": 0.1}'),
    "a step below 0": snapshot({"version": 1, "step": -5, "length": 0.1}),
    "a step that is no number": snapshot({"version": 1, "step": [], "length": 0.1}),
    "a length nan": snapshot('{"version": 1, "step": 5, "length": NaN}'),
    "a length of 7": snapshot({"version": 1, "step": 5, "length": 7}),
    "weights nan": snapshot(w=TREE["w"] * np.float32("nan")),
    "weights of another shape": snapshot(w=np.zeros(3, np.float32)),
    "weights of 64 bits": snapshot(w=np.zeros((2, 3))),
    "weights too many": snapshot(v=np.zeros(3, np.float32)),
}
OF_SNAPSHOTS = cases("snapshot", SNAPSHOTS) + [
    case._replace(kind="snapshot that is none") for case in TENSORS
]
CASES += OF_SNAPSHOTS


@pytest.mark.parametrize("case", OF_SNAPSHOTS, ids=str)
def test_snapshots_are_refused(case, tmp_path):
    path = put(case, tmp_path / "00000005_0.safetensors")

    def main(argv):
        found = averages.header(path)
        averages.solve([found, averages.Snapshot(9, 0.1)], 9, 0.05)
        averages.load(path, TREE)
        return 0

    refuse(main, [], tmp_path)


WHOLE = tensors(
    {"a": entry([2], 0, 8), "b": entry([1], 8, 12)}, np.arange(3, dtype="<f4").tobytes()
)


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


@nonsense.PROFILE
@hypothesis.given(content=st.binary(max_size=200))
def test_any_bytes_are_a_graph_or_refused(content):
    for raw in (content, graphs.field(1, content), b"\n" + content):
        with nonsense.little_memory(), nonsense.little_time():
            try:
                graphdef.read(raw, "a.pb")
            except DataError as error:
                nonsense.check_words(f"error: {error}")
