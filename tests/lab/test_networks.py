"""Trained networks in files: written, read back, and refused where they are wrong."""

import dataclasses
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


@pytest.fixture
def file(tmp_path):
    networks.write_file(tmp_path / "good.safetensors", network_of(small()))
    return tmp_path / "good.safetensors"


# There and back.


@pytest.mark.parametrize("name", ["digits_vdm", "digits_conditional"])
def test_a_file_gives_back_the_network(name, tmp_path):
    network = network_of(small(name))
    digest = networks.write_file(tmp_path / "a.safetensors", network)
    found = read(tmp_path / "a.safetensors")
    same(found.params, network.params)
    assert found.config == dataclasses.replace(network.config, name="a")
    assert found.about == ABOUT
    assert found.sha256 == digest
    assert networks.write_file(tmp_path / "b.safetensors", found) == digest


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_a_folder_gives_back_the_network_and_without_our_record_what_is_computed(
    config, tmp_path
):
    network = network_of(config)
    digest = diffusers_folder.write(tmp_path / "out", network)
    found = read(tmp_path / "out")
    same(found.params, network.params)
    assert found.config == dataclasses.replace(config, name="out")
    assert (found.about, found.sha256) == (ABOUT, digest)
    (tmp_path / "out" / diffusers_folder.RECORD).unlink()
    found = read(tmp_path / "out")
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


def test_a_network_alone_is_taken_for_the_papers_and_that_is_said(
    folder, tmp_path, capsys
):
    assert networks.find(folder / "unet") == networks.find(folder)
    (folder / "unet").rename(tmp_path / "alone")
    found = read(tmp_path / "alone").config.diffusion
    assert "there is no scheduler_config.json" in capsys.readouterr().out
    assert (found.schedule, found.beta_end, found.num_steps) == ("linear", 0.02, 1000)
    assert (found.prediction, found.variance) == ("eps", "small")


def test_a_folder_of_the_first_releases_is_read(folder, tmp_path):
    """All in one folder, without our record; the scheduler has few fields."""
    old = tmp_path / "old"
    (folder / "unet").rename(old)
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
    scheduler |= {"timestep_values": None, "trained_betas": None}
    (old / "scheduler_config.json").write_text(json.dumps(scheduler))
    found = read(old)
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
    for name in [n for n in arrays if n.endswith("/W")]:
        arrays[f"{name}/Adam"] = arrays[name]
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
    config = replace(small(), "data", path="/home/somebody/data")
    config = replace(config, "data", source="folder:/home/somebody/photos")
    config = dataclasses.replace(
        config, output=str(tmp_path / "secret"), init_from="/home/somebody/a"
    )
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


def test_a_field_younger_than_the_file_has_its_default(tmp_path):
    values = records.write(network_of(small()))
    del values["config"]["net"]["variant"], values["config"]["init_from"]
    config, _ = records.read(json.dumps(values), tmp_path)
    assert config.net.variant == "official"


# What is wrong with files.


def test_a_file_that_was_cut_off_is_refused(file, folder, refuses):
    for path, opened in ((file, file), (folder / diffusers_folder.WEIGHTS, folder)):
        path.write_bytes(path.read_bytes()[:-1])
        with refuses(""):
            read(opened)


def test_tensors_of_another_network_are_refused(file, refuses):
    stored = tensor_files.read(file)
    arrays = {
        name: x for name, x in stored.arrays.items() if name != "net.conv_in.bias"
    }
    tensor_files.write_safetensors(file, arrays, stored.meta)
    with refuses("net.conv_in.bias: nothing for float32[8]"):
        read(file)


def test_weights_and_configuration_without_each_other_are_refused(folder, refuses):
    weights = folder / diffusers_folder.WEIGHTS
    with refuses("tensors alone"):
        networks.find(weights)
    weights.unlink()
    with refuses("config.json"):
        read(folder)


def test_a_configuration_of_another_family_or_none_is_refused(folder, refuses):
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
            calls.append(real)
            if len(calls) == at:
                raise OSError(5, "Input/output error")
            return real(*args)

        return call

    before, calls = content(), []
    for owner, name in ((tensor_files, "write_safetensors"), (type(folder), "rename")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    with pytest.raises(OSError, match="Input/output"):
        diffusers_folder.write(folder, network_of(small(), seed=1))
    monkeypatch.undo()
    assert content() == before
    diffusers_folder.write(folder, network_of(small(), seed=1))
    same(read(folder).params, network_of(small(), seed=1).params)
    assert list(folder.parent.iterdir()) == [folder]
