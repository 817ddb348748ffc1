"""The training command, run as a person runs it."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_run import hurt

from diffusion_jax import errors
from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.wiring import learning
from diffusion_jax.training import parallel
from experiments import eval_fid, sample, train

# As small as a network gets; the cosine decay makes the learning rate depend on the
# step, which a run that is continued must get right.
SMALL = shlex.split(  # flags as a person types them
    """--net.channels 8 --net.multipliers 1 --net.blocks 1 --net.attention
--net.groups 4 --net.dropout 0.1 --train.batch-size 8 --train.steps 12
--optimizer.warmup 2 --diffusion.num-steps 20 --sample.steps 4 --sample.count 4
--train.log-every 5 --sample.every 12 --train.checkpoint-every 100
--train.devices 1"""
)


# Of a process of its own, which is to come to its steps soon and to say so.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": "1"}


def run_train(folder, name, *flags):
    argv = ["digits", *SMALL, "--output", str(folder), "--name", name, *flags]
    return train.main(argv), runs.Run(folder / name)


def final_state(run):
    config = runs.read_config(run)
    like = learning.state_shapes(config)
    sharding = parallel.replicated(parallel.make_mesh())
    with checkpoint.open_folder(run.checkpoints, read_only=True) as manager:
        state, *_ = checkpoint.restore(manager, like, sharding)
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return [np.asarray(leaf).tobytes() for leaf in leaves], int(state.step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    code, run = run_train(folder, "whole")
    assert code == 0
    return run


def test_a_run_leaves_what_a_person_wants(whole):
    lines = [json.loads(line) for line in whole.metrics.open()]
    assert [line["step"] for line in lines] == [5, 10]
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)
    grid = Image.open(whole.samples / "step_00000012.png")
    assert grid.size == (140, 140)
    assert np.asarray(grid).std() > 10
    assert Image.open(whole.folder / "loss.png").size == (840, 480)
    assert json.loads(whole.config.read_text())["train"]["steps"] == 12


@pytest.mark.parametrize("stop", [5, 7])
def test_a_run_in_two_parts_is_bitwise_the_whole_run(folder, whole, stop, capsys):
    name = f"parts{stop}"
    code, run = run_train(folder, name, "--train.stop-at", str(stop))
    assert code == 0
    assert "without --train.stop-at the same command goes on" in capsys.readouterr().out
    assert final_state(run)[1] == stop
    code, run = run_train(folder, name)
    assert code == 0
    assert f"going on from step {stop} of 12" in capsys.readouterr().out
    assert final_state(run) == final_state(whole)
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()
    grid = "step_00000012.png"
    assert (run.samples / grid).read_bytes() == (whole.samples / grid).read_bytes()


def test_lines_after_the_checkpoint_are_written_once(folder, whole):
    # As after a crash between two checkpoints: metrics beyond the last one.
    _, run = run_train(folder, "crashed", "--train.stop-at", "7")
    with run.metrics.open("a") as file:
        file.write('{"step": 10, "loss": 9.0, "grad_norm": 9.0}\n{"step": 1')
    run_train(folder, "crashed")
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()


def test_lines_are_on_the_disk_before_the_checkpoint_that_follows_them(
    folder, whole, monkeypatch
):
    order, save = [], checkpoint.save

    def saved(*given, **options):
        order.append("checkpoint")
        save(*given, **options)

    monkeypatch.setattr(runs, "to_disk", lambda run: order.append(run.folder.name))
    monkeypatch.setattr(checkpoint, "save", saved)
    run_train(folder, "ordered", "--train.stop-at", "7")
    assert order == ["ordered", "checkpoint"]


def test_a_complete_run_is_left_alone(folder, whole, capsys):
    before = whole.metrics.read_bytes(), final_state(whole)
    code, _ = run_train(folder, "whole")
    assert code == 0
    assert "the run is complete at step 12" in capsys.readouterr().out
    assert (whole.metrics.read_bytes(), final_state(whole)) == before


def test_another_configuration_is_refused_and_named(folder, whole):
    before = whole.config.read_bytes()
    with pytest.raises(ConfigError, match=r"train.seed: 0 -> 1.*--name NAME"):
        run_train(folder, "whole", "--train.seed", "1")
    assert whole.config.read_bytes() == before


def test_another_seed_is_another_run(folder, whole):
    _, other = run_train(folder, "seed1", "--train.seed", "1")
    assert other.metrics.read_bytes() != whole.metrics.read_bytes()


DIVERGING = ("--optimizer.learning-rate", "1e30", "--optimizer.warmup", "0")


def test_a_run_without_a_finite_loss_is_given_up(folder):
    said = "got none in the last 20"
    with pytest.raises(errors.DivergedError, match=said) as caught:
        run_train(folder, "diverged", *DIVERGING, "--train.steps", "40")
    assert "lower --optimizer.learning-rate" in str(caught.value)


def test_steps_without_a_finite_loss_are_skipped_and_counted(folder, capsys):
    code, run = run_train(folder, "skips", *DIVERGING)
    assert code == 0
    lines = [json.loads(line) for line in run.metrics.open()]
    assert [line["skipped"] for line in lines] == [4, 5]
    none = {"loss": None, "grad_norm": None}
    assert lines[1] == {"step": 10, **none, "skipped": 5, "causes": {"loss": 5}}
    said = "9 steps were skipped; what was not finite: loss 9"
    assert said in capsys.readouterr().out
    leaves, step = final_state(run)
    assert step == 12
    # What was saved are the weights of the last finite step.
    assert all(np.isfinite(np.frombuffer(leaf, np.float32)).all() for leaf in leaves)


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

        def broken_loss(params, batch, key):
            mine = jax.random.key_data(key)[None]
            bad = (mine == of_gradient).all(-1).any()
            out = params["net"]["conv_out"]
            out = {**out, "kernel": hurt(out["kernel"], bad)}
            params = {**params, "net": {**params["net"], "conv_out": out}}
            bad = (mine == of_loss).all(-1).any()
            return jnp.where(bad, jnp.nan, loss_fn(params, batch, key))

        return broken_loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "make_loss", make_loss)
        yield


def test_what_was_not_finite_is_logged_and_counted_beyond_a_stop(folder, capsys):
    with broken(loss=[2, 3], gradient=list(range(6, 30))):
        code, run = run_train(folder, "broken", "--train.stop-at", "11")
        assert code == 0
        lines = [json.loads(line) for line in run.metrics.open()]
        assert [line["causes"] for line in lines] == [{"loss": 2}, {"gradient": 4}]
        assert [line["skipped"] for line in lines] == [2, 4]
        assert np.isfinite([line["loss"] for line in lines]).all()
        # Three in a row before the stop, and two after it.
        flags = ("--train.max-skipped", "5", "--name", "row", "--output", str(folder))
        argv = ["digits", *SMALL, *flags]
        assert train.command([*argv, "--train.stop-at", "9"]) == 0
        kept = final_state(runs.Run(folder / "row"))
        for _ in range(2):  # the same command ends alike
            capsys.readouterr()
            assert train.command(argv) == 3
            said = capsys.readouterr().err
            assert "error: batch, loss, gradient and update must be finite at" in said
            words = "none in the last 5, up to step 11: not finite were gradient 5, at"
            assert f"{words} step 11 first the gradient of net/conv_out/kernel." in said
            assert final_state(runs.Run(folder / "row")) == kept
    leaves, step = kept
    assert step == 9
    assert all(np.isfinite(np.frombuffer(leaf, np.float32)).all() for leaf in leaves)


def test_a_run_of_an_earlier_version_goes_on(folder, whole, capsys):
    """Its configuration has fields that are gone, of forms of the same network."""
    code, run = run_train(folder, "earlier", "--train.stop-at", "7")
    assert code == 0
    written = json.loads(run.config.read_text())
    written["net"] |= {"fuse": ["norm"], "kernels": "xla", "dropout_bits": "threefry"}
    written["optimizer"]["flat"] = False
    run.config.write_text(json.dumps(written))
    assert run_train(folder, "earlier")[0] == 0
    assert "going on from step 7 of 12" in capsys.readouterr().out
    assert final_state(run) == final_state(whole)


def test_a_signal_before_the_first_step_leaves_nothing_in_the_way(folder):
    command = [sys.executable, "-m", "experiments.train", "digits", *SMALL]
    command += ["--output", str(folder), "--name", "early"]
    env = {**os.environ, **QUICK}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "starting at step 0" in line:
            break
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert time.monotonic() - begun < 30
    assert "first step" not in out
    assert "Traceback" not in err
    assert "leaving at once; the same command goes on from what" in err
    code, _ = run_train(folder, "early", "--train.stop-at", "1")
    assert code == 0


def test_a_signal_ends_in_a_checkpoint_from_which_the_run_goes_on(tmp_path):
    command = [sys.executable, "-m", "experiments.train", "digits", *SMALL]
    command += ["--output", str(tmp_path), "--train.steps", "100000"]
    env = {**os.environ, **QUICK, "XLA_FLAGS": ""}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "digits" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert time.monotonic() - begun < 30
    assert "the same command goes on from here" in output
    assert "Traceback" not in output
    _, step = final_state(runs.Run(tmp_path / "digits"))
    lines = [json.loads(line) for line in metrics.open()]
    assert step >= 5
    assert [line["step"] for line in lines] == list(range(5, step + 1, 5))
    made = re.search(r"first step after .* s \((\d+) programs? compiled", output)
    # Keys, numbers of a few lengths, state and step, and what devices have to be told.
    assert made, output
    assert 1 <= int(made[1]) <= 16
    assert "compiling the training step\n" in output[: made.start()]
    again = [*command, "--train.stop-at", str(step + 1)]
    output = subprocess.check_output(
        again, env=env, stderr=subprocess.STDOUT, text=True
    )
    # All but what makes vectors of a state that was read.
    assert re.search(r"\(1 program compiled, [1-9]\d* from the cache\)", output)
    assert re.search(r"checkpoints held the run up for \d+\.\d s", output)


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


def test_samples_come_as_grid_strip_and_single_files(whole, tmp_path):
    out = tmp_path / "grid.png"
    assert sample.main([str(whole.folder), "--count", "4", "--out", str(out)]) == 0
    assert Image.open(out).size == (140, 140)
    # Four rows; the four steps of the chain and its end.
    strip = Image.open(tmp_path / "grid_denoising.png")
    assert strip.size == (5 * 68 + 4, 4 * 68 + 4)
    singles = tmp_path / "singles"
    argv = [str(whole.folder), "--count", "3", "--format", "png", "--out", str(singles)]
    assert sample.main(argv) == 0
    files = sorted(path.name for path in singles.iterdir())
    assert files == ["000000.png", "000001.png", "000002.png"]
    assert Image.open(singles / files[0]).size == (8, 8)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "RUN must be a folder that training wrote, or .*got 'nowhere'"),
        (["--count", "0"], "count must be at least 1; got 0"),
    ],
)
def test_bad_requests_for_samples_are_named(argv, message):
    with pytest.raises(ConfigError, match=message):
        sample.main(argv)


def test_the_newest_run_with_a_checkpoint_is_found(folder, whole, tmp_path):
    started = folder / "started"
    started.mkdir()
    (started / "config.json").write_bytes(whole.config.read_bytes())
    found = runs.find(None, str(folder))
    assert found.folder != started
    assert runs.has_checkpoint(found)
    # What was started and never saved may be started again otherwise.
    code, _ = run_train(folder, "started", "--train.seed", "3")
    assert code == 0


@pytest.mark.parametrize(
    "flags",
    ["--train.devices 99", "--output /dev/null/x", "--name x --train.devices 3"],
)
def test_mistakes_end_in_one_line(flags, tmp_path):
    command = [sys.executable, "-m", "experiments.train", "digits", "--output"]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [*command, str(tmp_path), *flags.split()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=env,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")


def test_a_step_that_is_not_there_is_named(whole):
    with pytest.raises(checkpoint.CheckpointError, match=r"got steps \[12\]"):
        sample.main([str(whole.folder), "--step", "5"])
