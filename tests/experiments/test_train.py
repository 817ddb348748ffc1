"""The training command, run as a person runs it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from processes import QUICK_XLA, wait_for
from small_run import SMALL, digests, hurt, restored, state_digests, train_small

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.data import datasets
from diffusion_jax.lab.process import stopping
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.training import beginning, loop, measuring
from diffusion_jax.lab.wiring import build, learning
from diffusion_jax.training import parallel
from experiments import eval_fid, sample, train


@pytest.fixture
def whole(trained):
    return trained


@pytest.fixture
def folder(whole):
    return whole.folder.parent


def test_a_run_leaves_what_a_person_wants(whole):
    lines = runs.read_lines(whole.metrics)
    assert [line["step"] for line in lines] == [5, 10]
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)
    # Two steps of warm-up, and ten along a cosine: the rate of the tenth update.
    rate = 2e-3 * (1 + np.cos(np.pi * 7 / 10)) / 2
    np.testing.assert_allclose(lines[1]["learning_rate"], rate, rtol=1e-5)
    quarters = lines[0]["loss_by_time"]
    assert min(quarters) <= lines[0]["loss"] <= max(quarters)
    assert quarters[0] > quarters[3]  # of v, which is noise where there is little of it
    grid = Image.open(whole.samples / "step_00000012.png")
    assert grid.size == (140, 140)
    assert np.asarray(grid).std() > 10
    assert Image.open(whole.folder / "loss.png").size == (840, 480)
    assert json.loads(whole.config.read_text())["train"]["steps"] == 12


def test_a_run_in_parts_is_bitwise_the_whole_run(folder, whole, capsys):
    """Stopped where a line is due and where none is, and gone through a crash."""
    for stop in (5, 7):
        run = train_small(folder, "parts", "--train.stop-at", str(stop))
        said = capsys.readouterr().out
        assert "train.stop_at; without that the same command goes on" in said
        assert checkpoint.steps(run.checkpoints)[-1] == stop
    assert "going on from step 5 of 12" in said
    # As after a crash between two checkpoints: metrics beyond the last one.
    with run.metrics.open("a") as file:
        file.write('{"step": 10, "loss": 9.0, "grad_norm": 9.0}\n{"step": 1')
    # As an earlier version wrote it, with fields that are gone.
    written = json.loads(run.config.read_text())
    written["net"] |= {"fuse": ["norm"], "kernels": "xla", "dropout_bits": "threefry"}
    written["optimizer"]["flat"] = False
    run.config.write_text(json.dumps(written))
    train_small(folder, "parts")
    assert "going on from step 7 of 12" in capsys.readouterr().out
    assert digests(run) == digests(whole)
    grid = "step_00000012.png"
    assert (run.samples / grid).read_bytes() == (whole.samples / grid).read_bytes()


def test_lines_are_on_the_disk_before_the_checkpoint_that_follows_them(
    folder, monkeypatch
):
    """And signals are noted, and end nothing at once, from the first step to there."""
    order, save = [], checkpoint.save
    run = runs.Run(folder / "ordered")

    def saved(*given, **options):
        order.append("checkpoint")
        save(*given, **options)

    def done(self):
        order.append(checkpoint.steps(run.checkpoints))

    monkeypatch.setattr(runs, "to_disk", lambda run: order.append(run.folder.name))
    monkeypatch.setattr(checkpoint, "save", saved)
    monkeypatch.setattr(loop, "describe_first", lambda job: order.append("first step"))
    monkeypatch.setattr(stopping.Requests, "note", lambda self: order.append("noted"))
    monkeypatch.setattr(stopping.Requests, "done", done)
    train_small(folder, "ordered", "--train.stop-at", "7")
    assert order == ["first step", "noted", "ordered", "checkpoint", [7]]


def test_held_out_images_are_measured_and_never_trained_on(folder, monkeypatch):
    seen = []
    real = beginning.feed_of

    def feed_of(config, dataset, mesh):
        seen.append(dataset)
        return real(config, dataset, mesh)

    monkeypatch.setattr(beginning, "feed_of", feed_of)
    run = train_small(
        folder, "held", "--data.hold-out", "0.1", "--train.log-every", "4"
    )
    config = runs.read_config(run)
    held = build.load_data(config, split="test")
    assert len(held.images) == 180
    assert len(seen[0].images) + 180 == 1797
    state, mesh = restored(run).state, parallel.make_mesh(1)
    loss = measuring.held_out_loss(config, mesh, held)
    wanted = float(loss(learning.as_trained(config, state, mesh)))
    assert runs.read_lines(run.metrics)[-1]["held_out_loss"] == pytest.approx(wanted)


def test_a_complete_run_is_left_alone(folder, whole, capsys):
    before = digests(whole)
    # In epochs: 8 of 1,797 images a step.
    flags = [*SMALL, "--output", str(folder), "--name", whole.folder.name]
    at = flags.index("--train.steps")
    flags[at : at + 2] = "--train.epochs", "0.0534"
    assert train.main(["digits", *flags]) == 0
    assert "the run is complete at step 12" in capsys.readouterr().out
    assert digests(whole) == before


DIVERGING = ("--optimizer.learning-rate", "1e30", "--optimizer.warmup", "0")


def finite(state):
    leaves = jax.tree.leaves((state.params, state.averages, state.opt_state))
    return all(np.isfinite(leaf).all() for leaf in leaves)


def test_steps_without_a_finite_loss_are_skipped_and_counted(folder, capsys):
    run = train_small(folder, "skips", *DIVERGING)
    lines = runs.read_lines(run.metrics)
    assert [line["skipped"] for line in lines] == [4, 5]
    none = {"loss": None, "grad_norm": None}
    assert lines[1] == {"step": 10, **none, "skipped": 5, "causes": {"loss": 5}}
    said = "9 steps were skipped; what was not finite: loss 9"
    assert said in capsys.readouterr().out
    state, _, step, _ = restored(run)
    assert step == 12
    # What was saved are the weights of the last finite step.
    assert finite(state)


@contextlib.contextmanager
def broken(*, loss, gradient):
    """In steps of these numbers the loss is NaN, or the gradient of one tensor."""
    real = learning.make_loss

    def make_loss(config):
        loss_fn = real(config)
        run_key = jax.random.split(jax.random.key(config.train.seed))[1]

        def keys(steps):
            fold = jax.vmap(jax.random.fold_in, (None, 0))
            return jax.random.key_data(fold(run_key, jnp.array(steps)))

        of_loss, of_gradient = keys(loss), keys(gradient)

        def broken_loss(params, batch, key, memory):
            mine = jax.random.key_data(key)[None]
            bad = (mine == of_gradient).all(-1).any()
            out = params["net"]["conv_out"]
            out = {**out, "kernel": hurt(out["kernel"], bad)}
            params = {**params, "net": {**params["net"], "conv_out": out}}
            bad = (mine == of_loss).all(-1).any()
            value, seen = loss_fn(params, batch, key, memory)
            return jnp.where(bad, jnp.nan, value), seen

        return broken_loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "make_loss", make_loss)
        yield


def test_what_was_not_finite_is_logged_and_counted_beyond_a_stop(folder, capsys):
    with broken(loss=[2, 3], gradient=list(range(6, 30))):
        run = train_small(folder, "broken", "--train.stop-at", "11")
        lines = runs.read_lines(run.metrics)
        assert [line["causes"] for line in lines] == [{"loss": 2}, {"gradient": 4}]
        assert [line["skipped"] for line in lines] == [2, 4]
        assert np.isfinite([line["loss"] for line in lines]).all()
        # Three in a row before the stop, and two after it.
        flags = ("--train.max-skipped", "5", "--name", "row", "--output", str(folder))
        argv = ["digits", *SMALL, *flags]
        assert train.command([*argv, "--train.stop-at", "9"]) == 0
        run = runs.Run(folder / "row")
        kept = state_digests(run)
        for _ in range(2):  # the same command ends alike
            capsys.readouterr()
            assert train.command(argv) == 3
            said = capsys.readouterr().err
            assert "error: batch, loss, gradient and update must be finite at" in said
            words = "none in the last 5, up to step 11: not finite were gradient 5, at"
            assert f"{words} step 11 first the gradient of net/conv_out/kernel." in said
            assert state_digests(run) == kept
    state, _, step, _ = restored(run)
    assert step == 9
    assert finite(state)


def test_a_signal_ends_it_and_the_run_goes_on(tmp_path):
    """What is compiled is on the disk beside the run, for the process that goes on."""
    command = [sys.executable, "-m", "experiments.train", "digits", *SMALL]
    command += ["--output", str(tmp_path), "--train.steps", "100000"]
    # To load the images of scikit-learn takes a second a process.
    np.savez(tmp_path / "images.npz", images=datasets.load("digits").images[:64])
    command += ["--data.source", f"npz:{tmp_path / 'images.npz'}"]
    # To come to its steps soon, and to say so.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": "1"}
    run = runs.Run(tmp_path / "digits")

    def started(*flags):
        return subprocess.Popen(
            [*command, *flags],
            env={**os.environ, **quick, "XLA_FLAGS": QUICK_XLA},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    process = started()
    wait_for(lambda: runs.read_lines(run.metrics), process)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert time.monotonic() - begun < 30
    assert "Traceback" not in output
    assert "the same command goes on from here" in output
    step = restored(run).step
    assert step >= 5
    assert [line["step"] for line in runs.read_lines(run.metrics)] == list(
        range(5, step + 1, 5)
    )
    made = re.search(r"first step after .* s \((.* compiled.*)\)", output)
    # Keys, numbers of a few lengths, state and step, and what devices have to be told.
    assert made, output
    assert 1 <= sum(map(int, re.findall(r"\d+", made[1]))) <= 16
    assert "compiling the training step: " in output[: made.start()]
    output, _ = started("--train.stop-at", str(step + 1)).communicate(timeout=120)
    # All but what makes vectors of a state that was read.
    assert re.search(r"\(1 program compiled, [1-9]\d* from the cache\)", output)
    assert re.search(r"time spent on checkpoints: \d+\.\d s", output)


def test_sample_i_depends_on_seed_and_i_alone(whole, tmp_path, capsys):
    def draw(name, *flags):
        out = tmp_path / name
        argv = [str(whole.folder), "--format", "npz", "--out", str(out), *flags]
        assert sample.main(argv) == 0
        return np.load(out)["images"].astype(int)

    ten = draw("ten.npz", "--count", "10", "--batch-size", "4")
    assert ten.shape == (10, 8, 8, 1)
    assert np.abs(draw("all.npz", "--count", "10") - ten).max() <= 1
    assert np.abs(draw("few.npz", "--count", "3") - ten[:3]).max() <= 1
    other = draw("seed.npz", "--count", "3", "--seed", "1")
    assert np.abs(other - ten[:3]).max() > 1
    assert np.abs(draw("raw.npz", "--count", "3", "--raw") - ten[:3]).max() > 1
    assert "last weights of step 12" in capsys.readouterr().out


@pytest.mark.parametrize("command", [sample, eval_fid])
def test_cores_become_devices_before_jax_has_looked_for_any(
    command, whole, monkeypatch
):
    calls = []

    def note(name, ends=False):
        def call(*_):
            calls.append(name)
            if ends:
                raise InterruptedError

        return call

    monkeypatch.setattr(parallel, "split_cpu", note("split"))
    monkeypatch.setattr(jax, "process_count", note("looked", ends=True))
    with pytest.raises(InterruptedError):
        command.main([str(whole.folder), "--count", "4"])
    assert calls == ["split", "looked"]


def test_samples_come_as_grid_and_strip(whole, tmp_path):
    out = tmp_path / "grid.png"
    assert sample.main([str(whole.folder), "--count", "4", "--out", str(out)]) == 0
    assert Image.open(out).size == (140, 140)
    # Four rows; the four steps of the chain and its end.
    strip = Image.open(tmp_path / "grid_denoising.png")
    assert strip.size == (5 * 68 + 4, 18 + 4 * 68 + 4)


def test_the_newest_run_with_a_checkpoint_is_found(folder, whole):
    started = folder / "started"
    started.mkdir()
    (started / "config.json").write_bytes(whole.config.read_bytes())
    found = runs.find(None, str(folder))
    assert found.folder != started
    assert runs.has_checkpoint(found)
    # What was started and never saved may be started again otherwise.
    other = train_small(folder, "started", "--train.seed", "3")
    # Another seed is another run.
    assert other.metrics.read_bytes() != whole.metrics.read_bytes()
