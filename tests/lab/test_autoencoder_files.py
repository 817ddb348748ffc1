"""Autoencoders in folders of diffusers and files of CompVis: to the bit, converted."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import safetensors.numpy
from small_networks import network_of, read, same

from diffusion_jax.errors import ConfigError
from diffusion_jax.interop import autoencoder_names, unet_names
from diffusion_jax.lab.network_files import (
    autoencoder_files,
    diffusers_folder,
    networks,
)
from diffusion_jax.lab.schema.config import UNKNOWN, replace
from experiments import convert
from experiments.configs import EXPERIMENTS


def config_of(kind="kl", **fields):
    config = EXPERIMENTS["digits_autoencoder"].config
    given = {"channels": 8, "groups": 4, "attention": (1,), **fields}
    return replace(config, "autoencoder", kind=kind, kl_weight=None, **given)


@pytest.fixture
def network():
    return network_of(config_of())


def test_a_network_goes_round_all_formats_with_the_same_bits(network, tmp_path, capsys):
    file, folder = tmp_path / "a.safetensors", tmp_path / "folder"
    again = tmp_path / "b.safetensors"
    networks.write_file(file, network)
    for source, out in itertools.pairwise((file, folder, again)):
        assert convert.main([str(source), str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"AutoencoderKL.from_pretrained('{folder}')" in shown
    assert f"python -m experiments.eval_autoencoder {again}" in shown
    same(read(again).params, network.params)
    assert read(again).config.autoencoder == network.config.autoencoder
    assert networks.find(folder).kind == "autoencoder"
    # And the folder again, over itself.
    assert convert.main([str(file), str(folder), "--overwrite"]) == 0
    card = (folder / "README.md").read_text()
    assert "f2, 2 channels" in card
    assert "AutoencoderKL.from_pretrained('folder')" in card


def test_a_folder_without_our_record_is_one_of_diffusers(network, tmp_path, capsys):
    networks.write_folder(tmp_path / "net", network)
    (tmp_path / "net" / diffusers_folder.RECORD).unlink()
    found = read(tmp_path / "net")
    same(found.params, network.params)
    assert found.config.data.source == UNKNOWN
    assert found.config.data.shape == network.config.data.shape
    ours, theirs = found.config.autoencoder, network.config.autoencoder
    assert ours == dataclasses.replace(theirs, loss=ours.loss, kl_weight=None)
    assert "scaling_factor 1.0 is left behind" in capsys.readouterr().out


def test_a_vae_leaves_the_width_of_its_decoder_behind(tmp_path, capsys):
    vae, file, out = network_of(config_of("vae", loss="l1")), "vae.safetensors", "net"
    networks.write_file(tmp_path / file, vae)
    assert convert.main([str(tmp_path / file), str(tmp_path / out)]) == 0
    assert "the width of its decoder is left behind" in capsys.readouterr().out
    found = read(tmp_path / out)
    assert found.config.autoencoder.kind == "kl"
    same(found.params, {"net": vae.params["net"]})


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("", "loss.logvar"),
        (autoencoder_names.STAGE, "model.diffusion_model.out.0.bias"),
    ],
)
def test_a_file_of_compvis_is_read_without_a_configuration(prefix, beside, tmp_path):
    """That of an autoencoder with its losses, or of a whole latent diffusion model."""
    config, path = config_of(channels=32, groups=32), tmp_path / "vae.safetensors"
    params = network_of(config).params
    names = autoencoder_names.compvis_names(diffusers_folder.shapes(config))
    tensors = unet_names.to_tensors(params["net"], names)
    tensors = {f"{prefix}{name}": value for name, value in tensors.items()}
    safetensors.numpy.save_file({**tensors, beside: np.zeros(1, np.float32)}, path)
    found = read(path)
    same(found.params, params)
    theirs = dataclasses.replace(config.autoencoder, loss="l1", kl_weight=None)
    assert found.config.autoencoder == theirs
    assert (found.config.data.shape, found.config.name) == ((256, 256, 1), "vae")


def test_what_is_no_autoencoder_that_fits_is_refused(network, tmp_path, refuses):
    folder = tmp_path / "net"
    networks.write_folder(folder, network)
    (folder / diffusers_folder.RECORD).unlink()
    config = json.loads((folder / "config.json").read_text())
    for wrong, said in (
        ({"norm_type": "spatial", "act_fn": "relu"}, "norm_type 'spatial'; act_fn"),
        ({"in_channels": 4, "out_channels": 4}, "4 channels"),
        ({"latent_channels": 3}, "that do not fit"),
    ):
        (folder / "config.json").write_text(json.dumps(config | wrong))
        with refuses(said):
            read(folder)
    (folder / autoencoder_files.WEIGHTS).unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with refuses("README.md"):
        read(folder)


def test_a_plain_autoencoder_is_not_one_of_diffusers(tmp_path, refuses):
    plain = network_of(config_of("ae"))
    with refuses("noise False"):
        networks.write_folder(tmp_path / "net", plain)
    assert not (tmp_path / "net").exists()
    networks.write_file(tmp_path / "plain.safetensors", plain)
    same(read(tmp_path / "plain.safetensors").params, plain.params)
    with pytest.raises(ConfigError, match="a file is there"):
        convert.main([str(tmp_path / "plain.safetensors")] * 2)
