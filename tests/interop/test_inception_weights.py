"""Inception weights from files of every format, whole and damaged."""

import hashlib
import io
import itertools
import tarfile

import make_inception_golden as golden
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from graph_writer import OTHERS, constant
from small_networks import same

from diffusion_jax.errors import ConfigError
from diffusion_jax.interop import inception_weights
from experiments import convert


@pytest.fixture(scope="module")
def tensors():
    """Random numbers for every weight, by our names; variances are positive."""
    drawn = {n: golden.uniform(n, s) for n, s in inception_weights.shapes().items()}
    return {n: np.abs(x) if n.endswith("/var") else x for n, x in drawn.items()}


@pytest.fixture(scope="module")
def variables(tensors):
    """The same as the network has them."""
    kinds = {"params": {}, "batch_stats": {}}
    for name, tensor in tensors.items():
        statistic = name.endswith(("/mean", "/var"))
        kinds["batch_stats" if statistic else "params"][name] = tensor
    return {k: traverse_util.unflatten_dict(x, sep="/") for k, x in kinds.items()}


LEAVES = {
    "kernel": "conv2d_params",
    "scale": "batchnorm/gamma",
    "bias": "batchnorm/beta",
    "mean": "batchnorm/moving_mean",
    "var": "batchnorm/moving_variance",
}


def graph_name(name):
    module, leaf = name.rsplit("/", 1)
    if module == "softmax":
        return {"kernel": "softmax/weights", "bias": "softmax/biases"}[leaf]
    return f"{module}/{LEAVES[leaf]}"


@pytest.fixture(scope="module")
def graph(tensors):
    """The random network as the graph that was released would have it: its nodes."""
    hows = itertools.cycle(["content", "packed"])
    theirs = {graph_name(name): array for name, array in tensors.items()}
    return {n: constant(n, a, how=next(hows)) for n, a in theirs.items()}


@pytest.fixture(scope="module")
def graph_file(graph, tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "a.dat"
    path.write_bytes(b"".join([*OTHERS[:2], *graph.values(), *OTHERS[2:]]))
    return path


def test_a_packed_graph_is_read(graph_file, variables, tmp_path):
    path = tmp_path / "inception-2015-12-05.tgz"
    with tarfile.open(path, "w:gz", compresslevel=0) as archive:
        archive.addfile(tarfile.TarInfo("../README"), io.BytesIO())
        archive.add(graph_file, "classify_image_graph_def.pb")
    weights = inception_weights.load(path)
    assert weights.format == "graphdef"
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    same(weights.variables, variables)


def test_scales_of_a_graph_are_ones_where_it_has_none(graph, tmp_path):
    path = tmp_path / "a.pb"
    path.write_bytes(b"".join(v for k, v in graph.items() if "gamma" not in k))
    params = traverse_util.flatten_dict(
        inception_weights.load(path).variables["params"]
    )
    assert all((x == 1).all() == (key[-1] == "scale") for key, x in params.items())


# What cannot be taken.


def load(path, content, refuses, *all_said):
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        inception_weights.load(path)
    for got in all_said:
        with refuses(got):
            raise caught.value


def test_all_that_is_wrong_with_safetensors_is_said_at_once(tensors, tmp_path, refuses):
    tensors = {**tensors, "conv_1/var": -tensors["conv_1/var"]}
    tensors["conv_1/mean"] = np.full(32, np.nan, np.float32)
    del tensors["mixed/tower/conv/kernel"]
    all_said = (
        "mixed/tower/conv/kernel: nothing for float32[1,1,192,48]",
        "conv_1/var: some below 0",
        "conv_1/mean: values that are not finite",
    )
    content = safetensors.numpy.save(tensors)
    load(tmp_path / "a.safetensors", content, refuses, *all_said)


def test_other_files_are_refused(tmp_path, refuses):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("LICENSE"), io.BytesIO())
    path = tmp_path / "a.pb"
    for content, got in (
        (b"", "begins with b''"),
        (b"<html>no such file", "<html>"),
        (b"\x1f\x8b\x08\x00 cut off", "Error"),
        (b"PK\x03\x04 an npz file", "begins with b'PK"),
        (buffer.getvalue(), "an archive without it"),
    ):
        load(path, content, refuses, got)
    # A huge one is not read.
    with path.open("wb") as file:
        file.truncate(2**40)
    with refuses(str(2**40)):
        inception_weights.load(path)
    path.unlink()
    with refuses(str(path)):
        inception_weights.load(path)


# Digests, saving, finding.


def test_command_converts_to_a_file_that_is_held_to_the_digest_in_its_name(
    graph_file, variables, tmp_path, capsys, refuses
):
    out = tmp_path / "new" / "a.safetensors"
    assert convert.main([str(graph_file), str(out), "--inception"]) == 0
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    said = [hashlib.sha256(graph_file.read_bytes()).hexdigest(), digest]
    said += ["graphdef", "23,850,960 parameters"]
    printed = capsys.readouterr().out
    assert [word for word in said if word not in printed] == []
    for wrong in ("a.pkl", "folder"):
        with pytest.raises(ConfigError, match=r"OUT must end in \.safetensors"):
            convert.main([str(graph_file), str(tmp_path / wrong), "--inception"])
    with pytest.raises(ConfigError, match="--inception must stand without"):
        convert.main([str(graph_file), "b.safetensors", "--inception", "--download"])
    assert sorted(tmp_path.rglob("*")) == [out.parent, out]
    path = out.rename(out.with_name("pt_inception-2015-12-05-6726825d.pth"))
    with refuses(digest):
        inception_weights.load(path)
    path = path.rename(path.with_name(f"pt_inception-2015-12-05-{digest[:8]}.pth"))
    weights = inception_weights.load(path)
    assert (weights.sha256, weights.format) == (digest, "safetensors")
    same(weights.variables, variables)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(inception_weights.VARIABLE, raising=False)
    return tmp_path / "diffusion_jax"


def test_weights_are_found(cache, tmp_path, monkeypatch, refuses):
    with refuses(inception_weights.FILES[0]):
        inception_weights.find()
    cache.mkdir()
    for name in reversed(inception_weights.FILES):
        (cache / name).touch()
        assert inception_weights.find(download=True) == cache / name
    monkeypatch.setenv(inception_weights.VARIABLE, str(tmp_path / "b"))
    with refuses(str(tmp_path / "b")):
        inception_weights.find()
    (tmp_path / "b").touch()
    assert inception_weights.find() == tmp_path / "b"
    with refuses("elsewhere"):
        inception_weights.find("elsewhere")
    (tmp_path / "a").touch()
    assert inception_weights.find(tmp_path / "a") == tmp_path / "a"


def test_download_is_noted_and_held_to_its_digest(cache, monkeypatch, refuses):
    """No digest is published: the first one seen counts."""

    def fetch(url, path, *, sha256, most):
        assert (url, sha256) == (inception_weights.URL, None)
        assert most < 2**30
        path.parent.mkdir()
        path.write_bytes(b"graph")
        return path

    monkeypatch.setattr(inception_weights.downloading, "fetch", fetch)
    digest = hashlib.sha256(b"graph").hexdigest()
    with pytest.warns(UserWarning, match=digest):
        path = inception_weights.find(download=True)
    assert path == cache / "classify_image_graph_def.pb"
    noted = path.with_name(f"{path.name}.sha256")
    assert noted.read_text() == f"{digest}  {path.name}\n"
    path.write_bytes(b"other")
    with refuses(hashlib.sha256(b"other").hexdigest()):
        inception_weights.load(path)
