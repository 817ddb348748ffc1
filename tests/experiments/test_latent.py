"""Diffusion in latents: all that one sees is images, and the autoencoder stays."""

import dataclasses
import functools
import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from diffusion_jax import lab
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.measure import bound
from diffusion_jax.lab.network_files import diffusers_folder, networks
from diffusion_jax.lab.network_files.records import About, Network
from diffusion_jax.lab.playground import subject
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import checks
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.trained import opening, space
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.lab.training import encoding
from diffusion_jax.lab.wiring import autoencoders, build, chains, latent_space
from diffusion_jax.training import parallel
from experiments import (
    codec,
    convert,
    distil,
    edit,
    eval_autoencoder,
    eval_nll,
    sample,
    train,
)
from experiments.configs import EXPERIMENTS

TINY = shlex.split(
    """--train.batch-size 8 --optimizer.warmup 2 --train.log-every 5
--sample.every 12 --sample.count 4 --train.devices 1"""
)
AUTOENCODER = "--autoencoder.channels 8 --autoencoder.groups 4 --train.steps 4"
NETWORK = """--net.channels 8 --net.multipliers 1 --net.blocks 1 --net.groups 4
--net.attention --diffusion.num-steps 20 --sample.steps 4 --train.steps 12"""


def trained(folder, experiment, name, *flags):
    where = ["--output", str(folder), "--name", name]
    assert train.main([experiment, *TINY, *where, *flags]) == 0
    return runs.Run(folder / name)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """A latent run that went on when its autoencoder was gone."""
    folder, name = tmp_path_factory.mktemp("runs"), "digits_autoencoder"
    own = runs.read_config(trained(folder, name, name, *AUTOENCODER.split()))
    flags = NETWORK.split()
    made = trained(folder, "digits_latent", "latent", *flags, "--train.stop-at", "5")
    shapes, about = build.param_shapes(own), About("last", 1, "", {}, recipe=True)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    other = folder / "other.safetensors"
    networks.write_file(other, Network(own, params, about, "0" * 64))
    config = replace(runs.read_config(made), "data", latent=str(other))
    with pytest.raises(ConfigError, match=r"must be the one that .* began with"):
        encoding.begin(config, made, datasets.load("digits").images)
    (folder / "digits_autoencoder").rename(folder / "moved")
    return trained(folder, "digits_latent", "latent", *flags)


def test_samples_are_the_decoded_latents_of_the_chain(latent):
    opened = lab.load(latent.folder)
    drawn = opened.sample(jax.random.key(3), 4)
    assert (drawn.shape, drawn.dtype) == ((4, 8, 8, 1), np.uint8)
    drawable = opening.complete(opened.config, latent, opened.params)
    draw = chains.make_draw(opened.config, 4, parallel.make_mesh())
    z = draw(drawable._replace(space=None), jax.random.key(3))
    assert z.shape == (4, 4, 4, 2)
    again = latent_space.decode(opened.config, drawable.space, jnp.asarray(z))
    off = pictures.to_uint8(np.asarray(again)).astype(int) - drawn
    assert np.abs(off).max() <= 1
    assert (latent.samples / "step_00000012.png").exists()


def test_a_network_of_latents_goes_to_others_and_comes_back(latent, tmp_path, capsys):
    def draw(where):
        opened = lab.load(where)
        return opened.sample(jax.random.key(3), 4, sampler="ddim", steps=4)

    drawn = draw(latent.folder)
    file, folder = tmp_path / "a.safetensors", tmp_path / "a"
    for source, out in ((latent.folder, file), (file, folder)):
        assert convert.main([str(source), str(out)]) == 0
    said = capsys.readouterr().out
    assert f"open it: LDMPipeline.from_pretrained('{folder}')" in said
    assert "4x4, 2 channels, of the autoencoder" in (folder / "README.md").read_text()
    np.testing.assert_array_equal(draw(file), drawn)
    record = (folder / diffusers_folder.RECORD).read_text()
    assert str(latent.folder.parent) not in record
    # The scale of its latents is in the weights there: the same but for rounding.
    for ours in (True, False):
        assert np.abs(draw(folder).astype(int) - drawn).max() <= 1
        found = networks.read(networks.find(folder))
        bound.check(
            found.config,
            chains.Drawable((), space=networks.read(networks.find(file)).space),
        )
        with pytest.raises(ConfigError, match="does not say how far decoded images"):
            bound.check(found.config, chains.Drawable((), space=found.space))
        if ours:
            (folder / diffusers_folder.RECORD).unlink()
    config = json.loads((folder / "vqvae/config.json").read_text())
    (folder / "vqvae/config.json").write_text(
        json.dumps(config | {"latent_channels": 3})
    )
    with pytest.raises(ConfigError, match=r"as many in_channels as its .* 3; got 2"):
        networks.read(networks.find(folder))


def test_a_notebook_encodes_and_decodes(latent, monkeypatch):
    images = datasets.load("digits").images[:5]
    (latent.folder.parent / "runs").mkdir()
    for name, run in (("digits_autoencoder", "moved"), ("digits_latent", "latent")):
        link = latent.folder.parent / "runs" / name
        link.symlink_to(latent.folder.parent / run)
    monkeypatch.chdir(latent.folder.parent)
    page = (processes.ROOT / "docs" / "latent.md").read_text()
    [lines] = [b for b in page.split("```")[1::2] if "lab.load" in b]
    scope = {"images": images, "jax": jax}
    exec(lines.removeprefix("python"), scope)
    net, model, x = scope["net"], scope["model"], images / np.float32(127.5) - 1
    apply = functools.partial(autoencoders.apply, net.config, net.params)
    mean = apply(x, "encode").mean
    np.testing.assert_allclose(scope["z"], mean, atol=1e-5)
    wanted = pictures.to_uint8(np.asarray(apply(mean, "decode"))).astype(int)
    assert np.abs(scope["again"] - wanted).max() <= 1
    assert repr(net).startswith("<moved: 8x8x1 to 4x4x2, ")
    own = space.load(model.config, latent)
    expected = latent_space.encode(model.config, own, x).mean
    np.testing.assert_allclose(scope["scaled"], expected, atol=1e-4)
    decoded = latent_space.decode(model.config, own, expected)
    off = pictures.to_uint8(np.asarray(decoded)).astype(int)
    off = off - model.autoencoder.decode(scope["scaled"])
    assert np.abs(off).max() <= 1
    for wrong in (lambda: net.decode(images), lambda: net.encode(images[:, :4])):
        with pytest.raises(ConfigError, match=r"must be of shape \[N, "):
            wrong()
    with pytest.raises(ConfigError, match="only an autoencoder of kind vae"):
        net.bits_per_dim(images)


def test_latents_have_mean_0_and_variance_1_and_are_encoded_once(latent, monkeypatch):
    config = runs.read_config(latent)
    own = space.load(config, latent)
    whole = datasets.load("digits")
    whole = datasets.held_out(whole, config.data.hold_out)[0]
    monkeypatch.setattr(encoding, "_encode", None)  # what training has cached is enough
    stored = encoding.latent_set(config, own, whole).images
    assert stored.shape == (1617, 1, 4, 4, 4)
    mean, log_variance = np.split(stored.astype(float), 2, axis=-1)
    axes = (0, 1, 2, 3)
    np.testing.assert_allclose(mean.mean(axis=axes), 0, atol=1e-4)
    total = mean.var(axis=axes) + np.exp(log_variance).mean(axis=axes)
    np.testing.assert_allclose(total, 1, rtol=1e-4)


def test_half_of_the_latents_drawn_are_those_of_mirror_images():
    config = replace(EXPERIMENTS["digits_latent"].config, "data", flip=True)
    mode = replace(config, "data", latent_draw="mode")
    stored = jnp.concatenate(
        [jnp.zeros([400, 1, 2, 2, 2]), jnp.ones([400, 1, 2, 2, 2])], 1
    )
    keys = jax.random.split(jax.random.key(0), 400)
    z = np.asarray(latent_space.draw(mode, stored, keys))[:, 0, 0, 0]
    assert set(z) == {0, 1}
    assert 0.4 < z.mean() < 0.6
    drawn = np.asarray(latent_space.draw(config, jnp.zeros([400, 2, 2, 2, 2]), keys))
    assert drawn.std() == pytest.approx(1, abs=0.1)
    assert len(np.unique(drawn)) > 0.99 * drawn.size


def test_the_bound_of_images_is_that_of_latents_and_of_the_decoder(latent, capsys):
    flags = [str(latent.folder), "--max-images", "8", "--split", "test"]
    assert eval_nll.main(flags) == 0
    assert "-log p(x|z)" in capsys.readouterr().out
    result = json.loads((latent.folder / "eval/nll_test.json").read_text())
    both = result["reconstruction"] + result["latents"]
    assert result["bits_per_dim"] == pytest.approx(both)
    assert np.isfinite(both)
    config = runs.read_config(latent)
    with pytest.raises(ConfigError, match="the flow of latents"):
        eval_nll.main([*flags, "--ode"])
    without = replace(config, "autoencoder", kind="ae")
    with pytest.raises(ConfigError, match="an autoencoder without noise has none"):
        bound.check(without, chains.Drawable(()))


def test_known_pixels_stay_as_they_are_where_latents_are_painted(latent, tmp_path):
    image = datasets.load("digits").images[:1]
    white = np.zeros([1, 8, 8, 1], np.uint8)
    white[:, :3, :3] = 255
    files = []
    for name, array in (("image", image), ("mask", white)):
        files.append(str(tmp_path / f"{name}.png"))
        pictures.save(pictures.grid(array, side=8, gap=0), tmp_path / f"{name}.png")
    flags = ["--count", "2", "--steps", "3", "--out", str(tmp_path / "out.png")]
    assert edit.main([str(latent.folder), "inpaint", *files, *flags]) == 0
    drawn = datasets.load(f"folder:{tmp_path / 'out'}", image_size=8, channels=1).images
    assert drawn.shape == (2, 8, 8, 1)
    assert (drawn[0] == image[0])[white[0] == 0].all()
    assert edit.main([str(latent.folder), "vary", files[0], *flags]) == 0


def test_what_cannot_work_on_latents_is_refused_with_the_reason(latent, tmp_path):
    where = str(latent.folder)
    with pytest.raises(ConfigError, match="cannot draw exactly from latents"):
        sample.main([where, "--exact"])
    with pytest.raises(ConfigError, match="nothing is lossless"):
        codec.main(["fit", where])
    with pytest.raises(ConfigError, match="diffusion model of pixels"):
        subject.opened(where, None, Weights())
    config = runs.read_config(latent)
    for section, name, value, said in (
        ("sample", "clip", True, "sample.clip must be off with data.latent"),
        ("sample", "threshold", 0.9, "no range holds latents"),
        ("diffusion", "loss", "vlb", "other than vlb and hybrid with data.latent"),
        ("data", "image_size", 9, "a multiple of 2, as the autoencoder is f2"),
        ("data", "rotate", 9.0, "the images are encoded once"),
    ):
        with pytest.raises(ConfigError, match=said):
            checks.validate(replace(config, section, **{name: value}))
    (latent.folder / "autoencoder.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ConfigError, match="must have its autoencoder in"):
        opening.load(config, latent, Weights())
    (tmp_path / "kept").rename(latent.folder / "autoencoder.safetensors")


def test_an_autoencoder_is_named_that_is_one(latent):
    config = runs.read_config(latent)
    fresh = dataclasses.replace(config, name="fresh")
    nowhere = replace(fresh, "data", latent=str(latent.folder / "nowhere"))
    with pytest.raises(ConfigError, match=r"data\.latent must be a folder"):
        encoding.resolved(nowhere)
    with pytest.raises(ConfigError, match="must be of an autoencoder; got"):
        eval_autoencoder.main([str(latent.folder)])
    other = str(latent.folder.parent / "moved")
    found = encoding.resolved(replace(fresh, "data", latent=other))
    assert found.data.latent == other
    with pytest.raises(ConfigError, match=r"must be left out with data\.latent"):
        encoding.resolved(replace(found, "autoencoder", channels=64))
    with pytest.raises(ConfigError, match="of images with 3 channels; got 1"):
        encoding.resolved(
            replace(replace(fresh, "data", channels=3), "data", latent=other)
        )


def test_a_student_of_latents_has_its_teachers_autoencoder_and_draws_images(latent):
    where = [
        "--output",
        str(latent.folder.parent),
        "--name",
        "few",
        "--train.steps",
        "4",
    ]
    where += ["--train.log-every", "2"]
    assert distil.main([str(latent.folder), *TINY, *where]) == 0
    few = lab.load(latent.folder.parent / "few")
    assert few.config.data.latent == str(latent.folder)
    one, two = (
        space.load(found.config, found.run) for found in (few, lab.load(latent.folder))
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)
    drawn = few.sample(jax.random.key(3), 2, steps=1)
    assert (drawn.shape, drawn.dtype) == ((2, 8, 8, 1), np.uint8)
    assert "self_consistency" in runs.read_lines(few.run.metrics)[-1]
