"""Weights and configurations of autoencoders under the names of others."""

import functools
import json

import numpy as np
import pytest
from small_networks import any_bits, assert_same_bits

from diffusion_jax.interop import autoencoder_config, autoencoder_names, unet_names
from diffusion_jax.nets.autoencoder import AutoencoderKL

SMALL = AutoencoderKL(8, (1, 2), blocks=1, latent=3, groups=4)
NETS = {
    "all": SMALL.clone(multipliers=(1, 2, 4), blocks=2, attention=(1, 2)),
    "bare": SMALL.clone(quant=False, middle_attention=False, image_channels=1),
    "plain": SMALL.clone(noise=False),
}
TABLES = ("diffusers", "compvis")


@functools.cache
def network(name):
    """Shapes, parameters of any bits, and the names of both tables."""
    shapes = autoencoder_names.shapes(NETS[name])
    diffusers = autoencoder_names.diffusers_names(shapes, len(NETS[name].multipliers))
    names = (diffusers, autoencoder_names.compvis_names(shapes))
    return shapes, any_bits(shapes), dict(zip(TABLES, names, strict=True))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("table", TABLES)
def test_there_and_back_every_weight_has_the_same_bits(table, name):
    shapes, params, names = network(name)
    theirs = unet_names.to_tensors(params, names[table])
    back = unet_names.from_tensors(theirs, names[table], shapes, where="a file")
    assert_same_bits(back, params)


def compvis(*, levels, blocks, attention):
    """The names of CompVis' autoencoder, from its lists of modules."""
    block = ["norm1", "conv1", "norm2", "conv2"]
    attn = ["norm", "q", "k", "v", "proj_out"]
    for half, way, count in (
        ("encoder", "down", blocks),
        ("decoder", "up", blocks + 1),
    ):
        yield from (f"{half}.{each}" for each in ("conv_in", "norm_out", "conv_out"))
        for place in ("mid.block_1", "mid.block_2"):
            yield from (f"{half}.{place}.{part}" for part in block)
        yield from (f"{half}.mid.attn_1.{part}" for part in attn)
        for i in range(levels):
            for j in range(count):
                yield from (f"{half}.{way}.{i}.block.{j}.{part}" for part in block)
                if i in attention:
                    yield from (f"{half}.{way}.{i}.attn.{j}.{part}" for part in attn)
                # A level narrows or widens in its first block.
                if j == 0 and (i > 0 if way == "down" else i < levels - 1):
                    yield f"{half}.{way}.{i}.block.0.nin_shortcut"
            resized = i < levels - 1 if way == "down" else i > 0
            if resized:
                yield f"{half}.{way}.{i}.{way}sample.conv"
    yield from ("quant_conv", "post_quant_conv")


def test_compvis_names_are_those_of_its_modules():
    theirs = unet_names.to_tensors(network("all")[1], network("all")[2]["compvis"])
    modules = compvis(levels=3, blocks=2, attention=(1, 2))
    assert set(theirs) == {
        f"{m}.{leaf}" for m in modules for leaf in ("weight", "bias")
    }
    assert theirs["encoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    assert theirs["decoder.up.0.block.0.nin_shortcut.weight"].shape == (8, 16, 1, 1)
    assert theirs["quant_conv.weight"].shape == (6, 6, 1, 1)


@pytest.mark.parametrize("name", NETS)
def test_what_compvis_has_no_configuration_for_is_read_off_the_tensors(name):
    net = NETS[name].clone(groups=32, channels=32)
    own = autoencoder_names.shapes(net)
    empty = {key: np.zeros(shape, np.int8) for key, shape in own.items()}
    names = autoencoder_names.compvis_names(own)
    tensors = unet_names.to_tensors(empty, names)
    whole = {f"first_stage_model.{key}": value for key, value in tensors.items()}
    for found in (
        {**tensors, "loss.logvar": 0, "loss.discriminator.main.0.weight": 0},
        {**whole, "model.diffusion_model.out.0.weight": 0, "betas": 0},
    ):
        inside = autoencoder_names.of_compvis(found)
        assert inside.keys() == tensors.keys()
        there = {key: value.shape for key, value in inside.items()}
        assert autoencoder_names.architecture(there, where="a file") == net


@pytest.mark.parametrize("name", ["all", "bare"])
def test_configurations_are_written_as_they_are_read(name):
    written = autoencoder_config.write_config(NETS[name], image_size=64, scale=0.5)
    found = autoencoder_config.read_config(
        json.loads(json.dumps(written)), where="config.json"
    )
    assert found == (NETS[name], 64, (0.0,) * 3, (0.5,) * 3)


def test_a_channel_may_have_a_scale_of_its_own():
    """diffusers shifts by latents_mean and divides by latents_std, then multiplies."""
    given = {"_class_name": "AutoencoderKL", "latent_channels": 2}
    given["scaling_factor"] = 0.5
    read = functools.partial(autoencoder_config.read_config, where="config.json")
    found = read({**given, "latents_mean": [1.0, 2.0], "latents_std": [4.0, 5.0]})
    assert found.shift == (1.0, 2.0)
    assert found.scale == (0.125, 0.1)
    assert read({**given, "shift_factor": 0.1159}).shift == (0.1159, 0.1159)


def test_all_that_does_not_fit_is_named(refuses):
    def read(**given):
        given = {"_class_name": "AutoencoderKL", **given}
        return autoencoder_config.read_config(given, where="config.json")

    with refuses("1 tensors"):
        autoencoder_names.architecture({"time_embed.0.weight": (2, 2)}, where="x.ckpt")
    with refuses("'VQModel'"):
        read(_class_name="VQModel")
    with refuses("norm_type 'spatial'; out_channels 4, not in_channels 3"):
        read(norm_type="spatial", out_channels=4)
    with refuses("layers_per_block 0, not a whole number above 0; act_fn 'relu'"):
        read(layers_per_block=0, act_fn="relu")
    with refuses("use_post_quant_conv False, not use_quant_conv True"):
        read(use_post_quant_conv=False)
    with refuses("block_out_channels [64, 96], not multiples"):
        read(block_out_channels=[64, 96])
    with refuses("('DownEncoderBlock2D', 'AttnDownEncoderBlock2D') a level"):
        read(down_block_types=["CrossAttnDownBlock2D"])
    with refuses("latents_mean of 1 numbers, not 4"):
        read(latents_mean=[0.0])
    with refuses("noise False"):
        autoencoder_config.write_config(NETS["plain"], image_size=8)
