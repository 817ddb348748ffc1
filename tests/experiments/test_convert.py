"""Converting, drawing with what was converted, and training from it."""

import dataclasses
import hashlib
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_networks import network_of, same, small

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.errors import ConfigError, MissingError
from diffusion_jax.lab.network_files import diffusers_folder, hub, networks
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import replace, to_dict
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.training import arguments, beginning, initial
from diffusion_jax.lab.wiring import build, learning
from diffusion_jax.training import parallel
from experiments import convert, sample
from experiments.configs import EXPERIMENTS

QUICK = ["--count", "2", "--steps", "2", "--batch-size", "2"]


def config_of():
    return replace(small(), "sample", steps=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 steps, whose weights are not trained but drawn."""
    folder = tmp_path_factory.mktemp("runs")
    config = dataclasses.replace(config_of(), output=str(folder))
    last, average = (network_of(config, seed=seed).params for seed in (1, 2))
    state = learning.init_state(config, last)
    state = state._replace(step=jnp.asarray(12), averages=(average,))
    made = runs.of(config)
    runs.write_json(made.config, to_dict(config))
    with checkpoint.open_folder(made.checkpoints) as manager:
        checkpoint.save(manager, 12, state, {})
        checkpoint.wait(manager)
    return made


@pytest.fixture
def file(tmp_path):
    networks.write_file(tmp_path / "given.safetensors", network_of(config_of()))
    return tmp_path / "given.safetensors"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def drawn(source, out):
    assert sample.main([str(source), *QUICK, "--no-strip", "--out", str(out)]) == 0
    return np.asarray(Image.open(out))


def test_a_run_goes_round_all_formats_and_draws_the_same(run, tmp_path, capsys):
    """Run, file, folder, file: to the bit, with the digests that were printed."""
    steps = [
        run.folder,
        tmp_path / "a.safetensors",
        tmp_path / "folder",
        tmp_path / "b.safetensors",
    ]
    for source, out in itertools.pairwise(steps):
        capsys.readouterr()
        assert convert.main([str(source), str(out)]) == 0
        shown = capsys.readouterr().out
        tensors = out / "unet" / "diffusion_pytorch_model.safetensors"
        assert sha256(out if out.is_file() else tensors) in shown
        if source.is_file():
            assert sha256(source) in shown
        assert "averaged weights of step 12" in shown
    assert sha256(steps[1]) == sha256(steps[3])
    pictures = [drawn(at, tmp_path / f"{i}.png") for i, at in enumerate(steps)]
    assert pictures[0].std() > 0
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture, pictures[0])


def test_a_model_of_latents_is_not_torn_from_its_autoencoder(tmp_path):
    config = replace(config_of(), "data", latent="x", image_size=64)
    config = replace(config, "sample", clip=False)
    config = replace(config, "net", attention=())
    runs.write_json(tmp_path / "latent" / "config.json", to_dict(config))
    with pytest.raises(ConfigError, match="must have its autoencoder in"):
        convert.main([str(tmp_path / "latent"), str(tmp_path / "out.safetensors")])


def test_what_is_drawn_goes_beside_the_file_and_meets_nothing(file, tmp_path, capsys):
    assert sample.main([str(file), *QUICK, "--no-strip"]) == 0
    folder = file.with_name("given.safetensors.drawn")
    (drawn,) = (folder / "draw").iterdir()
    assert drawn.name.startswith("seed0_2_")
    assert f"{folder}: averaged weights of step 12" in capsys.readouterr().out
    for name in ("a.b.safetensors", "plain"):
        path = file.rename(file.with_name(name))
        assert runs.find(str(path)).folder == tmp_path / f"{name}.drawn"
        file = path
    assert convert.main([str(file), str(tmp_path / "out")]) == 0
    for spelled in ("out", "out/", "out/unet"):
        found = runs.find(f"{tmp_path}/{spelled}")
        assert found.folder == tmp_path / "out.drawn"


def test_a_path_comes_before_the_name_of_a_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "net").mkdir(parents=True)
    (tmp_path / "runs" / "net" / "config.json").write_text('{"diffusion": 1}')
    assert runs.find("net").network is None
    assert convert.main([str(file), "net"]) == 0
    assert runs.find("net").network is not None


def test_a_name_of_the_hub_is_told_how_to_come_here(refuses):
    with refuses("google/ddpm-cifar10-32 OUT.safetensors --download"):
        runs.find("google/ddpm-cifar10-32")


def test_the_last_weights_are_converted_when_asked_for(run, tmp_path):
    out = tmp_path / "raw.safetensors"
    assert convert.main([str(run.folder), str(out), "--raw"]) == 0
    found = networks.read(networks.find(out))
    raw = weights.load(runs.read_config(run), run, Weights(raw=True))[0]
    same(found.params, raw)
    assert found.about.weights == "last"


def test_scores_go_with_the_weights_that_they_are_of(run, tmp_path):
    digest = convert.of_run(run, Weights()).sha256
    numbers = {"fd vs train": {"mean": 1.25}, "class_shares": [0.5]}
    fid = {"numbers": numbers, "count": 1000, "weights_sha256": digest}
    fid |= {"sampler": "ddim", "steps": 50, "grid": "uniform", "eta": 0.0}
    fid |= {"data": "digits"}
    bound = {"bits_per_dim": 4.5, "standard_error": 0.03, "images": 256}
    bound |= {"split": "train", "variance": "small", "weights_sha256": digest}
    bound |= {"data": "digits"}
    flow = {k: v for k, v in bound.items() if k != "variance"}
    files = {
        "fid": fid,
        "fid_raw": fid | {"weights_sha256": "0", "numbers": {"no": {"mean": 2.0}}},
        "nll_train": bound | {"data": "folder:/home/me/noise", "variance": "large"},
        "nll_test": bound | {"weights_sha256": "0"},
        "nll_ode_train": flow | {"standard_error": None},
    }
    for name, values in files.items():
        runs.write_json(run.folder / "eval" / f"{name}.json", values)
    (run.folder / "eval" / "damaged.json").write_text("{")
    assert convert.main([str(run.folder), str(tmp_path / "a")]) == 0
    expected = {
        "fd vs train": {
            "value": "1.25",
            "of": "1,000 samples, 50 steps of ddim (eta 0.0, uniform grid)",
        },
        "bits/dim by the flow": {"value": "4.5", "of": "256 train images"},
        "bits/dim, bound": {
            "value": "4.5 +- 0.03",
            "of": "256 train images, folder:noise, variance large",
        },
    }
    found = networks.read(networks.find(tmp_path / "a")).about.scores
    assert found == expected
    assert "| fd vs train | 1.25 |" in (tmp_path / "a" / "README.md").read_text()
    # What was measured of a folder or a file goes with it too.
    again = fid | {"numbers": {"KID": {"mean": 3.0}}, "data": "digits"}
    runs.write_json(tmp_path / "a.drawn" / "eval" / "fid.json", again)
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b.safetensors")]) == 0
    found = networks.read(networks.find(tmp_path / "b.safetensors")).about.scores
    assert set(found) == {*expected, "KID"}


def test_a_network_of_the_hub_is_converted(file, tmp_path, monkeypatch):
    diffusers_folder.write(tmp_path / "cache", networks.read(networks.find(file)))
    asked = []
    monkeypatch.setattr(
        hub, "fetch", lambda name: asked.append(name) or tmp_path / "cache"
    )
    out = tmp_path / "out.safetensors"
    assert convert.main(["google/ddpm", str(out), "--download"]) == 0
    assert asked == ["google/ddpm"]
    assert networks.read(networks.find(out)).about.origin == "google/ddpm, from the hub"


def test_the_data_can_be_named(file, tmp_path):
    out = tmp_path / "out.safetensors"
    assert convert.main([str(file), str(out), "--data", "folder:mine"]) == 0
    assert networks.read_config(networks.find(out)).data.source == "folder:mine"


@pytest.mark.parametrize("command", [convert.main, lambda args: sample.main(args[:1])])
def test_a_checkpoint_needs_tensorflow(command, tmp_path, refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for name in ("model.ckpt-7.index", "model.ckpt-7.data-00000-of-00001"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(MissingError, match=r"cannot read .*ckpt-7: tensorflow is "):
        command([str(tmp_path / "model.ckpt-7"), str(tmp_path / "out.safetensors")])
    with refuses("--step 3"):
        source, out = tmp_path / "model.ckpt-7", tmp_path / "out.safetensors"
        convert.main([str(source), str(out), "--step", "3"])


def test_a_checkpoint_has_two_sets_of_weights(tmp_path, monkeypatch):
    asked = []

    def read(found, *, average):
        asked.append(average)
        return network_of(config_of())

    monkeypatch.setattr(networks, "read", read)
    found = networks.Found(tmp_path / "model.ckpt-7", "official")
    for raw in (False, True):
        weights.load(config_of(), runs.Run(tmp_path, found), Weights(raw=raw))
    assert asked == [True, False]


def test_what_is_there_is_replaced_only_when_asked_for(file, tmp_path, refuses):
    for name in ("there.safetensors", "there"):
        out = tmp_path / name
        assert convert.main([str(file), str(out)]) == 0
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=r"is there\. Name another place, or give"):
            convert.main([str(file), str(out)])
        assert convert.main([str(file), str(out), "--overwrite"]) == 0
        assert sorted(tmp_path.rglob("*")) == before
    # A folder of something else is never replaced.
    for path in (tmp_path / "mine/thesis.txt", tmp_path / "there/.git/HEAD"):
        path.parent.mkdir()
        path.write_text("years")
    # Nor a file by a folder, a folder by a file, or what a link leads to.
    source = file.rename(tmp_path / "plain")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "x.safetensors").mkdir()
    for name, said in {
        "mine": "thesis.txt too",
        "there": ".git/HEAD too",
        "plain": "a file or a link",
        "link": "a file or a link",
        "x.safetensors": "a folder",
    }.items():
        with refuses(said):
            convert.main([str(source), str(tmp_path / name), "--overwrite"])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_one_set_of_weights_in_its_formats_leaves_no_choice(file, tmp_path, refuses):
    out = str(tmp_path / "out.safetensors")
    for flag in ("--raw", "--step 0", "--average 0.99"):
        with refuses(flag):
            convert.main([str(file), out, *flag.split()])
        with refuses(flag):
            sample.main([str(file), *flag.split()])
    with refuses("--experiment cifar10"):
        convert.main([str(file), out, "--experiment", "cifar10"])
    with refuses("'cifr10'"):
        convert.main([str(file), out, "--data", "cifr10"])
    assert not (tmp_path / "out.safetensors").exists()
    for name in ("a.bin", "a.pt", "a.npz"):  # formats that are not written
        with refuses(name):
            convert.main([str(file), str(tmp_path / name)])


def test_data_that_nobody_named_are_asked_for(file, tmp_path, refuses):
    folder = tmp_path / "folder"
    assert convert.main([str(file), str(folder)]) == 0
    (folder / diffusers_folder.RECORD).unlink()
    config = runs.read_config(runs.find(str(folder)))
    with refuses("a network from elsewhere"):
        build.load_data(config)


# Training from trained weights.


def parsed(*flags):
    return arguments.parse(["digits", *flags], EXPERIMENTS, prog="train")


@pytest.mark.parametrize("kind", ["file", "run"])
def test_training_starts_at_the_weights_that_were_given(kind, file, run, tmp_path):
    source = file if kind == "file" else run.folder
    config = parsed("--init-from", str(source), "--output", str(tmp_path))
    made, mesh = runs.of(config), parallel.make_mesh(1)
    with checkpoint.open_folder(made.checkpoints) as manager:
        trained, *_ = beginning.start(config, made, mesh, manager)
    state = learning.as_stored(trained, mesh)
    found = runs.find(str(source))
    given = weights.load(runs.read_config(found), found, Weights())[0]
    same(jax.tree.map(np.asarray, state.params), given)
    same(jax.tree.map(np.asarray, state.ema_params), given)
    assert int(state.step) == 0
    fresh = learning.init_state(config).params
    assert (
        fresh["net"]["conv_in"]["kernel"] != given["net"]["conv_in"]["kernel"]
    ).all()


def test_network_and_diffusion_are_those_of_the_weights(file):
    given = networks.read_config(networks.find(file))
    config = parsed("--init-from", str(file), "--data.source", "folder:mine")
    assert config.diffusion == given.diffusion
    for field in ("channels", "multipliers", "blocks", "attention", "groups"):
        assert getattr(config.net, field) == getattr(given.net, field)
    assert config.data.image_size == given.data.image_size
    assert config.data.source == "folder:mine"
    # Flags are heard.
    other = parsed("--init-from", str(file), "--net.dropout", "0.3")
    assert other.net.dropout == 0.3


def test_pictures_are_drawn_as_the_weights_ask_for(tmp_path):
    config = replace(config_of(), "sample", clip=False, variance="large")
    config = replace(config, "diffusion", num_steps=100)
    networks.write_file(tmp_path / "a.safetensors", network_of(config))
    found = parsed("--init-from", str(tmp_path / "a.safetensors")).sample
    assert (found.clip, found.variance) == (False, "large")
    assert found.steps is None  # those of the experiment are more than there are


OTHERS = {
    "--net.channels 16": "net.channels 8, not 16",
    "--net.groups 8": "net.groups 4, not 8",
    "--net.variant diffusers": "net.variant official, not diffusers",
    "--net.attention 8": "net.attention (4,), not (8,)",
    "--net.blocks 2 --net.classes 10": "net.blocks 1, not 2; net.classes 0, not 10",
    "--diffusion.variance range --diffusion.loss hybrid --diffusion.prediction eps": (
        "diffusion.variance small, not range"
    ),
}


@pytest.mark.parametrize("flags", OTHERS)
def test_another_network_is_refused(flags, file, refuses):
    config = parsed("--init-from", str(file), *flags.split())
    with refuses(OTHERS[flags]):
        initial.params(config)


def test_a_run_that_has_begun_goes_on_without_the_weights(file, tmp_path, monkeypatch):
    flags = ["--init-from", str(file), "--output", str(tmp_path), "--name", "tuned"]
    config = parsed(*flags)
    made = runs.of(config)
    with checkpoint.open_folder(made.checkpoints) as manager:
        state, *_ = beginning.start(config, made, parallel.make_mesh(1), manager)
        checkpoint.save(manager, 3, state, {"pending": []})
        checkpoint.wait(manager)
    file.unlink()
    again = parsed(*flags)
    assert again == config
    beginning.check_same_run(again, made)
    # Nor does it have to be told again, or in the same words.
    assert parsed(*flags[2:]) == config
    monkeypatch.chdir(tmp_path)
    assert parsed("--init-from", file.name, *flags[2:]) == config
    # Another start is another run.
    networks.write_file(tmp_path / "other.safetensors", network_of(config_of()))
    other = parsed("--init-from", "other.safetensors", *flags[2:])
    with pytest.raises(ConfigError, match=r"given\.safetensors -> .*other\.safeten"):
        beginning.check_same_run(other, made)
