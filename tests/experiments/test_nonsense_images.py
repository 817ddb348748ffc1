"""Image files that make no sense, and legal ones that are unusual.

The first are refused by name: as data, as samples, and as what is to be edited. The
second are read right: 16 bits scaled to 8, palettes looked up, what is transparent laid
on white, CMYK turned to RGB, turned upright as EXIF says, of an animation the first.
"""

import functools
import io
import os
import struct
import zlib

import hypothesis
import nonsense
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from diffusion_jax.data import image_files, image_folders
from diffusion_jax.errors import DataError

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind, content, *, length=None):
    size = len(content) if length is None else length
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", size) + kind + content + struct.pack(">I", crc)


def png(width, height, depth, color, rows, *others):
    """A PNG of any header, with rows of packed samples."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    parts = (head, *others, chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PNG = saved(Image.fromarray(RGB), "PNG")
WRITTEN = {
    "png": PNG,
    "jpg": saved(Image.fromarray(RGB), "JPEG", quality=95),
    "gif": saved(Image.fromarray(RAMP), "GIF"),
    "bmp": saved(Image.fromarray(RGB), "BMP"),
    "webp": saved(Image.fromarray(RGB), "WEBP", lossless=True),
}
NONSENSE = {
    "nothing": b"",
    "text": b"not an image, honestly",
    "a GIF without an image": WRITTEN["gif"][:13] + b";",
    "a PNG of no width": png(0, 8, 8, 0, [b""] * 8),
    "a BMP of no size": WRITTEN["bmp"][:18] + bytes(8) + WRITTEN["bmp"][26:],
    "a PNG beyond 31 bits": png(2**32 - 1, 2**32 - 1, 8, 0, [bytes(9)]),
    "a PNG of 10 gigapixels": png(100_000, 100_000, 8, 2, [bytes(9)]),
    "a PNG of 100 megapixels": png(10_000, 10_000, 8, 0, [bytes(9)]),
    "rows that are too short": png(8, 8, 8, 2, [bytes(3)] * 8),
    "no rows": PNG[:33] + chunk(b"IEND", b""),
    "a chunk of 2 GB": PNG[:33] + chunk(b"IDAT", b"x", length=2**31 - 1),
    "words that unpack to 2 GB": lambda _: (
        PNG[:33]
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 9)) * 2
        + PNG[33:]
    ),
    "a kind of no name": png(8, 8, 8, 5, [bytes(8)] * 8),
    "a PostScript program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8",
    "floats": saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "32 bits": saved(Image.fromarray(RAMP.astype(np.int32) * 2**16), "TIFF"),
    "colours of a printer": saved(Image.fromarray(RGB).convert("LAB"), "TIFF"),
    "16 bits of RGB with a colour for none": png(
        *(8, 8, 16, 2, [bytes(48)] * 8),
        chunk(b"tRNS", bytes([0, 0, 0, 5, 0, 9])),
    ),
}


def whole_folder(folder, size, channels=3):
    """All images of a folder."""
    return image_files.read(image_folders.find(folder), size, channels=channels)[0]


@pytest.mark.parametrize("name", NONSENSE)
def test_images_are_refused(name, tmp_path):
    path = tmp_path / "bad.png"
    for read, place in (
        (image_files.read_image, path),
        (whole_folder, tmp_path),
    ):
        grey = functools.partial(read, channels=1)
        nonsense.refuse_file(lambda at, r=grey: r(at, 8), NONSENSE[name], path, place)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_no_image(make, tmp_path):
    make(tmp_path / "a.png")
    nonsense.refuse(lambda _: whole_folder(tmp_path, 8), [], tmp_path)


@nonsense.PROFILE
@hypothesis.given(kind=st.sampled_from(sorted(WRITTEN)), data=st.data())
def test_an_image_cut_off_is_the_same_or_refused(kind, data, tmp_path_factory):
    whole = WRITTEN[kind]
    path = tmp_path_factory.mktemp("cut") / f"a.{kind}"
    path.write_bytes(whole)
    right = image_files.read_image(path, 8)
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        found = image_files.read_image(path, 8)
    except DataError as error:
        nonsense.check_words(f"error: {error}")
    else:
        np.testing.assert_array_equal(found, right)


@nonsense.PROFILE
@hypothesis.given(
    kind=st.sampled_from(sorted(WRITTEN)),
    places=st.lists(st.integers(0, 10**6), min_size=1, max_size=8),
    content=st.binary(max_size=64),
)
def test_a_damaged_image_is_read_or_refused(kind, places, content, tmp_path_factory):
    """Whatever is in it: pixels, or the one error."""
    damaged = bytearray(WRITTEN[kind])
    for at in places:
        damaged[at % len(damaged)] ^= 1 + at % 255
    damaged[len(damaged) // 2 : len(damaged) // 2 + len(content) // 2] = content
    path = tmp_path_factory.mktemp("damaged") / f"a.{kind}"
    path.write_bytes(bytes(damaged))
    with nonsense.little_memory(), nonsense.little_time():
        try:
            found = image_files.read_image(path, 8)
        except DataError as error:
            nonsense.check_words(f"error: {error}")
        else:
            assert (found.shape, found.dtype) == ((8, 8, 3), np.uint8)


# Legal, and unusual.

DEEP = (RAMP.astype(np.uint32) * 257 + 3).clip(0, 65535).astype(np.uint16)


def deep(*planes):
    """16 bits of several channels, by their 8."""
    both = np.stack(planes, axis=-1).astype(np.uint16) * 257
    return [row.astype(">u2").tobytes() for row in both]


GREY = RAMP[..., None].repeat(3, axis=-1)
HALF = np.full((8, 8), 128, np.uint8)
ON_WHITE = np.round(RGB * (128 / 255) + 255 * (127 / 255)).astype(np.uint8)
HOLE = np.where((RAMP == 0)[..., None], 255, GREY)
UNUSUAL = {
    "16 bits of grey with a grey for none": (
        png(
            *(8, 8, 16, 0, [row.astype(">u2").tobytes() for row in DEEP]),
            chunk(b"tRNS", struct.pack(">H", int(DEEP[0, 0]))),
        ),
        HOLE,
    ),
    "16 bits of RGB": (png(8, 8, 16, 2, deep(*np.moveaxis(RGB, -1, 0))), RGB),
    "16 bits of grey with half alpha": (
        png(8, 8, 16, 4, deep(RAMP, HALF)),
        np.round(GREY * (128 / 255) + 255 * (127 / 255)).astype(np.uint8),
    ),
    "16 bits of RGBA": (
        png(8, 8, 16, 6, deep(*np.moveaxis(RGB, -1, 0), HALF)),
        ON_WHITE,
    ),
    "grey with a grey for none": (
        png(
            *(8, 8, 8, 0, [row.tobytes() for row in RAMP]),
            chunk(b"tRNS", struct.pack(">H", 0)),
        ),
        HOLE,
    ),
    "a GIF whose screen has no size": (
        WRITTEN["gif"][:6] + bytes(4) + WRITTEN["gif"][10:],
        GREY,
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_read_right(name, tmp_path):
    content, right = UNUSUAL[name]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    found = image_files.read_image(path, 8).astype(int)
    assert np.abs(found - right).max() <= 1, (found[..., 0], right[..., 0])
    (folded,) = whole_folder(tmp_path, 8)
    np.testing.assert_array_equal(folded, found)
