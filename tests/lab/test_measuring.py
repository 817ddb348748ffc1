"""What is measured and shown of training and of chains, part by part."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import datasets, image_files
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.drawing import figures
from diffusion_jax.lab.schema import config as schema
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.training import measuring
from diffusion_jax.lab.wiring import build, learning, moving
from diffusion_jax.training import flat, parallel
from experiments.configs import EXPERIMENTS

CONFIG = replace(EXPERIMENTS["digits"].config, "diffusion", num_steps=8)


@pytest.mark.parametrize(
    ("schedule", "t"), [("cosine", np.arange(1, 9)), ("vp", np.linspace(0.01, 1, 8))]
)
def test_each_quarter_has_a_quarter_of_the_times(schedule, t):
    config = replace(CONFIG, "diffusion", schedule=schedule)
    seen = {"t": jnp.asarray(t), "loss": jnp.arange(1.0, 9.0)}
    sums, counts = learning._by_quarter(config, seen)["quarters"]
    np.testing.assert_array_equal(counts, [2, 2, 2, 2])
    np.testing.assert_array_equal(sums, [3, 7, 11, 15])


def test_held_out_images_are_measured_without_dropout(monkeypatch):
    drops = []

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, t, label=None, train=False):
            drops.append(train)
            return x * self.param("scale", nn.initializers.ones, ())

    monkeypatch.setattr(build, "make_network", lambda config, **_: Network())
    params = flat.pack({"net": {"scale": jnp.ones(())}})
    mesh, held = parallel.make_mesh(1), datasets.load("digits")
    loss = measuring.held_out_loss(CONFIG, mesh, held)
    on_devices = jax.device_put(params, parallel.replicated(mesh))
    assert np.isfinite(loss(SimpleNamespace(params=on_devices, memory=())))
    assert drops
    assert not any(drops)


def test_above_each_column_of_a_strip_is_its_time(monkeypatch):
    words = []
    monkeypatch.setattr(
        pictures, "labelled", lambda grid, above: words.extend(above) or grid
    )
    frames = np.zeros([2, 3, 4, 6, 1], np.float32)
    grid = figures.strip(frames[0], np.array([1000, 20]), frames)
    assert words == ["t = 1,000", "t = 20", "t = 0"]
    assert grid.width > grid.height  # three columns of wide images, and three rows


@pytest.mark.parametrize("lazy", [False, True])
def test_images_are_loaded_larger_to_be_cut_at_random_and_measured_in_the_middle(
    tmp_path, monkeypatch, lazy
):
    # A row or column more is a value more: each window is known by its corner.
    image = np.add.outer(10 * np.arange(11), np.arange(13)).astype(np.uint8)
    for name in range(4):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    if lazy:
        read = image_files.read
        monkeypatch.setattr(
            image_files, "read", lambda *a, **k: read(*a, **{**k, "memory_limit": 0})
        )
    source = {"source": f"folder:{tmp_path}", "image_size": (8, 10)}
    config = replace(CONFIG, "data", **source, random_crop=3, hold_out=0.25)
    train, held = build.load_parts(config)
    assert train.images.shape == (3, 11, 13, 1)
    assert isinstance(train.images, image_files.LazyImages) == lazy
    seen = build.load_data(config, split="test").images[np.array([0])]
    np.testing.assert_array_equal(seen[0, ..., 0], image[1:9, 1:11])
    keys = jax.random.split(jax.random.key(0), 200)
    batch = jnp.asarray(np.repeat(held.images[np.array([0])], 200, 0))
    cut = np.asarray(moving.moved(config.data, batch, keys))
    assert {int(corner) for corner in cut[:, 0, 0, 0]} == {*image[:4, :4].ravel()}
    assert not np.ptp(cut - cut[:, :1, :1], axis=0).any()


def test_images_are_turned_about_their_middle():
    data = schema.Data(image_size=(9, 15), rotate=30.0)
    rows, columns = np.indices((9, 15)) - np.array([4, 7])[:, None, None]
    slope = np.stack([columns, rows], -1).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 100)
    turned = np.asarray(
        moving.moved(data, jnp.asarray(np.repeat(slope[None], 100, 0)), keys)
    )
    # One to the right of the middle is seen what was there before: its angle.
    x, y = turned[:, 4, 8, 0], turned[:, 4, 8, 1]
    np.testing.assert_allclose(x**2 + y**2, 1, rtol=1e-5)
    angle = np.degrees(np.arctan2(y, x))
    assert -30 < angle.min() < -25
    assert 25 < angle.max() < 30
    np.testing.assert_allclose(turned[:, 4, 7], 0, atol=1e-5)
