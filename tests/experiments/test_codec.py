"""The command: fit, compress, decompress, inspect, and what it refuses."""

import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.codec import fitting
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError, DataError
from diffusion_jax.lab.coding import coder, files
from diffusion_jax.lab.schema.config import Config, replace
from diffusion_jax.lab.trained import exact
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.training import parallel
from experiments import codec


@pytest.fixture(scope="module")
def fitted(trained):
    """A small run with its profile; its network is compiled once."""
    made, make = {}, exact.denoise64

    def denoise64(config, drawable, mesh=None):
        if (config, mesh) not in made:
            made[config, mesh] = make(config, drawable, mesh=mesh)
        return made[config, mesh]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "denoise64", denoise64)
        patch.setattr(fitting, "SCANNED", 12)
        assert codec.main(["fit", str(trained.folder), "--images", "64"]) == 0
        yield trained.folder


def test_files_and_folders_go_in_and_come_out(fitted, tmp_path, capsys):
    digits = datasets.load("digits").images[:3]
    (tmp_path / "in").mkdir()
    for i, image in enumerate(digits):
        Image.fromarray(image[..., 0]).save(tmp_path / "in" / f"{i}.png")
    out = tmp_path / "x.ddpx"
    few, given = ["--batch-size", "4"], [str(tmp_path / "in"), "--out", str(out)]
    assert codec.main(["compress", str(fitted), *given, *few]) == 0
    assert "3 images, progressive" in capsys.readouterr().out
    run = ["--run", str(fitted)]
    where = ["--out", str(tmp_path / "o"), *run, *few]
    assert codec.main(["decompress", str(out), *where]) == 0
    assert "lossless" in capsys.readouterr().out
    for i, image in enumerate(digits):
        got = np.asarray(Image.open(tmp_path / "o" / f"{i:06d}.png"))
        np.testing.assert_array_equal(got, image[..., 0])
    assert codec.main(["inspect", str(out), *run]) == 0
    said = capsys.readouterr().out
    assert "layout    progressive, 3 images" in said
    assert "whole" in said
    assert "pixels" in said
    # A part of it, in three ways to write and to ask.
    cut = tmp_path / "cut.ddpx"
    cut.write_bytes(out.read_bytes()[:-9])
    npz = tmp_path / "x.npz"
    network = coder.load(coder.opened(str(fitted), None, Weights()))
    for name, flags, bits, show in (
        ("cut.ddpx", [], None, "mean"),
        ("x.ddpx", ["--rate", "0.3", "--show", "flow"], int(0.3 * 3 * 64), "flow"),
        ("x.ddpx", ["--bytes", "4", "--show", "sample"], 32, "sample"),
    ):
        where = [str(tmp_path / name), "--out", str(npz)]
        assert codec.main(["decompress", *where, *run, *few, *flags]) == 0
        assert "lossy: a part of the file" in capsys.readouterr().out
        data = (tmp_path / name).read_bytes()
        wanted = files.decompress(network, data, bits=bits, show=show, batch_size=4)
        np.testing.assert_array_equal(np.load(npz)["images"], wanted.images)
    assert codec.main(["inspect", str(cut), *run]) == 0
    assert "cut" in capsys.readouterr().out
    assert codec.main(["inspect", str(out)]) == 0
    assert "Name it with --run" in capsys.readouterr().out


def test_an_archive_of_the_runs_own_images_is_read_on_other_devices(
    fitted, tmp_path, monkeypatch
):
    out, npz = tmp_path / "a.ddpx", tmp_path / "a.npz"
    flags = ["--data", "--max-images", "5", "--layout", "archive", "--out", str(out)]
    with monkeypatch.context() as patch:
        one, make = parallel.make_mesh(1), exact.denoise64
        patch.setattr(exact, "denoise64", lambda *a: make(*a, mesh=one))
        assert codec.main(["compress", str(fitted), *flags]) == 0
        network = coder.opened(str(fitted), None, Weights())
        images = datasets.load("digits").images[:16]
        packed = files.compress(coder.load(network), images, batch_size=1)
    where = ["--out", str(npz), "--run", str(fitted)]
    assert codec.main(["decompress", str(out), *where]) == 0
    chosen = np.sort(np.random.default_rng(0).choice(1797, 5, replace=False))
    wanted = datasets.load("digits").images[chosen]
    np.testing.assert_array_equal(np.load(npz)["images"], wanted)
    # All eight devices share a batch.
    got = files.decompress(coder.load(network), packed, batch_size=64)
    assert got.whole
    np.testing.assert_array_equal(got.images, images)


def test_a_run_is_found_by_its_profile(fitted, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.ddpx"
    few = ["--batch-size", "4"]
    flags = ["--data", "--max-images", "1", "--out", str(out), *few]
    assert codec.main(["compress", str(fitted), *flags]) == 0
    (tmp_path / "runs").symlink_to(fitted.parent)
    monkeypatch.chdir(tmp_path)
    assert codec.main(["decompress", "x.ddpx", "--out", "x.png", *few]) == 0
    assert Image.open("x.png").size == (8, 8)
    assert codec.main(["inspect", "x.ddpx"]) == 0
    assert f"run       runs/{fitted.name}" in capsys.readouterr().out


def test_what_cannot_be_done_is_said_and_nothing_is_written(fitted, tmp_path):
    out = tmp_path / "x.ddpx"
    run, where = str(fitted), ["--out", str(out)]
    note = tmp_path / "note.ddpx"
    note.write_text("mine")
    big = tmp_path / "big.png"
    Image.new("L", (9, 8)).save(big)
    (tmp_path / "empty").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for argv, error, said in (
        (["compress", run, *where], ConfigError, "files or --data; got neither"),
        (["compress", run, str(big), "--data", *where], ConfigError, "got both"),
        (["compress", run, str(big), *where], DataError, "8x8 in grey.*got.*8x9"),
        (["compress", run, str(tmp_path / "empty"), *where], DataError, "got"),
        (["compress", run, str(tmp_path / "no.png"), *where], DataError, "No such"),
        (
            ["compress", run, "--data", "--out", str(note)],
            ConfigError,
            "cannot write .*note.ddpx",
        ),
        (["decompress", str(note), *where, "--run", run], DataError, "begin with DDPX"),
        (
            ["decompress", str(note), *where, "--rate", "1", "--bytes", "1"],
            ConfigError,
            "got both",
        ),
        (["inspect", str(big)], DataError, "begin with DDPX"),
        (["decompres"], ValueError, "Did you mean 'decompress'"),
    ):
        with pytest.raises(error, match=said):
            codec.main(argv)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert after == before


def test_a_profile_and_its_weights_belong_together(fitted, trained):
    raw = Weights(raw=True)
    with pytest.raises(ConfigError, match="must be of the weights that are used"):
        coder.load(coder.opened(str(fitted), None, raw))
    moved = fitted / coder.NAME
    moved.rename(fitted / "aside")
    with pytest.raises(ConfigError, match="codec fit"):
        coder.load(coder.opened(str(fitted), None, Weights()))
    (fitted / "aside").rename(moved)


@pytest.mark.parametrize(
    ("part", "value", "got"),
    [
        ("net", {"classes": 3}, "3 classes"),
        ("diffusion", {"schedule": "learned"}, "a learned schedule"),
    ],
)
def test_networks_of_another_kind_are_refused(part, value, got, monkeypatch):
    config = replace(Config(), part, **value)
    monkeypatch.setattr(coder.opening, "opened", lambda *a, **k: (None, config))
    with pytest.raises(ConfigError, match=f"must have no classes.*; got {got}"):
        coder.opened("x", None, Weights())


def test_files_and_profiles_stay_when_others_are_made(fitted, tmp_path, capsys):
    run, out = tmp_path / "runs" / "digits", tmp_path / "x.ddpx"
    shutil.copytree(fitted, run)
    few, data = ["--batch-size", "4"], ["--data", "--max-images", "1"]
    assert codec.main(["compress", str(run), *data, *few, "--out", str(out)]) == 0
    with pytest.raises(ConfigError, match="all that is left of its images"):
        codec.main(["compress", str(run), *data, *few, "--out", str(out)])
    assert codec.main(["fit", str(run), "--images", "64", "--seed", "1"]) == 0
    back = ["decompress", str(out), "--run", str(run), *few, "--out"]
    assert codec.main([*back, str(tmp_path / "x.png")]) == 0
    assert "lossless" in capsys.readouterr().out
    assert len([*run.glob("codec*.safetensors")]) == 2
    # An archive is read whole, or not at all.
    flags = [*data, "--layout", "archive", "--overwrite", "--out", str(out)]
    assert codec.main(["compress", str(run), *flags]) == 0
    with pytest.raises(ConfigError, match="which is read whole"):
        codec.main([*back, str(tmp_path / "y.png"), "--rate", "1"])
