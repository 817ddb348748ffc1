"""Image files of every kind, from a folder, made square and 8 bits deep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import datasets, image_files
from diffusion_jax.errors import DataError

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.stack([GREY, GREY[::-1], GREY.T], -1)


def load_one(folder: Path, **options) -> np.ndarray:
    images = datasets.load(f"folder:{folder}", image_size=8, **options).images
    assert len(images) == 1
    return images[0]


@pytest.mark.parametrize("ending", ["png", "bmp", "webp", "PNG"])
def test_folder_keeps_pixels_of_the_right_size(tmp_path, ending):
    Image.fromarray(RGB).save(tmp_path / f"a.{ending}", lossless=True)
    np.testing.assert_array_equal(load_one(tmp_path), RGB)


def test_folder_grey_becomes_three_equal_channels_or_stays_one(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert (load_one(tmp_path) == GREY[..., None]).all()
    np.testing.assert_array_equal(load_one(tmp_path, channels=1), GREY[..., None])


def test_folder_rgb_becomes_luma(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    luma = RGB @ np.array([0.299, 0.587, 0.114])
    assert np.abs(load_one(tmp_path, channels=1)[..., 0] - luma).max() < 1.5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_folder_transparency_is_laid_on_white(tmp_path, mode):
    alpha = np.where(np.arange(8) < 4, 255, 0).astype(np.uint8)[None].repeat(8, 0)
    if mode == "RGBA":
        image = Image.fromarray(np.dstack([RGB, alpha]))
        expected = np.where(alpha[..., None], RGB, 255)
    elif mode == "LA":
        image = Image.fromarray(np.dstack([GREY, alpha]), mode="LA")
        expected = np.where(alpha, GREY, 255)[..., None].repeat(3, -1)
    else:
        image = Image.fromarray((alpha == 0).astype(np.uint8), mode="P")
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.info["transparency"] = 1
        expected = np.where(alpha[..., None], [10, 20, 30], 255)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_one(tmp_path), expected)


def test_folder_half_transparent_is_half_white(tmp_path):
    image = np.zeros((8, 8, 4), np.uint8)
    image[..., 3] = 51  # a fifth of black on white
    Image.fromarray(image).save(tmp_path / "a.png")
    assert (load_one(tmp_path) == 204).all()


def test_folder_palette(tmp_path):
    Image.fromarray(RGB).quantize(64).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(
            load_one(tmp_path), np.asarray(image.convert("RGB"))
        )


def test_folder_16_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = (GREY.astype(np.uint16) * 257) + 100
    Image.fromarray(deep).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_one(tmp_path, channels=1)[..., 0], GREY)
    assert deep.max() > 60_000
    assert load_one(tmp_path).max() == GREY.max()


def test_folder_one_bit(tmp_path):
    Image.fromarray(GREY > 100).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_one(tmp_path)[..., 0], (GREY > 100) * 255)


def test_folder_cmyk(tmp_path):
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 1] = 255  # magenta
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(load_one(tmp_path).astype(int) - [255, 0, 255]).max() < 4


def test_folder_animation_gives_its_first_frame(tmp_path):
    first, second = (Image.new("RGB", (8, 8), c) for c in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert (load_one(tmp_path) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_folder_exif_orientation(tmp_path, orientation):
    """Each orientation is stored as the inverse of the turn that undoes it."""
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB),
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(RGB, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_one(tmp_path), RGB)


@pytest.mark.parametrize("wide", [True, False])
def test_folder_cuts_the_middle_square(tmp_path, wide):
    odd = np.zeros((8, 13, 3), np.uint8)
    odd[:, 2:10] = RGB
    if not wide:
        odd = odd.swapaxes(0, 1)
    Image.fromarray(np.ascontiguousarray(odd)).save(tmp_path / "a.png")
    expected = RGB if wide else RGB.swapaxes(0, 1)
    np.testing.assert_array_equal(load_one(tmp_path), expected)


def test_folder_shrinks_without_aliasing(tmp_path):
    """A fine checkerboard becomes its mean, not a coarse one."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    assert np.abs(load_one(tmp_path).astype(float) - 127.5).max() < 6


def test_folder_enlarging_warns(tmp_path):
    Image.fromarray(RGB[:4, :4]).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="1 of 1 images .* were enlarged"):
        load_one(tmp_path)


def fill(folder: Path, names: list[str]) -> np.ndarray:
    """Writes one plain image a name, in its own grey, and returns the greys."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / name)
    return np.arange(len(names), dtype=np.uint8)


def greys(images) -> list[int]:
    return images[np.arange(len(images))][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("memory_limit", [2**31, 100])
def test_folder_is_sorted_recursive_and_leaves_out_the_rest(tmp_path, memory_limit):
    names = ["B.png", "a/x.png", "a/y/z.png", "a0.png", "b.png"]
    fill(tmp_path, names)
    fill(tmp_path, [".hidden.png", ".thumbs/a.png"])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    source = f"folder:{tmp_path}"
    images = datasets.load(source, image_size=8, memory_limit=memory_limit).images
    assert isinstance(images, image_files.LazyImages) == (memory_limit == 100)
    assert greys(images) == [0, 1, 2, 3, 4]
    assert images.shape == (5, 8, 8, 3)
    dataset = datasets.load(source, image_size=8, memory_limit=memory_limit)
    batch = datasets.batch_at(dataset, np.array([3, 1, 3]))
    assert batch["image"].shape == (3, 8, 8, 3)
    assert batch["image"][:, 0, 0, 0].tolist() == [3, 1, 3]


def spoil(folder: Path, num: int = 12) -> None:
    """Adds `num` files that are no images and one that is cut off."""
    for i in range(num):
        (folder / f"bad{i:02}.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    raw = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(raw[: len(raw) // 2])


def test_folder_names_unreadable_files(tmp_path):
    fill(tmp_path, ["a.png", "z.png"])
    spoil(tmp_path)
    with pytest.raises(DataError) as caught:
        datasets.load(f"folder:{tmp_path}", image_size=8)
    message = str(caught.value)
    assert "got 13 of 15" in message
    assert "and 3 more" in message
    assert "bad09.png" in message
    assert "bad10.png" not in message
    assert "skip_unreadable=True" in message


@pytest.mark.parametrize("memory_limit", [2**31, 100])
def test_folder_skips_unreadable_files_if_asked(tmp_path, memory_limit):
    fill(tmp_path, ["a.png", "c.png", "z.png"])
    spoil(tmp_path)
    with pytest.warns(UserWarning, match="13 of 16"):
        images = datasets.load(
            f"folder:{tmp_path}",
            image_size=8,
            skip_unreadable=True,
            memory_limit=memory_limit,
        ).images
    assert greys(images) == [0, 1, 2]
    for path in tmp_path.glob("[acz].png"):
        path.unlink()
    with pytest.raises(DataError, match="got 13 of 13"):
        datasets.load(f"folder:{tmp_path}", image_size=8, skip_unreadable=True)


def test_lazy_folder_names_a_file_that_fails_later(tmp_path):
    fill(tmp_path, ["a.png"])
    spoil(tmp_path, 0)
    images = datasets.load(f"folder:{tmp_path}", image_size=8, memory_limit=0).images
    assert images[np.array([0])].shape == (1, 8, 8, 3)
    with pytest.raises(DataError, match=r"cut\.png .*skip_unreadable"):
        images[np.array([1])]
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"got 1 of 3 .*bad\.png"):
        datasets.load(f"folder:{tmp_path}", image_size=8, memory_limit=0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("memory_limit", [2**31, 0])
@pytest.mark.parametrize("limit", [63, 20])  # Pillow itself warns, or raises
def test_folder_respects_the_decompression_bomb_limit(
    tmp_path, monkeypatch, limit, memory_limit
):
    fill(tmp_path, ["a.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"a\.png .*decompression bomb"):
        datasets.load(f"folder:{tmp_path}", image_size=8, memory_limit=memory_limit)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    assert len(datasets.load(f"folder:{tmp_path}", image_size=8).images) == 1


def test_folder_without_images(tmp_path):
    with pytest.raises(DataError, match=r"must hold files ending in \.png"):
        datasets.load(f"folder:{tmp_path}", image_size=8)
    with pytest.raises(DataError, match="must exist"):
        datasets.load(f"folder:{tmp_path}/absent", image_size=8)


def test_lazy_images_index_like_an_array():
    array = np.random.default_rng(0).integers(0, 256, (10, 2, 2, 3), np.uint8)
    lazy = image_files.LazyImages(lambda i: array[i], array.shape)
    for indices in (3, slice(2, 7, 2), np.array([[1, 2], [9, 0]]), np.array([], int)):
        np.testing.assert_array_equal(lazy[indices], array[indices])
    assert len(lazy) == 10
    for indices in (10, -1, np.array([0, 10])):
        with pytest.raises(IndexError, match=r"must lie in 0\.\.9"):
            lazy[indices]
