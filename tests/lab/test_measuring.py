"""What is measured and shown of training and of chains, part by part."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.data import datasets
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.drawing import figures
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.training import measuring
from diffusion_jax.lab.wiring import build, learning
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
    assert np.isfinite(loss(jax.device_put(params, parallel.replicated(mesh))))
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
