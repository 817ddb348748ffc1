"""Trained networks in files: written, read back, and refused where they are wrong."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from small_networks import ABOUT, EXPORTED, network_of, read, same, small

from diffusion_jax.interop import unet_names
from diffusion_jax.lab.network_files import diffusers_folder, networks, records
from diffusion_jax.lab.schema.config import UNKNOWN, official, replace
from diffusion_jax.lab.wiring import build
from diffusion_jax.storage import tensor_files, tensorflow_checkpoint
from experiments.configs import EXPERIMENTS


@pytest.fixture
def folder(tmp_path):
    diffusers_folder.write(tmp_path / "good", network_of(small()))
    return tmp_path / "good"


def assert_there_and_back(write, network, path):
    digest = write(path, network)
    found = read(path)
    same(found.params, network.params)
    assert found.config == dataclasses.replace(network.config, name="a")
    assert (found.about, found.sha256) == (ABOUT, digest)
    assert write(path.with_stem("b"), found) == digest


@pytest.mark.parametrize("name", ["digits_vdm", "digits_conditional"])
def test_a_file_gives_back_the_network(name, tmp_path):
    network = network_of(small(name))
    assert_there_and_back(networks.write_file, network, tmp_path / "a.safetensors")


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_a_folder_gives_back_the_network_and_without_our_record_what_is_computed(
    config, tmp_path
):
    network, out = network_of(config), tmp_path / "a"
    assert_there_and_back(diffusers_folder.write, network, out)
    (out / diffusers_folder.RECORD).unlink()
    found = read(out)
    same(found.params, network.params)
    nets = [build.make_network(c).clone(dropout=0.0) for c in (config, found.config)]
    assert nets[0] == nets[1]
    one, other = found.config.diffusion, config.diffusion
    for field in ("prediction", "schedule", "num_steps", "variance"):
        assert getattr(one, field) == getattr(other, field)
    assert found.config.data.source == UNKNOWN
    assert (found.about.weights, found.about.step) == ("released", None)


def test_a_folder_that_was_changed_is_read_as_it_is_now(folder, capsys):
    path = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text()) | {"clip_sample": False}
    path.write_text(json.dumps(values))
    assert read(folder).config.sample.clip is False
    assert "is no more what the folder is" in capsys.readouterr().out


def test_a_network_alone_is_taken_for_the_papers_and_that_is_said(folder, capsys):
    assert networks.find(folder / "unet") == networks.find(folder)
    alone = (folder / "unet").rename(folder.with_name("alone"))
    found = read(alone).config.diffusion
    assert "there is no scheduler_config.json" in capsys.readouterr().out
    assert (found.schedule, found.beta_end, found.num_steps) == ("linear", 0.02, 1000)
    assert (found.prediction, found.variance) == ("eps", "small")
    # As of the first releases: all in one folder, the scheduler has few fields.
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
    scheduler |= {"timestep_values": None, "trained_betas": None}
    (alone / "scheduler_config.json").write_text(json.dumps(scheduler))
    found = read(alone)
    same(found.params, network_of(small()).params)
    assert found.config.diffusion.variance == "large"


def test_a_checkpoint_of_the_authors_is_read(monkeypatch):
    config = small()
    own = unet_names.shapes(build.make_network(config), 1, image_size=8)
    both = {average: network_of(config, seed=average) for average in (True, False)}
    arrays = {"global_step": np.array(790_000), "beta1_power": np.float32(0.1)}
    for which, network in both.items():
        names = unet_names.official_names(own, average=which)
        arrays |= unet_names.to_tensors(network.params["net"], names)
    arrays |= {f"{n}/Adam": arrays[n] for n in arrays if n.endswith("/W")}
    stored = tensor_files.Tensors(arrays, {}, "tensorflow", "f" * 64)
    monkeypatch.setattr(tensor_files, "read", lambda path, progress: stored)
    for average, words in ((True, "averaged"), (False, "last")):
        found = networks.read_official("model.ckpt-790000", config, average=average)
        same(found.params, both[average].params)
        assert (found.about.step, found.about.weights) == (790_000, words)
        assert found.config == official(config)


@pytest.mark.parametrize("name", ["cifar10", "lsun_church256", "lsun_bedroom256_large"])
def test_a_checkpoint_tells_which_network_it_is(name, monkeypatch, tmp_path, refuses):
    """Not which data: the networks of 256x256 are all alike."""
    config = official(EXPERIMENTS[name].config)
    own = diffusers_folder.shapes(config)
    names = unet_names.official_names(own, average=False)
    shapes = {names[key].name: own[key] for key in own} | {"global_step": ()}
    monkeypatch.setattr(tensorflow_checkpoint, "shapes", lambda path: shapes)
    at = networks.Found(tmp_path / "model.ckpt-7", "official")
    found = networks.read_config(at)
    assert (found.net, found.diffusion) == (config.net, config.diffusion)
    assert found.data.image_size == config.data.image_size
    assert found.data.source == UNKNOWN
    del shapes[next(iter(shapes))]
    with refuses(f"{len(shapes)} tensors that are none"):
        networks.read_config(at)


def test_a_file_says_nothing_of_the_machine(tmp_path):
    secret = "/home/somebody/secret"
    config = replace(small(), "data", path=secret, source=f"folder:{secret}/photos")
    config = dataclasses.replace(config, output=secret, init_from=secret)
    networks.write_file(tmp_path / "a.safetensors", network_of(config))
    diffusers_folder.write(tmp_path / "a", network_of(config))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 7
    for path in files:
        content = path.read_bytes()
        assert b"somebody" not in content, path
        assert b"secret" not in content, path
    assert read(tmp_path / "a").config.data.source == "folder:photos"
    assert "| data | folder:photos |" in (tmp_path / "a" / "README.md").read_text()


def test_tensors_of_another_network_are_refused(tmp_path, refuses):
    path = tmp_path / "a.safetensors"
    networks.write_file(path, network_of(small()))
    stored = tensor_files.read(path)
    del stored.arrays["net.conv_in.bias"]
    tensor_files.write_safetensors(path, stored.arrays, stored.meta)
    with refuses("net.conv_in.bias: nothing for float32[8]"):
        read(path)


def test_a_folder_that_was_cut_off_lacks_a_part_or_is_of_others_is_refused(
    folder, refuses
):
    weights = folder / diffusers_folder.WEIGHTS
    with refuses("tensors alone"):
        networks.find(weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    with refuses(""):
        read(folder)
    weights.unlink()
    with refuses("config.json"):
        read(folder)
    other = json.dumps({"_class_name": "AutoencoderKL", "sample_size": 64})
    for text, got in (
        (other, "the class 'AutoencoderKL'"),
        ("{", ""),
        ("[1]", "a list"),
    ):
        (folder / "unet" / "config.json").write_text(text)
        with refuses(got):
            networks.read_config(networks.find(folder))


OF_RECORDS = [
    *("{", "null", "[" * 10**5, '{"version": 1, "version": 1}'),
    *({"version": 2}, {"config": None}, {"config": {"flavour": "sweet"}}),
    *({"config": {"net": {"channels": 0}}}, {"about": {"weights": "averaged"}}),
    *({"about": ABOUT._asdict() | {"step": value}} for value in ("x", -1, True)),
    *({"about": ABOUT._asdict() | {"scores": value}} for value in ({"fid": 3}, [])),
    {"about": ABOUT._asdict() | {"weights": None}},
]


def test_a_record_of_another_kind_is_refused(tmp_path, refuses):
    known = records.write(network_of(small()))
    for change in OF_RECORDS:
        said = change if isinstance(change, str) else json.dumps(known | change)
        with refuses(""):
            records.read(said, tmp_path)


def test_nothing_there_is_no_network(tmp_path):
    assert networks.find(tmp_path / "nothing") is None
    assert networks.find(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"diffusion": {}, "net": {}}))
    assert networks.find(tmp_path) is None  # a run


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_folder_that_was_there_stays_if_anything_fails(at, folder, monkeypatch):
    """The writing of the weights, moving the old folder aside, or naming the new."""

    def content():
        return {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}

    def failing(real):
        def call(*args):
            if next(calls) == at:
                raise OSError(5, "Input/output error")
            return real(*args)

        return call

    other, before, calls = network_of(small(), seed=1), content(), itertools.count(1)
    writing = failing(tensor_files.write_safetensors)
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "write_safetensors", writing)
        patch.setattr(type(folder), "rename", failing(type(folder).rename))
        with pytest.raises(OSError, match="Input/output"):
            diffusers_folder.write(folder, other)
    assert content() == before
    diffusers_folder.write(folder, other)
    same(read(folder).params, other.params)
    assert list(folder.parent.iterdir()) == [folder]
