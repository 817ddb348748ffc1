"""diffusers, where that is installed, opens what we export and computes the same.

pip install .[peers] && pytest tests/peers/test_export_live.py
"""

import re

import jax
import numpy as np
import pytest
from make_scheduler_golden import channels_first
from make_unet_golden import channels_last
from small_networks import EXPORTED, network_of, of_latents, small

from diffusion_jax.interop import unet_config as ours
from diffusion_jax.lab.network_files import diffusers_config, diffusers_folder, networks
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.wiring import build
from experiments import compare_diffusers
from experiments.configs import EXPERIMENTS

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Several threads wait for each other longer than such small networks take.
torch.set_num_threads(1)


@pytest.fixture
def complaints(monkeypatch):
    """What diffusers warns of, where it goes through its own log."""
    said = []
    kind = diffusers.utils.logging.get_logger("diffusers").__class__
    monkeypatch.setattr(kind, "warning", lambda self, text, *a: said.append(text))
    return said


def opened(network, folder):
    diffusers_folder.write(folder / "out", network)
    return diffusers.DDPMPipeline.from_pretrained(folder / "out")


def images(config):
    return np.random.default_rng(0).normal(size=(2, *config.data.shape)).astype("f4")


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_a_pipeline_opens_and_computes_the_same(config, tmp_path, complaints):
    network = network_of(config)
    pipeline = opened(network, tmp_path)
    assert not [text for text in complaints if "accelerate" not in text]
    scheduler = pipeline.scheduler.config
    kinds = {"small": "fixed_small", "large": "fixed_large", "range": "learned_range"}
    assert scheduler.variance_type == kinds[config.diffusion.variance]
    names = {"eps": "epsilon", "v": "v_prediction"}
    assert scheduler.prediction_type == names[config.diffusion.prediction]
    assert scheduler.clip_sample == config.sample.clip
    np.testing.assert_allclose(
        pipeline.scheduler.betas.numpy(), diffusers_config.betas_of(config), rtol=2e-5
    )
    x, t = images(config), np.array([3, 900])
    label = np.array([0, 9]) if config.net.classes else None
    labels = None if label is None else torch.tensor(label)
    made = pipeline.unet(channels_first(x), torch.tensor(t), class_labels=labels)
    there, apply = channels_last(made.sample), jax.jit(build.make_network(config).apply)
    with jax.default_matmul_precision("highest"):
        here = apply({"params": network.params["net"]}, x, t, label)
    assert np.abs(here - there).max() < 1e-4 * np.abs(there).max()


def test_a_consistency_model_jumps_to_the_same_images(tmp_path):
    config = small("digits_consistency")
    network = network_of(config)
    pipeline = opened(network, tmp_path)
    assert isinstance(pipeline.scheduler, diffusers.LCMScheduler)
    pipeline.scheduler.set_timesteps(2)
    levels = build.make_schedule(config)
    apply = build.make_apply(config, network.params, levels)
    denoise = build.make_denoiser(config, apply, levels, clip=config.sample.clip)
    x = images(config)
    theirs = channels_first(x)
    for t in pipeline.scheduler.timesteps:
        there = pipeline.scheduler.step(pipeline.unet(theirs, t).sample, t, theirs)
        here = denoise(x, np.full(2, int(t) + 1)).x0
        np.testing.assert_allclose(channels_last(there.denoised), here, atol=1e-5)


def test_what_diffusers_saves_again_is_read_back(tmp_path):
    """Our record is gone, and its own fields are there."""
    network = network_of(small())
    opened(network, tmp_path).save_pretrained(tmp_path / "again")
    found = networks.read(networks.find(tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, found.params, network.params)
    assert found.config.diffusion == network.config.diffusion


def compared(folder, capsys, *flags):
    """What the command says that both draw of: the lowest, the highest, how far off."""
    assert compare_diffusers.main([str(folder), "--count", "2", *flags]) == 0
    shown = capsys.readouterr().out
    print(shown)
    found = re.search(r"from (\S+) to (\S+)\nlargest difference (\S+),", shown)
    return map(float, found.groups())


@pytest.mark.parametrize(
    ("size", "flags"), [((8, 16), ["--steps", "50"]), (8, ["--sampler", "ddpm"])]
)
def test_both_draw_the_same_images(size, flags, tmp_path, capsys):
    fields = {"schedule": "linear", "prediction": "eps", "num_steps": 100}
    config = replace(small(), "diffusion", **fields)
    config = replace(config, "data", image_size=size)
    config = replace(config, "sample", steps=100)
    diffusers_folder.write(tmp_path / "out", network_of(config))
    *_, off = compared(tmp_path / "out", capsys, *flags)
    assert off < 1e-3


def test_both_draw_the_same_images_from_latents(tmp_path, capsys, complaints):
    networks.write_folder(tmp_path / "out", network_of(of_latents()))
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path / "out")
    # That the autoencoder has a KL divergence, and no codebook, does not matter to it.
    assert len([text for text in complaints if "accelerate" not in text]) <= 1
    made = pipeline(num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 8, 8, 1)
    low, high, off = compared(tmp_path / "out", capsys, "--steps", "10")
    assert high - low > 1
    assert off < 1e-4


def test_configurations_are_those_of_the_library():
    """Every field is one that it has, and none is left out."""
    unet, scheduler = diffusers_config.to_diffusers(EXPERIMENTS["cifar10"].config)
    fields, scheduler = (
        {key: value for key, value in made.items() if key[0] != "_"}
        for made in (unet, scheduler)
    )
    net = diffusers.UNet2DModel(**fields | {"block_out_channels": [32] * 4})
    assert set(fields) == {key for key in net.config if key[0] != "_"}
    made = diffusers.DDPMScheduler.from_config(scheduler)
    assert {key: made.config[key] for key in scheduler} == scheduler
    assert type(net).__name__ == ours.CLASS
