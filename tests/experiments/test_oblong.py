"""Images that are not square, drawn, edited and measured by a network of their own."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from small_run import SMALL

from diffusion_jax import lab
from diffusion_jax.lab.training import arguments
from experiments import edit, eval_nll, sample
from experiments.configs import EXPERIMENTS

H, W = 8, 16


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(network after two steps, its images); the folder has them as an npz too."""
    folder = tmp_path_factory.mktemp("wide")
    images = np.random.default_rng(0).integers(0, 256, (24, H, W, 1), np.uint8)
    np.savez(folder / "images.npz", images=images)
    flags = "--name wide --train.steps 2 --optimizer.warmup 1 --sample.count 2"
    config = arguments.parse(["digits", *SMALL, *flags.split()], EXPERIMENTS, prog="")
    config = dataclasses.replace(config, output=str(folder))
    return lab.train(config, images=images), images


def test_samples_have_the_height_and_width_of_the_data(wide, tmp_path):
    found, _ = wide
    assert found.config.data.image_size == (H, W)
    with Image.open(found.run.folder / "samples" / "step_00000002.png") as grid:
        # One above the other, each four times its size, with gaps of 4.
        assert grid.size == (4 * W + 8, 2 * (4 * H + 4) + 4)
    args = [str(found.run.folder), "--count", "3", "--format", "png", "--out"]
    assert sample.main([*args, str(tmp_path / "out")]) == 0
    drawn = [np.asarray(Image.open(path)) for path in sorted(tmp_path.rglob("*.png"))]
    expected = found.sample(jax.random.key(0), 3)
    np.testing.assert_array_equal(np.stack(drawn)[..., None], expected)


def test_what_inpainting_keeps_stays_to_the_bit(wide, tmp_path):
    found, images = wide
    white = np.zeros((H, W), bool)
    white[1:3, 9:] = True
    Image.fromarray(images[0, ..., 0]).save(tmp_path / "a.png")
    Image.fromarray(np.where(white, 255, 0).astype(np.uint8)).save(tmp_path / "m.png")
    files = [str(tmp_path / name) for name in ("a.png", "m.png")]
    assert edit.main([str(found.run.folder), "inpaint", *files, "--count", "2"]) == 0
    drawn = sorted((found.run.folder / "edit").glob("inpaint_*/*.png"))
    results = np.stack([np.asarray(Image.open(path)) for path in drawn])
    kept = np.broadcast_to(images[0, ..., 0], results.shape)
    np.testing.assert_array_equal(results[:, ~white], kept[:, ~white])
    assert (results != kept)[:, white].mean() > 0.5


def test_the_bound_is_of_images_of_that_size(wide):
    found, images = wide
    bits = found.bits_per_dim(images[:2])
    assert bits.shape == (2,)
    assert np.all(np.isfinite(bits))
    data = f"npz:{found.run.folder.parent / 'images.npz'}"
    argv = [str(found.run.folder), "--data", data, "--max-images", "2"]
    assert eval_nll.main(argv) == 0
    written = json.loads((found.run.folder / "eval/nll_train.json").read_text())
    assert np.isfinite(written["bits_per_dim"])
