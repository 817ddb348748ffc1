"""Schedules that end before noise, or in nothing else, and data that end too soon."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.training import beginning
from diffusion_jax.lab.wiring import chains, learning
from experiments import train
from experiments.configs import EXPERIMENTS


def ending(schedule, **fields):
    config = EXPERIMENTS["digits"].config
    return replace(config, "diffusion", schedule=schedule, **fields)


def test_a_schedule_that_ends_before_noise_says_what_fits():
    said = beginning.signal_left(ending("linear", num_steps=50))
    assert "linear leaves 0.60 of x_T" in said
    assert "T = 50," in said
    assert said.endswith("--diffusion.beta-end 0.4 fits (0.02 is of T = 1000).")
    assert not beginning.signal_left(ending("linear", num_steps=50, beta_end=0.4))
    assert "cosine" in beginning.signal_left(ending("quad", num_steps=50))
    for name, experiment in EXPERIMENTS.items():
        assert not beginning.signal_left(experiment.config), name


def test_fewer_images_than_a_batch_are_said_before_anything_compiles(
    tmp_path, monkeypatch, capsys
):
    digits = EXPERIMENTS["digits"].config
    assert "note: one image is fewer than a batch" in beginning.few_images(digits, 1)
    assert not beginning.few_images(digits, digits.train.batch_size)
    for number in range(2):
        pixels = np.full((8, 8, 3), number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(learning, "make_step", None)
    flags = ["--output", str(tmp_path / "runs"), "--data.channels", "3"]
    flags += ["--train.batch-size", "5", "--train.devices", "1"]
    with pytest.raises(TypeError):
        train.main(["digits", "--data.source", f"folder:{tmp_path}", *flags])
    said = "note: 2 images are fewer than a batch of 5 (train.batch_size): each step "
    assert said in capsys.readouterr().err


def test_pure_noise_is_not_drawn_from_by_what_says_nothing_of_it():
    config = ending("jsd", prediction="score", loss="eps", num_steps=100)
    config = replace(config, "sample", steps=10)
    with pytest.raises(ConfigError, match=r"jsd ends in pure noise.*logsnr"):
        chains.make_grid(config)
    assert chains.make_grid(replace(config, "sample", grid="logsnr"))[0] < 100
    assert chains.make_grid(replace(config, "diffusion", prediction="v"))[0] == 100
