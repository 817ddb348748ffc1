"""Autoencoders that a discriminator and a classifier judge while they train."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import restored, state_digests

from diffusion_jax import autoencoding
from diffusion_jax.data import datasets
from diffusion_jax.lab.measure import judges
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.wiring import autoencoders, build, critics, learning
from diffusion_jax.nets.classifier import Classifier
from experiments import train
from experiments.configs import EXPERIMENTS

JUDGED = {"discriminator": 0.5, "perceptual": 0.3}


def small(**fields):
    config = replace(EXPERIMENTS["digits_autoencoder"].config, "train", batch_size=4)
    few = {"channels": 8, "groups": 4, "multipliers": (1,)}
    return replace(config, "autoencoder", **few, **fields)


def batch_of(count=4):
    image = jnp.asarray(datasets.load("digits").images[:count])
    return {"image": image, "position": jnp.arange(count)}


@pytest.mark.usefixtures("x64")
def test_the_weight_of_the_discriminator_is_that_of_its_formula():
    """The gradients by differences, each number of the last kernel moved a little."""
    config = replace(small(**JUDGED, discriminator_start=7), "net", dtype="float64")
    params = build.init_params(config, jax.random.key(0))
    memory = critics.memory_of(config, jax.random.key(1))
    rng = np.random.default_rng(0)
    params, memory = jax.tree.map(
        lambda a: a + 0.1 * rng.normal(size=a.shape) if a.dtype.kind == "f" else a,
        (jax.tree.map(jnp.float64, params), memory),
    )
    loss = jax.jit(learning.make_loss(config))
    before, quiet = loss(params, batch_of(), jax.random.key(2), memory)
    assert np.all(quiet["adversarial"] == 0)
    total, seen = loss(params, batch_of(), jax.random.key(2), memory._replace(step=7))
    x, again = seen["images"], seen["decoded"]
    np.testing.assert_allclose(x, batch_of()["image"] / 127.5 - 1, atol=1e-6)
    kernel = params["net"]["decoder"]["conv_out"]["kernel"]
    bias = params["net"]["decoder"]["conv_out"]["bias"]
    net = critics.make_discriminator(config)

    def levels(images):
        return Classifier(1).apply({"params": memory.judge}, images, levels=True)

    def parts(image):
        """The error of whole images, and minus the mean score."""
        far = autoencoding.perceptual(levels(x), levels(image))
        error = 64 * (jnp.abs(x - image).mean() + 0.3 * far.mean())
        return error, -net.apply({"params": memory.rival}, image).mean()

    # The last layer is linear: what it makes of one number moved is a convolution.
    def image_of(k):
        decoder = {**params["net"]["decoder"], "conv_out": {"kernel": k, "bias": bias}}
        changed = {"net": {**params["net"], "decoder": decoder}}
        return autoencoders.apply(config, changed, z, "decode", net=config.net)

    moments = autoencoders.apply(config, params, x, "encode", net=config.net)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(2), jnp.arange(4))
    draw = jax.vmap(lambda k: jax.random.split(k, 2)[1])(keys)
    z = jax.vmap(type(moments).sample)(moments, draw)
    np.testing.assert_allclose(image_of(kernel), again, rtol=1e-6, atol=1e-6)
    step = 1e-6
    moved = step * jnp.eye(kernel.size).reshape(-1, *kernel.shape)
    both = jax.jit(jax.vmap(lambda k: parts(image_of(k))))
    up, down = both(kernel[None] + moved), both(kernel[None] - moved)
    nll, against = (
        np.linalg.norm((a - b) / (2 * step)) for a, b in zip(up, down, strict=True)
    )
    weight = 0.5 * nll / (against + 1e-4)
    expected = weight / 64 * parts(again)[1]
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(seen["adversarial"].mean(), expected, rtol=1e-4)
    np.testing.assert_allclose(total - before, expected, rtol=1e-4)


def test_without_judges_the_loss_is_the_error_and_the_divergence():
    config = small(kl_weight=0.1)
    params = build.init_params(config, jax.random.key(0))
    assert learning.state_shapes(config).memory == ()
    total, seen = jax.jit(learning.make_loss(config))(
        params, batch_of(), jax.random.key(1)
    )
    assert set(seen) == {"reconstruction", "kl"}
    each = seen["reconstruction"] + 0.1 * seen["kl"]
    np.testing.assert_allclose(each.mean(), total, rtol=1e-6)
    free = replace(small(), "autoencoder", kind="vae", free_bits=1000.0)
    params = build.init_params(free, jax.random.key(0))
    _, seen = learning.make_loss(free)(params, batch_of(), jax.random.key(1))
    np.testing.assert_allclose(seen["kl"], 2 * 1000 / 64 / np.log(2), rtol=1e-6)


def test_the_discriminator_learns_to_tell_images_apart_once_it_has_begun():
    config = small(discriminator=0.5, discriminator_start=3)
    memory = critics.memory_of(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (4, 8, 8, 1)), jnp.float32)
    seen = {"images": images, "decoded": 0.2 * images}
    step = jax.jit(
        lambda memory: critics.remembered(config, lambda n: 0.01 * n, memory, seen)
    )

    def apart(memory):
        real, fake = (critics.scores(config, memory.rival, a) for a in seen.values())
        return float(real.mean() - fake.mean())

    first = memory
    for count in range(1, 4):
        memory = step(memory)
        assert memory.step == count
    jax.tree.map(np.testing.assert_array_equal, memory.rival, first.rival)
    for _ in range(10):
        memory = step(memory)
    assert apart(memory) > apart(first) + 1
    assert memory.moments.count == 10


FLAGS = """--autoencoder.discriminator 0.5 --autoencoder.discriminator-start 3
--autoencoder.perceptual 0.3 --autoencoder.channels 8 --autoencoder.groups 4
--autoencoder.multipliers 1 --data.hold-out 0 --train.batch-size 8 --train.steps 8
--train.log-every 2 --sample.every 8 --sample.count 4 --optimizer.warmup 2"""


def trained(folder, name, *flags):
    where = ["--output", str(folder), "--name", name]
    assert train.main(["digits_autoencoder", *FLAGS.split(), *where, *flags]) == 0
    return runs.Run(folder / name)


def test_a_judged_run_goes_on_to_the_bit_and_is_the_same_on_two_devices(tmp_path):
    config = replace(EXPERIMENTS["digits_autoencoder"].config, "data", hold_out=0.0)
    config = dataclasses.replace(config, output=str(tmp_path))
    judge = judges.train(config, build.load_data(config), steps=20)
    one = ["--train.devices", "1"]
    whole = trained(tmp_path, "whole", *one)
    stopped = trained(tmp_path, "stopped", *one, "--train.stop-at", "5")
    away = judge.path.rename(tmp_path / "away")  # the run has its own
    stopped = trained(tmp_path, "stopped", *one)
    away.rename(judge.path)
    assert state_digests(stopped) == state_digests(whole)
    assert stopped.metrics.read_text() == whole.metrics.read_text()
    memory = restored(whole).state.memory
    assert (int(memory.step), int(memory.moments.count)) == (8, 5)
    for name, part in memory.judge.items():
        jax.tree.map(np.testing.assert_array_equal, part, judge.params["params"][name])
    both = trained(tmp_path, "both", "--train.devices", "2")
    for a, b in zip(*map(lines_of, (whole, both)), strict=True):
        assert a["adversarial"] == 0 or a["step"] > 3
        for name in (
            "loss",
            "reconstruction",
            "perceptual",
            "adversarial",
            "grad_norm",
        ):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    assert lines_of(whole)[-1]["adversarial"] != 0


def lines_of(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]
