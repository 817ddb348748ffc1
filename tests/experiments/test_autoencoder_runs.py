"""Autoencoders: trained as all else is, measured, and told from diffusion models."""

import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import state_digests

from diffusion_jax import lab
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.measure import linear, reconstruction
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import checks
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.training import arguments
from diffusion_jax.lab.wiring import autoencoders, build, learning
from experiments import eval_autoencoder, sample, train
from experiments.configs import EXPERIMENTS

SMALL = shlex.split(
    """--autoencoder.channels 8 --autoencoder.groups 4 --train.batch-size 8
--optimizer.warmup 2 --train.steps 12 --train.log-every 5 --sample.every 12
--sample.count 6 --train.devices 1"""
)


KL = "--autoencoder.kind kl"
RIVAL = f"{KL} --autoencoder.discriminator 0.5"


def trained(folder, name, *flags):
    where = ["--output", str(folder), "--name", name]
    assert train.main(["digits_vae", *SMALL, *where, *flags]) == 0
    return runs.Run(folder / name)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs"), "vae")


def small(kind, **fields):
    config = replace(EXPERIMENTS["digits_vae"].config, "train", batch_size=4)
    return replace(config, "autoencoder", kind=kind, channels=8, groups=4, **fields)


def test_a_run_that_was_stopped_has_the_bits_of_one_that_was_not(vae):
    again = trained(vae.folder.parent, "stopped", "--train.stop-at", "7")
    assert not (again.samples / "step_00000012.png").exists()
    again = trained(vae.folder.parent, "stopped")
    assert state_digests(again) == state_digests(vae)
    assert again.metrics.read_text() == vae.metrics.read_text()
    lines = runs.read_lines(vae.metrics)
    for line in lines:
        assert line["loss"] == pytest.approx(line["reconstruction"] + line["kl"])
        assert line["kl"] > 0
        assert "held_out_loss" in line


def test_a_run_is_measured_and_no_diffusion_is_asked_of_it(vae, capsys):
    assert eval_autoencoder.main([str(vae.folder), "--extractor", "none"]) == 0
    said = capsys.readouterr().out
    assert "bound (ELBO)" in said
    assert "PCA" in said
    result = json.loads((vae.folder / "eval/autoencoder_test.json").read_text())
    assert (result["images"], result["units"]) == (180, 32)
    terms = result["bound"]
    assert terms["bits_per_dim"] == pytest.approx(
        terms["reconstruction"] + result["kl_nats"] / 64 / np.log(2)
    )
    held = build.load_data(runs.read_config(vae), split="test").images
    bits = lab.load(vae.folder).bits_per_dim(held)
    assert bits.shape == (180,)
    assert bits.mean() == pytest.approx(terms["bits_per_dim"], rel=1e-5)
    for name in ("pairs", "prior", "traversals", "interpolation"):
        assert (vae.folder / f"eval/autoencoder_{name}.png").stat().st_size
    with pytest.raises(ConfigError, match=r"must be of diffusion; got .*/vae"):
        sample.main([str(vae.folder)])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--net.channels 64", "net.channels must be left out with an autoencoder"),
        ("--diffusion.num-steps 9", "diffusion.num_steps must be left out with an"),
        ("--data.image-size 9", "data.image_size must be a multiple of 2, as .* f2"),
        ("--autoencoder.groups 3", "must be a multiple of autoencoder.groups = 3"),
        ("--autoencoder.attention 2", r"among the levels \[0, 1\]; got 2"),
        ("--autoencoder.loss l2", "must be left out with vae"),
        ("--autoencoder.kind ae --autoencoder.kl-weight 1", "left out with ae"),
        ("--data.rotate 5", "data.rotate must be 0 with vae"),
        ("--data.latent-draw mode", "must be left out without data.latent"),
        ("--train.measure-every 1000", "which eval_autoencoder measures"),
        ("--autoencoder.discriminator 1", "discriminator must be left out without"),
        ("--autoencoder.perceptual 1", "perceptual must be left out without kind kl"),
        ("--autoencoder.discriminator-start 9", "left out without autoencoder.disc"),
        (f"{KL} --autoencoder.free-bits 1", "left out without kind vae"),
        (f"{RIVAL} --train.batch-size 1", "batch_size must be at least 2 with"),
        (f"{RIVAL} --train.accumulate 2", "must be 1 with autoencoder.discriminator"),
        (f"{RIVAL} --optimizer.preset official", "optimizer.preset must be modern"),
        (f"{RIVAL} --train.parallel shard_map", "parallel must be mesh with"),
    ],
)
def test_what_says_nothing_of_an_autoencoder_is_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        arguments.parse(["digits_vae", *flags.split()], EXPERIMENTS, prog="train")


def test_fields_of_an_autoencoder_are_refused_without_one():
    with pytest.raises(ConfigError, match=r"latent must be left out without .*kind"):
        checks.validate(replace(EXPERIMENTS["digits"].config, "autoencoder", latent=9))


@pytest.mark.parametrize("kind", ["vae", "ae"])
def test_the_loss_is_that_of_each_image_however_the_batch_is_cut(kind):
    config = small(kind, kl_weight=0.5 if kind == "vae" else None)
    loss = jax.jit(learning.make_loss(config))
    params = build.init_params(config, jax.random.key(0))
    image = jnp.asarray(datasets.load("digits").images[:4])
    batch, key = {"image": image, "position": jnp.arange(4)}, jax.random.key(1)
    whole, seen = loss(params, batch, key)
    halves = [
        loss(params, jax.tree.map(lambda x, k=k: x[k : k + 2], batch), key)[0]
        for k in (0, 2)
    ]
    np.testing.assert_allclose(np.mean(halves), whole, rtol=1e-5)
    total = seen["reconstruction"] + 0.5 * seen["kl"]
    np.testing.assert_allclose(total.mean(), whole, rtol=1e-6)
    if kind == "ae":  # without noise: the error of the network
        x = image / 127.5 - 1
        off = x - autoencoders.apply(config, params, x, "__call__")
        np.testing.assert_allclose(whole, jnp.abs(off).mean(), rtol=1e-5)


def test_linear_methods_reach_what_their_closed_form_says():
    """Computed apart, of all digits with uniform noise, on the scale of 0..255."""
    images = datasets.load("digits").images
    for count, bits in ((8, 7.6729), (16, 7.4537), (32, 7.1986)):
        found = linear.principal(images, images, count)
        assert found.bits_per_dim == pytest.approx(bits, abs=6e-5)
    assert found.psnr_of_all == pytest.approx(26.1, abs=0.06)
    assert linear.principal(images, images, 64) is None


def test_fidelity_of_images_that_are_off_by_a_constant():
    images = np.full([3, 9, 8, 1], 100, np.uint8)
    seen = reconstruction.Seen(images, images + 5, *np.zeros([3, 3]))
    found = reconstruction.fidelity(seen)
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 5))
    assert (found["l1"], found["ssim_window"]) == (5, 7)
    same = reconstruction.fidelity(seen._replace(again=images))
    assert same["ssim"] == pytest.approx(1)
    assert found["ssim"] < 1


def test_units_without_variance_are_not_active():
    mean = np.zeros([50, 2, 2, 2])
    mean[:, 0, 0, 1] = np.linspace(-1, 1, 50)
    seen = reconstruction.Seen(*[np.zeros([50, 4, 4, 1], np.uint8)] * 2, mean, *[0] * 2)
    found = reconstruction.latents(seen)
    assert (found["active_units"], found["units"]) == (1, 8)
