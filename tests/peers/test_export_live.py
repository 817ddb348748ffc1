"""diffusers, where that is installed, opens what we export and computes the same.

pip install .[peers] && pytest tests/peers/test_export_live.py
"""

import re

import jax
import numpy as np
import pytest
from small_networks import EXPORTED, network_of, of_latents, small

from diffusion_jax.interop import unet_config as ours
from diffusion_jax.lab.network_files import diffusers_config, diffusers_folder, networks
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.wiring import build
from experiments import compare_diffusers
from experiments.configs import EXPERIMENTS

UNET, SCHEDULER = diffusers_config.to_diffusers(EXPERIMENTS["cifar10"].config)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Several threads wait for each other longer than such small networks take.
torch.set_num_threads(1)


@pytest.fixture
def complaints(monkeypatch):
    """What diffusers warns of, where it goes through its own log."""
    said = []
    logger = diffusers.utils.logging.get_logger("diffusers")
    monkeypatch.setattr(
        logger.__class__, "warning", lambda self, text, *a: said.append(text)
    )
    return said


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_a_pipeline_opens_and_computes_the_same(config, tmp_path, complaints):
    network = network_of(config)
    folder = tmp_path / "out"
    diffusers_folder.write(folder, network)
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    assert not [text for text in complaints if "accelerate" not in text]
    scheduler, unet = pipeline.scheduler.config, pipeline.unet
    kinds = {"small": "fixed_small", "large": "fixed_large", "range": "learned_range"}
    assert scheduler.variance_type == kinds[config.diffusion.variance]
    names = {"eps": "epsilon", "v": "v_prediction"}
    assert scheduler.prediction_type == names[config.diffusion.prediction]
    assert scheduler.clip_sample == config.sample.clip
    np.testing.assert_allclose(
        pipeline.scheduler.betas.numpy(), diffusers_config.betas_of(config), rtol=2e-5
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *config.data.shape)).astype(np.float32)
    t, label = np.array([3, 900]), np.array([0, 9])
    labels = config.net.classes > 0
    more = {"class_labels": torch.tensor(label)} if labels else {}
    with torch.no_grad():
        there = unet(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), **more)
    net = build.make_network(config)
    with jax.default_matmul_precision("highest"):
        here = jax.jit(net.apply)(
            {"params": network.params["net"]}, x, t, label if labels else None
        )
    there = there.sample.numpy().transpose(0, 2, 3, 1)
    assert np.abs(here - there).max() < 1e-4 * np.abs(there).max()


def test_a_consistency_model_jumps_to_the_same_images(tmp_path):
    config = small("digits_consistency")
    network = network_of(config)
    diffusers_folder.write(tmp_path / "out", network)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline.scheduler, diffusers.LCMScheduler)
    pipeline.scheduler.set_timesteps(2)
    levels = build.make_schedule(config)
    apply = build.make_apply(config, network.params, levels)
    denoise = build.make_denoiser(config, apply, levels, clip=config.sample.clip)
    x = np.random.default_rng(0).normal(size=(2, *config.data.shape)).astype("float32")
    theirs = torch.tensor(x.transpose(0, 3, 1, 2))
    for t in pipeline.scheduler.timesteps:
        with torch.no_grad():
            there = pipeline.scheduler.step(pipeline.unet(theirs, t).sample, t, theirs)
        here = denoise(x, np.full(2, int(t) + 1)).x0
        np.testing.assert_allclose(
            np.moveaxis(there.denoised.numpy(), 1, -1), here, atol=1e-5
        )


def test_what_diffusers_saves_again_is_read_back(tmp_path):
    """Our record is gone, and its own fields are there."""
    network = network_of(small())
    diffusers_folder.write(tmp_path / "out", network)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    pipeline.save_pretrained(tmp_path / "again")
    found = networks.read(networks.find(tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, found.params, network.params)
    assert found.config.diffusion == network.config.diffusion


@pytest.mark.parametrize(
    ("size", "flags"), [((8, 16), ["--steps", "50"]), (8, ["--sampler", "ddpm"])]
)
def test_both_draw_the_same_images(size, flags, tmp_path, capsys):
    config = replace(small(), "diffusion", schedule="linear", prediction="eps")
    config = replace(config, "data", image_size=size)
    diffusers_folder.write(tmp_path / "out", network_of(config))
    assert compare_diffusers.main([str(tmp_path / "out"), "--count", "2", *flags]) == 0
    shown = capsys.readouterr().out
    off = float(re.search(r"largest difference (\S+),", shown)[1])
    print(shown)
    assert off < 1e-3


def test_both_draw_the_same_images_from_latents(tmp_path, capsys, complaints):
    network = network_of(of_latents())
    networks.write_folder(tmp_path / "out", network)
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path / "out")
    # That the autoencoder has a KL divergence, and no codebook, does not matter to it.
    assert len([text for text in complaints if "accelerate" not in text]) <= 1
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (
        1,
        8,
        8,
        1,
    )
    flags = ["--count", "2", "--steps", "10"]
    assert compare_diffusers.main([str(tmp_path / "out"), *flags]) == 0
    shown = capsys.readouterr().out
    print(shown)
    low, high, off = map(
        float,
        re.search(r"from (\S+) to (\S+)\nlargest difference (\S+),", shown).groups(),
    )
    assert high - low > 1
    assert off < 1e-4


def test_configurations_are_those_of_the_library():
    """Every field is one that it has, and none is left out."""
    fields = {key: value for key, value in UNET.items() if key[0] != "_"}
    unet = diffusers.UNet2DModel(**fields | {"block_out_channels": [32] * 4})
    assert set(fields) == {key for key in unet.config if key[0] != "_"}
    made = diffusers.DDPMScheduler.from_config(SCHEDULER)
    assert {k: made.config[k] for k in SCHEDULER if k[0] != "_"} == {
        k: v for k, v in SCHEDULER.items() if k[0] != "_"
    }
    assert type(unet).__name__ == ours.CLASS
