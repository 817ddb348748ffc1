"""The editing command, run as a person runs it."""

import numpy as np
import pytest
from PIL import Image
from small_run import SMALL

from diffusion_jax.checkpoints.checkpoint import CheckpointError
from diffusion_jax.data import datasets
from diffusion_jax.lab.run_folder import runs
from experiments import convert, edit, train

CELL = 68  # an image of 8 pixels enlarged to 64, and the gap
BESIDE = 72 + 12  # one image by itself, and the space to the next panel
WORDS = 18  # above the images


@pytest.fixture
def run(trained):
    return trained


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colour")
    pictures = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8)
    np.savez(folder / "data.npz", images=pictures)
    flags = ["--data.source", f"npz:{folder / 'data.npz'}", "--data.channels", "3"]
    assert train.main(["digits", *SMALL, *flags, "--output", str(folder)]) == 0
    return runs.Run(folder / "digits")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two digits, masks, and things that are wrong."""
    folder = tmp_path_factory.mktemp("files")
    digits = datasets.load("digits").images[:2, ..., 0]
    pictures = {
        "a": digits[0],
        "b": digits[1],
        "lower": np.repeat(np.array([0, 255], np.uint8), 32).reshape(8, 8),
        "black": np.zeros((8, 8), np.uint8),
        "large": np.zeros((20, 16), np.uint8),
        "rgb": np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8),
    }
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    (folder / "text.png").write_text("not an image")
    return folder


def edited(run, command, *args, out=None):
    """The picture, and the single images, [N, H, W]."""
    argv = [command, *map(str, args)]
    out = out or run.folder / "edit" / edit.default_name(command, edit.parse(argv)[2])
    name = run.folder if run.network is None else run.network.path
    assert edit.main([str(name), *argv]) == 0
    return Image.open(out), single(out)


def single(out):
    paths = sorted(out.with_suffix("").iterdir())
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def test_interpolation_goes_from_one_image_to_the_other(run, files, capsys):
    args = files / "a.png", files / "b.png", "--depth", "1", "--count", "5"
    picture, results = edited(run, "interpolate", *args)
    shown = capsys.readouterr().out
    name = "interpolate_files0-a_files0-b_depth1_count5_seed0.png"
    assert str(run.folder / "edit" / name) in shown
    assert "averaged weights of step 12" in shown
    assert picture.size == (5 * CELL + 4 + 2 * BESIDE, WORDS + 72)
    a, b = (np.asarray(Image.open(path), int) for path in args[:2])
    # One step of twenty changes little.
    for image, expected in ((results[0], a), (results[-1], b)):
        assert np.abs(image - expected).mean() < 30
    # The pictures at the sides are those given, each pixel a square of eight.
    cells = np.asarray(picture)[WORDS:]
    np.testing.assert_array_equal(cells[4:68:8, 4:68:8], a)
    np.testing.assert_array_equal(cells[4:68:8, -68:-4:8], b)
    np.testing.assert_array_equal(
        cells[4:68:8, BESIDE + 4 : BESIDE + 68 : 8], results[0]
    )


def test_rows_from_coarse_to_fine_are_those_of_single_depths(run, files):
    args = files / "a.png", files / "b.png", "--count", "3"
    picture, rows = edited(run, "coarse-to-fine", *args, "--depths", "20", "10", "0")
    assert picture.height == WORDS + 3 * CELL + 4
    rows = rows.reshape(3, 3, 8, 8)
    cells = np.asarray(picture)[WORDS:, -BESIDE - 3 * CELL - 4 : -BESIDE]
    np.testing.assert_array_equal(cells[4:68:8, 4:68:8], rows[0, 0])
    beside = np.asarray(picture)[WORDS:, BESIDE : -BESIDE - 3 * CELL - 4]
    assert all((row < 128).any() for row in np.split(beside[: 3 * CELL], 3))  # depths
    _, alone = edited(run, "interpolate", *args, "--depth", "10")
    np.testing.assert_array_equal(rows[1], alone)
    a, b = (np.asarray(Image.open(path), int) for path in args[:2])
    np.testing.assert_array_equal(rows[2, [0, 2]], [a, b])
    np.testing.assert_array_less(abs(rows[2, 1] - (a + b) / 2), 1)
    picture, rows = edited(run, "coarse-to-fine", *args)
    assert len(rows) == 9 * 3
    # A rule with memory interpolates too.
    unipc = "--depth", "10", "--sampler", "unipc", "--steps", "4"
    _, results = edited(run, "interpolate", *args, *unipc)
    assert np.any(results != alone)


def test_slerp_returns_both_images(run, files, tmp_path, capsys):
    args = files / "a.png", files / "b.png", "--count", "3", "--out"
    out = tmp_path / "deep" / "arc.png"
    picture, results = edited(run, "slerp", *args, out, out=out)
    assert picture.size == (3 * CELL + 4 + 2 * BESIDE, WORDS + 72)
    assert results.shape == (3, 8, 8)
    assert np.std(results[1]) > 0
    image = np.asarray(Image.open(files / "a.png"), float)
    error = np.sqrt(np.mean((results[0] - image) ** 2))
    assert f"reconstructions: RMSE {error:.2f} and " in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--resamples 3 --jump 2", "--sampler heun"])
def test_kept_pixels_are_those_of_the_file_to_the_bit(run, files, flags):
    args = files / "a.png", files / "lower.png", "--count", "3", *flags.split()
    picture, results = edited(run, "inpaint", *args, "--steps", "6")
    image = np.asarray(Image.open(files / "a.png"))
    np.testing.assert_array_equal(results[:, :4], np.stack([image[:4]] * 3))
    assert np.all((results[:, 4:] != image[4:]).mean(axis=(1, 2)) > 0.5)
    assert np.any(results[0] != results[1])
    assert picture.size == (2 * CELL + 4 + 12 + 3 * CELL + 4, WORDS + 72)
    cells = np.asarray(picture)[WORDS:][4:68:8, 4 : 4 + 2 * CELL]
    np.testing.assert_array_equal(cells[:, :64:8], image)
    np.testing.assert_array_equal(cells[:4, CELL : CELL + 64 : 8], image[:4])
    assert set(np.unique(cells[4:, CELL : CELL + 64 : 8])) == {96, 160}


def test_images_in_colour_keep_what_was_given(colour_run, files):
    """Of a mask the black pixels, to the bit; of a grey image the grey."""
    args = files / "rgb.png", files / "lower.png", "--count", "2"
    _, results = edited(colour_run, "inpaint", *args)
    image = np.asarray(Image.open(files / "rgb.png"))
    np.testing.assert_array_equal(results[:, :4], np.stack([image[:4]] * 2))
    _, results = edited(colour_run, "colorize", files / "a.png", "--count", "11")
    assert results.shape == (11, 8, 8, 3)
    grey = np.asarray(Image.open(files / "a.png"), float)
    mean = results.mean(axis=-1)
    # Where no channel was cut off at black or white, each was rounded by at most half.
    inside = np.all((results > 0) & (results < 255), axis=-1)
    assert inside.sum() > 50
    assert np.abs(mean - grey)[inside].max() <= 0.5 + 1e-3
    assert np.any(np.ptp(results.astype(int), axis=-1) > 5)


def test_variations_differ_and_repeat_from_a_file_too(run, files, tmp_path):
    image = np.asarray(Image.open(files / "a.png"), int)
    far = []
    for depth in (1, 20):
        args = files / "a.png", "--depth", depth, "--count", "6"
        picture, results = edited(run, "vary", *args)
        far.append(np.abs(results - image).mean())
    assert far[0] < 30 < far[1]
    assert len(np.unique(results.reshape(6, -1), axis=0)) == 6
    assert picture.size == (BESIDE + 6 * CELL + 4, WORDS + 72)
    file = tmp_path / "a.safetensors"
    assert convert.main([str(run.folder), str(file)]) == 0
    _, again = edited(runs.find(str(file)), "vary", *args)
    np.testing.assert_array_equal(again, results)
    _, other = edited(run, "vary", *args, "--seed", "1")
    assert np.any(other != results)
    _, raw = edited(run, "vary", *args, "--raw")
    assert np.any(raw != results)


def test_a_file_of_another_size_is_made_to_fit(run, files, capsys):
    edited(run, "vary", files / "large.png", "--count", "2")
    assert "20x16, its middle made 8x8" in capsys.readouterr().out


BAD = {
    "interpolate a.png nowhere.png": "B must be an image file; got .*nowhere.png",
    "interpolate a.png text.png": "B must be an image that Pillow reads; got .*te",
    "interpolate a.png b.png --depth 21": r"depth must be in 1..20.*; got 21\.",
    "interpolate a.png b.png --depth 0": r"depth must be in 1..20.*; got 0\.",
    "interpolate a.png b.png --count 1": r"count must be at least 2; got 1\.",
    "interpolate a.png b.png --eta 0.5": "sample.eta must be left out with",
    "coarse-to-fine a.png b.png --depths 5 -1": r"depth must be in 0..20.*got -1",
    "slerp a.png b.png --sampler ddpm": "slerp must draw by ddim .*; got .* ddpm",
    "slerp a.png b.png --eta 0.5": "slerp must draw by ddim .*; got .* 0.5",
    "inpaint a.png large.png": "MASK must have the size .* 8x8; got 20x16",
    "inpaint a.png black.png": "MASK must have white pixels.*; got none",
    "inpaint a.png lower.png --resamples 0": r"resamples at least 1; got 10 and 0",
    "inpaint a.png lower.png --resamples 2": r"jump must be in 1..3.*; got 10 and",
    "inpaint a.png lower.png --sampler ode": "sampler must take steps.*; got ode",
    "inpaint a.png lower.png --sampler unipc --resamples 2 --jump 1": (
        "resamples must be 1 with a rule that has a memory; got 2 with unipc"
    ),
    "colorize rgb.png": "RUN must be of RGB images.*; got one of grey",
    "vary a.png --depth 21": "depth must be in",
    "vary . --depth 2": "IMAGE must be an image file; got",
    "vary a.png --out x.jpg": "out must end in .png; got x.jpg",
    "inpant a.png": "the command must be one of .*; got 'inpant'.*'inpaint'",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_requests_are_named_before_anything_is_drawn(run, files, command):
    name, *args = command.split()
    args = [str(files / arg) if arg[-1:] in "g." else arg for arg in args]
    if "x.jpg" in command:
        args[-1] = "x.jpg"
    before = sorted((run.folder / "edit").rglob("*"))
    with pytest.raises((ValueError, CheckpointError), match=BAD[command]) as caught:
        edit.main([str(run.folder), name, *args])
    assert "; got" in str(caught.value)
    assert sorted((run.folder / "edit").rglob("*")) == before


@pytest.mark.parametrize(
    "argv", [["inpant", "a"], ["nowhere", "vary", "a"], ["nowhere", "a", "b"]]
)
def test_an_unknown_command_or_run_is_named(argv):
    with pytest.raises(ValueError, match=r"; got '(inpant|nowhere|a)'"):
        edit.main(argv)
