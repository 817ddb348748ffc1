"""Image files of every kind, from a folder, made of one size and 8 bits deep."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from image_data import greys
from PIL import Image

from diffusion_jax.data import datasets, image_files
from diffusion_jax.errors import DataError

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.stack([GREY, GREY[::-1], GREY.T], -1)


def load_one(folder: Path, **options) -> np.ndarray:
    images = datasets.load(f"folder:{folder}", image_size=8, **options).images
    assert len(images) == 1
    return images[0]


def of(array, mode=None) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(array), mode)


def palette() -> Image.Image:
    image = of(~LEFT[..., 0] * np.uint8(1), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.info["transparency"] = 1
    return image


THREE = GREY[..., None].repeat(3, axis=-1)
LEFT = np.broadcast_to((np.arange(8) < 4)[None, :, None], (8, 8, 1))
ALPHA = LEFT * np.uint8(255)
WIDE = np.zeros((8, 13, 3), np.uint8)
WIDE[:, 2:10] = RGB
FEW = of(RGB).quantize(64)


def saved(image, expected, ending="png", **options):
    return image, expected, ending, {"lossless": True, **options}


BECOMES = {
    **{ending: saved(of(RGB), RGB, ending) for ending in ("png", "bmp", "webp", "PNG")},
    "grey": saved(of(GREY), THREE),
    "one bit": saved(of(GREY > 100), (THREE > 100) * 255),
    "16 bits": saved(of(GREY.astype(np.uint16) * 257 + 100), THREE),
    "palette": saved(FEW, np.asarray(FEW.convert("RGB"))),
    "holes": saved(of(np.dstack([RGB, ALPHA])), np.where(LEFT, RGB, 255)),
    "grey holes": saved(of(np.dstack([GREY, ALPHA]), "LA"), np.where(LEFT, THREE, 255)),
    "holes of a palette": saved(palette(), np.where(LEFT, [10, 20, 30], 255)),
    "a fifth of black": saved(of(np.full((8, 8, 4), [0, 0, 0, 51], np.uint8)), 204),
    "first of an animation": saved(
        *(Image.new("RGB", (8, 8), "red"), [255, 0, 0], "gif"),
        save_all=True,
        append_images=[Image.new("RGB", (8, 8), "blue")],
    ),
}


@pytest.mark.parametrize("name", BECOMES)
def test_folder_images_become_rgb_of_8_bits(tmp_path, name):
    image, expected, ending, options = BECOMES[name]
    image.save(tmp_path / f"a.{ending}", **options)
    found = load_one(tmp_path)
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


def test_folder_one_channel_is_grey_or_luma(tmp_path):
    luma = RGB @ np.array([0.299, 0.587, 0.114])
    for image, expected, off in (
        (of(GREY), GREY, 0),
        (of(GREY.astype(np.uint16) * 257 + 100), GREY, 0),
        (of(RGB), luma, 1.5),
    ):
        image.save(tmp_path / "a.png")
        assert np.abs(load_one(tmp_path, channels=1)[..., 0] - expected).max() <= off


def test_folder_cmyk(tmp_path):
    magenta = np.full((8, 8, 4), [0, 255, 0, 0], np.uint8)
    of(magenta, "CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(load_one(tmp_path).astype(int) - [255, 0, 255]).max() < 4


def test_folder_exif_orientation(tmp_path):
    """Each orientation is stored as the inverse of the turn that undoes it."""
    for orientation, stored in {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB),
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(RGB, -1),
    }.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        of(stored).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(load_one(tmp_path), RGB, str(orientation))


# 8x13 as it is seen, and the part of it that has the shape of a size.
CUT = {8: RGB, (8, 10): WIDE[:, 1:11], (6, 13): WIDE[1:7], (8, 13): WIDE}


@pytest.mark.parametrize("kind", ["wide", "high", "turned"])
@pytest.mark.parametrize("size", CUT)
def test_folder_of_another_shape_keeps_the_middle_and_says_so(tmp_path, kind, size):
    """Of images that are high, and of ones that are seen otherwise than stored."""
    seen, exif = CUT[size], Image.Exif()
    if kind == "turned":
        exif[0x0112] = 6
        of(np.rot90(WIDE)).save(tmp_path / "a.png", exif=exif)
    elif kind == "high":
        of(WIDE.swapaxes(0, 1)).save(tmp_path / "a.png")
        seen, size = seen.swapaxes(0, 1), size if size == 8 else size[::-1]
    else:
        of(WIDE).save(tmp_path / "a.png")
    lost = 1 - seen.size / WIDE.size
    words = f"of another shape than .* middle, up to {lost:.1%} of an image"
    for memory_limit in (2**31, 0):
        options = {"image_size": size, "memory_limit": memory_limit}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            images = datasets.load(f"folder:{tmp_path}", **options).images
        np.testing.assert_array_equal(images[np.arange(1)], seen[None])
        found = [bool(re.search(words, str(one.message))) for one in said]
        assert found == [True] * (lost > 0)


def test_folder_shrinks_without_aliasing_and_enlarging_warns(tmp_path):
    """A fine checkerboard becomes its mean, not a coarse one."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    assert np.abs(load_one(tmp_path).astype(float) - 127.5).max() < 6
    Image.fromarray(RGB[:4, :4]).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="1 of 1 images .* were enlarged"):
        load_one(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"must hold files ending in \.png"):
        load_one(tmp_path)
    with pytest.raises(DataError, match="must exist"):
        load_one(tmp_path / "absent")


def fill(folder: Path, names: list[str]) -> None:
    """Writes one plain image a name, in its own grey."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / name)


@pytest.mark.parametrize("memory_limit", [2**31, 100])
def test_folder_is_sorted_recursive_and_leaves_out_the_rest(tmp_path, memory_limit):
    names = ["B.png", "a/x.png", "a/y/z.png", "a0.png", "b.png"]
    fill(tmp_path, names)
    fill(tmp_path, [".hidden.png", ".thumbs/a.png"])
    for name in ("notes.txt", "more.txt", "LICENSE", ".hidden"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "folder.png").mkdir()
    source, said = f"folder:{tmp_path}", r"no images: 2 of \.txt, 1 of no ending$"
    with pytest.warns(UserWarning, match=said):
        images = datasets.load(source, image_size=8, memory_limit=memory_limit).images
    for name in ("notes.txt", "more.txt", "LICENSE"):
        (tmp_path / name).unlink()
    assert isinstance(images, image_files.LazyImages) == (memory_limit == 100)
    assert greys(images) == [0, 1, 2, 3, 4]
    assert images.shape == (5, 8, 8, 3)
    dataset = datasets.load(source, image_size=8, memory_limit=memory_limit)
    batch = datasets.batch_at(dataset, np.array([3, 1, 3]))
    assert greys(batch["image"]) == [3, 1, 3]


def test_folder_knows_images_by_many_endings(tmp_path):
    red = Image.new("RGB", (8, 8), "red")
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "pnm": "PPM", "ppm": "PPM"}
    for ending in ("png", "tif", "tiff", "tga", "bmp", *kinds):
        red.save(tmp_path / f"a.{ending}", kinds.get(ending))
    images = datasets.load(f"folder:{tmp_path}", image_size=8).images
    assert len(images) == 9
    assert (abs(images.astype(int) - [255, 0, 0]) <= 2).all()


def spoil(folder: Path, num: int = 12) -> None:
    """Adds `num` files that are no images and one that is cut off."""
    for i in range(num):
        (folder / f"bad{i:02}.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    raw = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize("memory_limit", [2**31, 100])
def test_folder_names_unreadable_files_or_skips_them(tmp_path, memory_limit):
    fill(tmp_path, ["a.png", "c.png", "z.png"])
    spoil(tmp_path)
    source, options = f"folder:{tmp_path}", {"image_size": 8}
    with pytest.raises(DataError) as caught:
        datasets.load(source, **options)
    message = str(caught.value)
    words = ["got 13 of 16", "bad09.png", "and 3 more", "skip_unreadable=True"]
    assert [word for word in words if word not in message] == []
    assert "bad10.png" not in message
    options |= {"skip_unreadable": True, "memory_limit": memory_limit}
    with pytest.warns(UserWarning, match="13 of 16"):
        images = datasets.load(source, **options).images
    assert greys(images) == [0, 1, 2]
    for path in tmp_path.glob("[acz].png"):
        path.unlink()
    with pytest.raises(DataError, match="got 13 of 13"):
        datasets.load(source, **options)


def test_lazy_folder_names_a_file_that_fails_later(tmp_path):
    fill(tmp_path, ["a.png"])
    spoil(tmp_path, 0)
    lazily = {"image_size": 8, "memory_limit": 0}
    images = datasets.load(f"folder:{tmp_path}", **lazily).images
    assert images[np.array([0])].shape == (1, 8, 8, 3)
    with pytest.raises(DataError, match=r"cut\.png .*skip_unreadable"):
        images[np.array([1])]
    (tmp_path / "bad.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"got 1 of 3 .*bad\.png \(FileNotFoundError"):
        datasets.load(f"folder:{tmp_path}", **lazily)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("memory_limit", [2**31, 0])
def test_folder_respects_the_decompression_bomb_limit(
    tmp_path, monkeypatch, memory_limit
):
    fill(tmp_path, ["a.png"])
    source, options = f"folder:{tmp_path}", {"memory_limit": memory_limit}
    for limit in (63, 20):  # Pillow itself warns, or raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=r"a\.png .*decompression bomb"):
            datasets.load(source, image_size=8, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    assert len(datasets.load(source, image_size=8, **options).images) == 1


def test_lazy_images_index_like_an_array():
    array = np.random.default_rng(0).integers(0, 256, (10, 2, 2, 3), np.uint8)
    lazy = image_files.LazyImages(lambda i: array[i], array.shape)
    for indices in (3, slice(2, 7, 2), np.array([[1, 2], [9, 0]]), np.array([], int)):
        np.testing.assert_array_equal(lazy[indices], array[indices])
    assert len(lazy) == 10
