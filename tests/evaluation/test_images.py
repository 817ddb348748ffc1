"""Pictures hold the pixels they were given."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation import pictures


def test_uint8_rounds_to_the_nearest_and_inverts_the_scaling_of_training():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(pictures.to_uint8(every / 127.5 - 1), every)
    found = pictures.to_uint8([-9.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 9.0])
    np.testing.assert_array_equal(found, [0, 0, 1, 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_every_image_in_reading_order(channels):
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (5, 4, 4, channels), dtype=np.uint8)
    grid = np.asarray(pictures.grid(batch, columns=3, side=8, gap=2))
    assert grid.shape[:2] == (2 * 10 + 2, 3 * 10 + 2)
    for i, image in enumerate(batch):
        top, left = 2 + i // 3 * 10, 2 + i % 3 * 10
        shown = grid[top : top + 8 : 2, left : left + 8 : 2].reshape(image.shape)
        np.testing.assert_array_equal(shown, image)
    assert np.all(grid[12:, 22:] == 255)


def test_words_leave_the_pixels_as_they_are():
    batch = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    plain = pictures.grid(batch, columns=10)
    left = ["first", "second"]
    both = pictures.labelled(plain, above=[str(k) for k in range(10)], left=left)
    cells = np.asarray(both)[-plain.height :, -plain.width :]
    np.testing.assert_array_equal(cells, np.asarray(plain))
    for words in (
        np.asarray(both)[: -plain.height, -plain.width :].swapaxes(0, 1)[20:-20],
        np.asarray(both)[-plain.height :, : -plain.width],
    ):
        middles = np.split(words[: len(words) // 2 * 2], 2)
        assert all(middle.min() < 128 < middle.mean() for middle in middles)
    assert pictures.labelled(plain).tobytes() == plain.tobytes()


SIZES = {(0, None): (344, 276), (10, None): (684, 158), (10, 4): (276, 344)}
SIZES |= {(3, 6): (412, 294), (21, None): (344, 276)}


def test_columns_are_classes_where_they_can_be():
    images = np.zeros((20, 8, 8, 1), np.uint8)
    for (classes, columns), size in SIZES.items():
        assert pictures.by_class(images, classes, columns=columns).size == size


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"must be uint8 of shape .*; got float64"):
        pictures.grid(np.zeros((1, 4, 4, 1)))


def test_a_picture_is_whole_or_not_there(tmp_path):
    path = pictures.save(Image.new("L", (3, 2)), tmp_path / "new" / "x.png")
    assert Image.open(path).size == (3, 2)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_a_plot_is_drawn_even_of_nothing(tmp_path):
    kwargs = {"title": "loss", "ylabel": "loss", "path": tmp_path / "p.png"}
    for steps, values in (([], []), ([1, 2], [0.5, 0.1]), ([1, 2], [0.0, -1.0])):
        picture = Image.open(pictures.curve(steps, values, **kwargs))
        assert picture.size == (840, 480)
        assert picture.format == "PNG"
