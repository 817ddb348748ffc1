"""Other formats of images, measured beside ours."""

import io
import sys

import codec_toys
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.coding.coder import Coder
from diffusion_jax.lab.measure import codec_compared, formats_compared
from diffusion_jax.lab.measure.formats_compared import Point


def images(channels, count=7):
    """Smooth ones, of which formats make something."""
    y, x = np.mgrid[:12, :10]
    rng = np.random.default_rng(channels)
    phase = rng.uniform(0, 6, (count, 1, 1, channels))
    waves = np.sin(0.4 * y[..., None] + 0.3 * x[..., None] + phase)
    return np.rint(127 + 100 * waves).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_are_those_of_files_that_give_the_images_back(channels, monkeypatch):
    made = images(channels)
    files = []

    def kept(image, save=formats_compared.saved, **how):
        files.append((image, save(image, **how)))
        return files[-1][1]

    monkeypatch.setattr(formats_compared, "saved", kept)
    found = dict(formats_compared.lossless(made))
    for image, file in files:
        back = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        np.testing.assert_array_equal(back, np.broadcast_to(image, back.shape))
    assert found["plain pixels"] == 120 * channels
    (_, mosaic), (_, first) = files[-1], files[0]
    assert found["WebP, one mosaic" if len(found) == 7 else "JPEG XL, one mosaic"] == (
        pytest.approx(len(mosaic) / 7)
    )
    assert abs(found["PNG, each image"] - len(first)) < 10
    assert found["PNG, one mosaic"] < found["PNG, each image"]


def test_lossy_points_are_of_what_comes_back():
    made = images(3)
    alone, together = formats_compared.lossy(made, made[:4], [5, 90])
    assert list(alone) == list(together)
    for name, points in alone.items():
        assert 1 <= len(points) <= 3
        assert (points[-1].rmse == 0) == (name != "JPEG")
        # One header is less than one an image.
        assert together[name][0].rate < points[0].rate
    # Points that others beat are left out.
    points = [Point(3, 1.0), Point(1, 9.0), Point(2, 9.0), Point(3, 2.0), Point(4, 1.0)]
    assert formats_compared.front(points) == [Point(1, 9.0), Point(3, 1.0)]
    rough, fine = alone["JPEG"]
    assert rough.rate < fine.rate
    assert 40 > rough.rmse > 2 * fine.rmse > 0


def test_a_histogram_of_the_same_images_is_their_entropy():
    made = np.repeat(np.arange(4, dtype=np.uint8), 250).reshape(1000, 1, 1, 1)
    made = np.concatenate([made, np.zeros_like(made)], axis=1)
    size = formats_compared.histograms(made, made)
    # Two bits at one pixel, none at the other.
    assert size.bytes_each == pytest.approx(2 / 8, abs=1e-3)


def test_mosaics_are_whole_rows_and_no_larger_than_formats_take(refuses):
    wide = formats_compared.mosaic(np.ones([5, 4, 2, 3], np.uint8))
    assert wide.shape == (8, 8, 3)
    assert wide.sum() == 5 * 4 * 2 * 3
    with refuses("16384x16384"):
        formats_compared.mosaic(np.empty([2**12, 256, 256, 1], np.uint8))


def test_what_is_missing_is_said_and_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    assert "pip install 'diffusion-jax[codecs]'" in formats_compared.missing()
    assert not any("XL" in size.name for size in formats_compared.lossless(images(1)))
    alone = formats_compared.lossy(images(1), images(1), [50])[0]
    assert list(alone) == ["JPEG", "WebP"]


def test_a_run_is_compared_by_files_that_come_back_as_they_were():
    rng, shape = np.random.default_rng(0), (4, 4, 1)
    profile, denoise = codec_toys.five([60, 100, 200], shape)
    made = codec_toys.five_images(rng, 64, shape)
    run = Coder(None, profile, denoise)
    found = codec_compared.compare(run, made, made[:16], made)
    sizes = dict(found.sizes)
    entropy = -codec_toys.SHARES @ np.log2(codec_toys.SHARES) * 16 / 8
    assert sizes["a histogram a pixel, of others"] == pytest.approx(entropy, rel=0.05)
    archive, one, each = (size.bytes_each for size in found.sizes[:3])
    assert entropy < archive < one < each
    assert archive < sizes["PNG, one mosaic"]
    rates, errors = zip(*found.own, strict=True)
    assert errors[-1] == 0
    assert rates[-1] == pytest.approx(one * 8 / 16)
    assert list(rates) == sorted(rates)
    assert errors[0] > errors[len(errors) // 2] > 0
    assert [images.shape for *_, images in found.shown] == [(16, *shape)] * 5
    np.testing.assert_array_equal(found.shown[-1][-1], made[:16])
    picture = pictures.rate_distortion_compared(
        ("own", found.own), found.alone, found.together, found.shown, title="t"
    )
    assert np.asarray(picture).std() > 10
