"""A network in float64, and what is drawn with it: the same everywhere."""

import dataclasses
import hashlib
import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_networks
import small_run

from diffusion_jax.codec import certified
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.drawing import exact
from diffusion_jax.lab.drawing.exact import Record, batch, check, walk_of
from diffusion_jax.lab.schema.config import Config, replace
from diffusion_jax.lab.schema.sampling import Sample
from diffusion_jax.lab.trained.exact import denoise64
from diffusion_jax.lab.wiring import build, chains
from diffusion_jax.training import parallel
from experiments import sample


def test_x0_is_the_same_for_every_batch_and_number_of_devices():
    """Guided in an interval and cut at a threshold, of a network with a variance."""
    small = small_networks.small(
        "digits_cosine_hybrid", multipliers=(1,), attention=(), classes=10
    )
    how = Sample(guidance=2.0, guidance_interval=(0.1, 50.0), threshold=0.9)
    config = dataclasses.replace(small, sample=how)
    params = small_networks.network_of(config).params
    drawable = chains.Drawable(jax.tree.map(lambda leaf: leaf / 4, params))
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 1))
    rough = jax.jit(lambda x, t: chains.make_denoiser(config, drawable)(x, t).x0)
    before = np.asarray(rough(jnp.asarray(x, jnp.float32), 200))
    whole = denoise64(config, drawable)(x, 200)
    one = denoise64(config, drawable, mesh=parallel.make_mesh(1))
    assert whole.dtype == np.float64
    assert 1e-8 < np.abs(whole - before).max() < 1e-3
    assert (np.abs(whole) < 0.99).mean() > 0.1
    for i in (0, 5, 15):
        assert np.abs(one(x[i : i + 1], 200, i) - whole[i]).max() < 1e-13
    # Outside nothing has changed.
    assert jnp.asarray(1.5).dtype == jnp.float32
    np.testing.assert_array_equal(rough(jnp.asarray(x, jnp.float32), 200), before)


def textbook(how, bar, past):
    """a, b and c by alpha_bar at t and at s: Ho et al. 2020, Song et al. 2020."""
    kept = bar / past
    small = (1 - past) / (1 - bar) * (1 - kept)
    if how.sampler == "ddpm":
        variance = small if how.variance == "small" else 1 - kept
        a = np.sqrt(past) * (1 - kept) / (1 - bar)
        b = np.sqrt(kept) * (1 - past) / (1 - bar)
        return a, b, np.sqrt(np.where(past < 1, variance, 0))
    b = np.sqrt((1 - past - how.eta**2 * small) / (1 - bar))
    return np.sqrt(past) - np.sqrt(bar) * b, b, how.eta * np.sqrt(small)


@pytest.mark.parametrize(
    ("schedule", "how"),
    [
        ("linear", Sample("ddpm", variance="small")),
        ("cosine", Sample("ddpm", 7, variance="large")),
        ("linear", Sample("ddim", 5, "quadratic", eta=0.0)),
        ("vp", Sample("ddim", 5, eta=0.7)),
    ],
)
def test_the_numbers_of_a_step_are_those_of_the_papers(schedule, how):
    config = replace(Config(sample=how), "diffusion", schedule=schedule, num_steps=30)
    walk = walk_of(config, chains.Drawable({}))
    levels = build.chain_schedule(config)
    with jax.enable_x64(True):
        bar, past = (
            np.exp(2 * np.asarray(levels(times).log_alpha))
            for times in (walk.times, np.append(walk.times[1:], 0))
        )
    assert (walk.start, len(walk.times)) == (2**20, how.steps or 30)
    true = np.stack(textbook(how, bar, past), axis=1)
    np.testing.assert_allclose(walk.steps / 2**32, true, atol=1e-9)


@pytest.mark.parametrize(
    ("said", "how"),
    [
        ("by unipc", {"sampler": "unipc"}),
        ("variance analytic", {"variance": "analytic"}),
        ("classifier's guidance", {"classifier_guidance": 1.0}),
        ("the clip", {"clip": False}),
    ],
)
def test_what_is_not_exact_is_refused(said, how):
    with pytest.raises(ConfigError, match=f"cannot draw exactly .*{said}.*Leave out"):
        check(Config(sample=Sample(**how)))


def test_noise_beyond_64_bits_is_refused():
    def draw(most):
        config = Config(sample=Sample("ddim", 50))
        config = replace(config, "diffusion", schedule="ve", sigma_max=most)
        walk = walk_of(config, chains.Drawable({}))
        return batch(lambda x, t, first: 0 * x, walk, (2, 2, 2, 1), seed=0, first=0)[0]

    assert (draw(80.0) == 128).all()
    for most in (1e4, 1e9):
        with pytest.raises(ConfigError, match="too large for whole numbers of 64 bits"):
            draw(most)


@pytest.mark.usefixtures("small_network")
def test_pixels_are_the_same_for_every_batch_and_machine(tmp_path, monkeypatch, capsys):
    run = small_run.train_small(tmp_path, "run", "--sample.every", "1000000")

    def drawn(name, *flags):
        out = tmp_path / f"{name}.npz"
        how = shlex.split("--exact --format npz --sampler ddim --eta 0.5 --steps 4")
        assert sample.main([str(run.folder), *how, "--out", str(out), *flags]) == 0
        with np.load(out) as file:
            return file["images"], json.loads(out.with_suffix(".json").read_text())

    # As many values in doubt as it takes to see what becomes of them.
    monkeypatch.setattr(certified, "SURE", 2.0**-14)
    images, record = drawn("a", "--count", "24")
    assert images.std() > 10
    assert 2000 < len(record["listed"]) < 4000
    sha256 = hashlib.sha256(images.tobytes()).hexdigest()
    assert record["pixels_sha256"] == sha256
    assert f"sha256 of the pixels: {sha256}; " in capsys.readouterr().out

    def elsewhere(*of, **how):
        see, rng = denoise64(*of, **how), np.random.default_rng(0)
        error = 2.0**-14 * 0.99
        return lambda x, *rest: see(x, *rest) + rng.uniform(-error, error, x.shape)

    monkeypatch.setattr(exact, "denoise64", elsewhere)
    listed = ("--listed", str(tmp_path / "a.json"))
    same, _ = drawn("b", "--count", "7", "--batch-size", "3", *listed)
    np.testing.assert_array_equal(same, images[:7])
    # Without what is listed they are others.
    (tmp_path / "a.json").write_text(json.dumps({**record, "listed": []}))
    with pytest.raises(ConfigError, match=r"the sha256 of .*a\.json.*differs from"):
        drawn("c", "--count", "24", *listed)
    assert not (tmp_path / "c.npz").exists()


# By what is said of it: what is done to the record of a drawing.
DAMAGED = {
    "no record of a drawing": lambda record: record.pop("walk"),
    "another seed": lambda record: record.update(seed=1),
    "another steps": lambda record: record.update(steps=7),
    "0 images": lambda record: record.update(images=0),
    "four whole numbers": lambda record: record.update(listed=["0 0 0"]),
    "invalid literal": lambda record: record.update(listed=["0 0 0 1.5"]),
    "the steps that this": lambda record: record["walk"].reverse(),
    "the steps  that this": lambda record: record.update(listed=["0 0 64 1"]),
    "the steps that  this": lambda record: record.update(start=1),
}


def test_a_record_of_something_else_is_refused(tmp_path):
    config = Config(sample=Sample("ddim", 3))
    walk, path = walk_of(config, chains.Drawable({})), tmp_path / "a.json"
    made = {"command": "python -m experiments.sample", "seed": 0, "steps": 3}
    listed = certified.Listed(np.array([70, 400]), np.array([5, -6]))
    before = Record(walk, listed, 4, "0123")
    exact.write(path, before, made, (8, 8, 1))
    after = exact.read(path, walk, {**made, "command": "x"}, (8, 8, 1))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    written = path.read_text()
    for said, damage in DAMAGED.items():
        record = json.loads(written)
        damage(record)
        path.write_text(json.dumps(record))
        with pytest.raises(ConfigError, match=" +".join(said.split())):
            exact.read(path, walk, made, (8, 8, 1))
