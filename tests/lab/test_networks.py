"""Trained networks in files: written, read back, and refused where they are wrong."""

import dataclasses
import json
import re

import numpy as np
import pytest
from small_networks import ABOUT, EXPORTED, network_of, read, same, small

from diffusion_jax.interop import unet_names
from diffusion_jax.lab.network_files import diffusers_folder, networks, records
from diffusion_jax.lab.schema.config import UNKNOWN, official, replace
from diffusion_jax.lab.wiring import build
from diffusion_jax.storage import tensor_files, tensorflow_checkpoint
from experiments.configs import EXPERIMENTS

# There and back.


@pytest.mark.parametrize("name", ["digits", "digits_vdm", "digits_conditional"])
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


def test_a_folder_that_was_changed_is_read_as_it_is_now(tmp_path, capsys):
    diffusers_folder.write(tmp_path / "out", network_of(small()))
    path = tmp_path / "out" / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text()) | {"clip_sample": False}
    path.write_text(json.dumps(values))
    found = read(tmp_path / "out")
    assert found.config.sample.clip is False
    assert "is no more what the folder is" in capsys.readouterr().out


def test_a_network_alone_is_taken_for_the_papers_and_that_is_said(tmp_path, capsys):
    diffusers_folder.write(tmp_path / "out", network_of(small()))
    pipeline = networks.find(tmp_path / "out")
    assert networks.find(tmp_path / "out" / "unet") == pipeline
    (tmp_path / "out" / "unet").rename(tmp_path / "alone")
    found = read(tmp_path / "alone").config.diffusion
    assert "there is no scheduler_config.json" in capsys.readouterr().out
    assert (found.schedule, found.beta_end, found.num_steps) == ("linear", 0.02, 1000)
    assert (found.prediction, found.variance) == ("eps", "small")


def test_a_folder_of_the_first_releases_is_read(tmp_path):
    """All in one folder, other names of attentions, and few fields."""
    config = small()
    network = network_of(config)
    diffusers_folder.write(tmp_path / "new", network)
    old = tmp_path / "old"
    old.mkdir()
    unet = json.loads((tmp_path / "new/unet/config.json").read_text())
    fields = "sample_size in_channels out_channels freq_shift flip_sin_to_cos norm_eps"
    fields += " down_block_types up_block_types block_out_channels layers_per_block"
    fields += " downsample_padding attention_head_dim norm_num_groups _class_name"
    kept = {name: unet[name] for name in fields.split()}
    (old / "config.json").write_text(json.dumps(kept))
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "fixed_small"}
    scheduler |= {"timestep_values": None, "trained_betas": None, "beta_end": 0.02}
    (old / "scheduler_config.json").write_text(json.dumps(scheduler))
    stored = tensor_files.read(
        tmp_path / "new/unet/diffusion_pytorch_model.safetensors"
    )
    before = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    arrays = {
        re.sub("to_[qkv]|to_out.0", lambda found: before[found[0]], name): array
        for name, array in stored.arrays.items()
    }
    assert set(arrays) != set(stored.arrays)
    tensor_files.write_safetensors(
        old / "diffusion_pytorch_model.safetensors", arrays, {"format": "pt"}
    )
    found = read(old)
    same(found.params, network.params)
    assert found.config.diffusion.variance == "small"


@pytest.mark.parametrize("average", [True, False])
def test_a_checkpoint_of_the_authors_is_read(average, monkeypatch):
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
    found = networks.read_official("model.ckpt-790000", config, average=average)
    same(found.params, both[average].params)
    assert found.about.step == 790_000
    assert found.about.weights == ("averaged" if average else "last")
    assert found.config == official(config)


@pytest.mark.parametrize("name", ["cifar10", "lsun_church256", "lsun_bedroom256_large"])
def test_a_checkpoint_tells_which_network_it_is(name, monkeypatch, tmp_path):
    """Not which data: the networks of 256x256 are all alike."""
    config = official(EXPERIMENTS[name].config)
    own = diffusers_folder.shapes(config)
    names = unet_names.official_names(own, average=False)
    shapes = {names[key].name: own[key] for key in own} | {"global_step": ()}
    monkeypatch.setattr(tensorflow_checkpoint, "shapes", lambda path: shapes)
    found = networks.read_config(networks.Found(tmp_path / "model.ckpt-7", "official"))
    assert (found.net, found.diffusion) == (config.net, config.diffusion)
    assert found.data.image_size == config.data.image_size
    assert found.data.source == UNKNOWN


def test_a_checkpoint_of_another_network_is_refused(monkeypatch, tmp_path, refuses):
    monkeypatch.setattr(tensorflow_checkpoint, "shapes", lambda path: {"dense/w": (3,)})
    with refuses("1 tensors that are none"):
        networks.read_config(networks.Found(tmp_path / "a", "official"))


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


# What diffusers has no words for, and what we have none for.


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("digits_edm", "the schedule ve"),
        ("digits_flow", "prediction velocity"),
        ("digits_vdm", "the schedule learned"),
        ("digits_table2_mean_mse", "prediction mean"),
        ("digits_table2_eps_vlb_learned", "variance learned"),
    ],
)
def test_what_diffusers_lacks_is_named_and_nothing_is_written(
    name, got, tmp_path, refuses
):
    with refuses(got):
        diffusers_folder.write(tmp_path / "out", network_of(small(name)))
    assert not list(tmp_path.iterdir())


# What is wrong with files.


@pytest.fixture
def folder(tmp_path):
    diffusers_folder.write(tmp_path / "good", network_of(small()))
    return tmp_path / "good"


@pytest.fixture
def file(tmp_path):
    networks.write_file(tmp_path / "good.safetensors", network_of(small()))
    return tmp_path / "good.safetensors"


@pytest.mark.parametrize("kept", [0.3, 0.999])
def test_a_file_that_was_cut_off_is_refused(kept, file, folder, refuses):
    tensors = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for path, opened in ((file, file), (tensors, folder)):
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])
        with refuses(""):
            read(opened)


def test_tensors_without_a_configuration_are_refused(tmp_path, refuses):
    path = tmp_path / "a.safetensors"
    tensor_files.write_safetensors(path, {"a": np.zeros(3, np.float32)}, {})
    with refuses("tensors alone"):
        networks.find(path)


def test_a_configuration_without_weights_is_refused(folder, refuses):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with refuses("config.json"):
        read(folder)


def test_another_family_is_refused(folder, refuses):
    path = folder / "unet" / "config.json"
    for kind in ("UNet2DConditionModel", "AutoencoderKL", None):
        path.write_text(json.dumps({"_class_name": kind, "sample_size": 64}))
        with refuses(f"the class {kind!r}"):
            networks.read_config(networks.find(folder))


def test_a_damaged_configuration_is_refused(folder, refuses):
    for text in ("", "{", "[1, 2]", "\x00", "[" * 10**5):
        (folder / "unet" / "config.json").write_text(text)
        with refuses(""):
            networks.read_config(networks.find(folder))


def test_every_tensor_that_does_not_fit_is_named(file, refuses):
    stored = tensor_files.read(file)
    arrays = dict(stored.arrays)
    arrays["net.conv_in.bias"] = arrays["net.conv_in.bias"][:3]
    arrays["net.more"] = arrays.pop("net.conv_out.bias")
    arrays["net.norm_out.scale"] = arrays["net.norm_out.scale"] * np.nan
    tensor_files.write_safetensors(file, arrays, stored.meta)
    with pytest.raises(ValueError) as caught:
        read(file)
    for said in (
        "got 4 that do not fit",
        "net.conv_out.bias: nothing for float32[1]",
        "net.more: float32[1] for nothing",
        "net.conv_in.bias: float32[3] for float32[8]",
        "net.norm_out.scale: values that are not finite",
    ):
        assert said in str(caught.value)


OF_RECORDS = [
    *("", "{", "[]", "null", "[" * 10**5, '{"version": 1, "version": 1}'),
    {"version": 2},
    *({"config": value} for value in (None, {"flavour": "sweet"})),
    *({"config": {"net": {"channels": value}}} for value in (0, 10**9)),
    *({"about": value} for value in (None, {"weights": "averaged"})),
    *({"about": ABOUT._asdict() | {"step": value}} for value in ("x", -1, True)),
    *({"about": ABOUT._asdict() | {"scores": value}} for value in ({"fid": 3}, [])),
    *({"about": ABOUT._asdict() | {name: None}} for name in ("weights", "origin")),
]


def test_a_record_of_another_kind_is_refused(file, refuses):
    stored = tensor_files.read(file)
    known = json.loads(stored.meta[networks.FORMAT])
    for change in OF_RECORDS:
        said = change if isinstance(change, str) else json.dumps(known | change)
        tensor_files.write_safetensors(file, stored.arrays, {networks.FORMAT: said})
        with refuses(""):
            networks.read_config(networks.find(file))


def test_nothing_there_is_no_network(tmp_path):
    assert networks.find(tmp_path / "nothing") is None
    assert networks.find(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"diffusion": {}, "net": {}}))
    assert networks.find(tmp_path) is None  # a run


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        diffusers_folder.write(tmp_path / "out", network_of(small()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [1, 2])
def test_a_folder_that_was_there_stays_if_anything_fails(at, folder, monkeypatch):
    def content():
        return {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}

    before = content()
    real, calls = type(folder).rename, []

    def rename(self, target):
        calls.append(self)
        if len(calls) == at:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(type(folder), "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        diffusers_folder.write(folder, network_of(small(), seed=1))
    monkeypatch.undo()
    assert content() == before
    diffusers_folder.write(folder, network_of(small(), seed=1))
    same(read(folder).params, network_of(small(), seed=1).params)
    assert list(folder.parent.iterdir()) == [folder]
