"""Image files that make no sense, and legal ones that are unusual.

The first are refused by name: as data, as samples, and as what is to be edited. The
second are read right: 16 bits scaled to 8, palettes looked up, what is transparent laid
on white, CMYK turned to RGB, turned upright as EXIF says, of an animation the first.
"""

import io
import os
import struct
import zlib

import hypothesis
import nonsense
import numpy as np
import pytest
from hypothesis import strategies as st
from nonsense import cases, refuse
from PIL import Image

from diffusion_jax.training import pixels
from diffusion_jax.training.formats import DataError
from experiments import edit, eval_fid, train

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
SIDE = struct.pack("<H", 0)
NONSENSE = {
    "an empty PNG": ("png", b""),
    "one byte": ("png", b"\x89"),
    "a PNG of text": ("png", b"not an image, honestly"),
    "a PNG of zeros": ("png", bytes(1000)),
    "a head alone": ("png", PNG[:8]),
    "half a PNG": ("png", PNG[: len(PNG) // 2]),
    "half a JPEG": ("jpg", WRITTEN["jpg"][: len(WRITTEN["jpg"]) // 2]),
    "half a BMP": ("bmp", WRITTEN["bmp"][:100]),
    "half a WebP": ("webp", WRITTEN["webp"][: len(WRITTEN["webp"]) // 2]),
    "a GIF without an image": ("gif", WRITTEN["gif"][:13] + b";"),
    "a PNG of no width": ("png", png(0, 8, 8, 0, [b""] * 8)),
    "a PNG of no height": ("png", png(8, 0, 8, 0, [])),
    "a BMP of no size": ("bmp", WRITTEN["bmp"][:18] + bytes(8) + WRITTEN["bmp"][26:]),
    "a PNG beyond 31 bits": ("png", png(2**32 - 1, 2**32 - 1, 8, 0, [bytes(9)])),
    "a PNG of 10 gigapixels": ("png", png(100_000, 100_000, 8, 2, [bytes(9)])),
    "a PNG of 100 megapixels": ("png", png(10_000, 10_000, 8, 0, [bytes(9)])),
    "a thin PNG of 100 megapixels": ("png", png(1, 10**8, 8, 0, [bytes(9)])),
    "a bomb of zeros": (
        "png",
        lambda _: png(20_000, 10_000, 1, 0, [bytes(2500)] * 10_000),
    ),
    "a BMP of a gigapixel": (
        "bmp",
        WRITTEN["bmp"][:18] + struct.pack("<ii", 32768, 32768) + WRITTEN["bmp"][26:],
    ),
    "a GIF of a gigapixel": (
        "gif",
        WRITTEN["gif"][:6] + b"\xff\xff\xff\xff" + WRITTEN["gif"][10:],
    ),
    "rows that are too short": ("png", png(8, 8, 8, 2, [bytes(3)] * 8)),
    "no rows": ("png", PNG[:33] + chunk(b"IEND", b"")),
    "a checksum of another image": ("png", PNG[:29] + b"abcd" + PNG[33:]),
    "a chunk of 2 GB": ("png", PNG[:33] + chunk(b"IDAT", b"x", length=2**31 - 1)),
    "a chunk below 0": ("png", PNG[:33] + chunk(b"IDAT", b"x", length=2**32 - 1)),
    "words that unpack to 2 GB": (
        "png",
        lambda _: (
            PNG[:33]
            + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 9)) * 2
            + PNG[33:]
        ),
    ),
    "a depth of 3 bits": ("png", png(8, 8, 3, 0, [bytes(8)] * 8)),
    "a kind of no name": ("png", png(8, 8, 8, 5, [bytes(8)] * 8)),
    "an SVG": ("png", b'<svg xmlns="http://www.w3.org/2000/svg" width="8"/>'),
    "a PostScript program": (
        "png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8",
    ),
    "a pickle": ("png", lambda folder: nonsense.evil(folder)),
    "a zip": ("jpg", nonsense.npz({"a.png": PNG})),
    "floats": ("png", saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF")),
    "32 bits": (
        "png",
        saved(Image.fromarray(RAMP.astype(np.int32) * 2**16), "TIFF"),
    ),
    "colours of a printer without a profile": (
        "png",
        saved(Image.fromarray(RGB).convert("LAB"), "TIFF"),
    ),
    "16 bits of RGB with a colour for none": (
        "png",
        png(8, 8, 16, 2, [bytes(48)] * 8, chunk(b"tRNS", bytes([0, 0, 0, 5, 0, 9]))),
    ),
}
IMAGES = cases("image", NONSENSE)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return nonsense.write_network(tmp_path_factory.mktemp("net") / "net.safetensors")


def put(case, folder):
    ending, content = case.make
    path = folder / "images" / f"bad.{ending}"
    path.parent.mkdir()
    path.write_bytes(content(folder) if callable(content) else content)
    return path


@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_images_are_refused(case, net, tmp_path):
    path = put(case, tmp_path)
    Image.fromarray(RGB).save(path.with_name("good.png"))
    source = f"folder:{path.parent}"
    output = ["--output", tmp_path / "runs"]
    readers = [
        (train.main, ["digits", "--data.source", source, *output]),
        (eval_fid.main, [net, "--data", "digits", "--samples", source]),
        (edit.main, [net, "vary", path]),
        (edit.main, [net, "inpaint", path.with_name("good.png"), path]),
    ]
    for main, argv in readers:
        said = refuse(main, argv, tmp_path, several=main is not edit.main)
        assert path.name in said


FOLDERS = {
    "an empty folder": [],
    "a folder of texts": ["a.txt"],
    "a folder of hidden images": [".a.png"],
    "a folder of links to nowhere": ["a.png -> /no/such"],
    "a folder of links to itself": ["a.png -> a.png"],
    "a folder of a link to a text": ["a.png -> /etc/hostname"],
    "a folder of pipes": ["a.png |"],
    "a folder of a folder": ["a.png/"],
}
OF_FOLDERS = cases("folder of images", FOLDERS)
CASES = [*IMAGES, *OF_FOLDERS]


@pytest.mark.parametrize("case", OF_FOLDERS, ids=str)
def test_folders_are_refused(case, net, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in case.make:
        if "->" in name:
            link, target = name.split(" -> ")
            (folder / link).symlink_to(target)
        elif name.endswith("|"):
            os.mkfifo(folder / name[:-2])
        elif name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(PNG)
    for flag in ("--data", "--samples"):
        argv = [net, "--data", "digits", flag, f"folder:{folder}"]
        refuse(eval_fid.main, argv, tmp_path, several=True)


@nonsense.PROFILE
@hypothesis.given(kind=st.sampled_from(sorted(WRITTEN)), data=st.data())
def test_an_image_cut_off_is_the_same_or_refused(kind, data, tmp_path_factory):
    whole = WRITTEN[kind]
    path = tmp_path_factory.mktemp("cut") / f"a.{kind}"
    path.write_bytes(whole)
    right = pixels.read_image(path, 8)
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        found = pixels.read_image(path, 8)
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
            found = pixels.read_image(path, 8)
        except DataError as error:
            nonsense.check_words(f"error: {error}")
        else:
            assert (found.shape, found.dtype) == ((8, 8, 3), np.uint8)


# Legal, and unusual.

DEEP = (RAMP.astype(np.uint32) * 257 + 3).clip(0, 65535).astype(np.uint16)


def grey16(*others):
    rows = [row.astype(">u2").tobytes() for row in DEEP]
    return png(8, 8, 16, 0, rows, *others)


def deep(*planes):
    """16 bits of several channels, by their 8."""
    both = np.stack(planes, axis=-1).astype(np.uint16) * 257
    return [row.astype(">u2").tobytes() for row in both]


def turned():
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    return saved(Image.fromarray(np.rot90(RGB)), "PNG", exif=exif)


GREY = RAMP[..., None].repeat(3, axis=-1)
HALF = np.full((8, 8), 128, np.uint8)
WHITE = np.full((8, 8, 3), 255, np.uint8)
ON_WHITE = np.round(RGB * (128 / 255) + 255 * (127 / 255)).astype(np.uint8)
HOLE = np.where((RAMP == 0)[..., None], 255, GREY)
UNUSUAL = {
    "16 bits of grey": (grey16(), GREY),
    "16 bits of grey with a grey for none": (
        grey16(chunk(b"tRNS", struct.pack(">H", int(DEEP[0, 0])))),
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
    "one bit": (
        png(8, 8, 1, 0, [b"\xaa"] * 8),
        np.tile([255, 0], (8, 4))[..., None].repeat(3, axis=-1),
    ),
    "two bits": (
        png(8, 8, 2, 0, [b"\x1b\x1b"] * 8),
        np.tile([0, 85, 170, 255], (8, 2))[..., None].repeat(3, axis=-1),
    ),
    "a palette": (saved(Image.fromarray(RAMP).convert("P"), "PNG"), GREY),
    "a palette with a hole": (
        png(
            *(8, 8, 8, 3, [bytes(range(8))] * 8),
            chunk(b"PLTE", bytes(range(24))),
            chunk(b"tRNS", b"\xff\0"),
        ),
        np.tile(
            [[0, 1, 2], [255] * 3, *([i, i + 1, i + 2] for i in range(6, 24, 3))],
            (8, 1, 1),
        ),
    ),
    "RGBA, half": (saved(Image.fromarray(np.dstack([RGB, HALF])), "PNG"), ON_WHITE),
    "RGBA, of nothing": (
        saved(Image.fromarray(np.dstack([RGB, HALF * 0])), "PNG"),
        WHITE,
    ),
    "grey with a grey for none": (
        png(
            *(8, 8, 8, 0, [row.tobytes() for row in RAMP]),
            chunk(b"tRNS", struct.pack(">H", 0)),
        ),
        HOLE,
    ),
    "CMYK": (
        saved(Image.fromarray(RGB).convert("CMYK"), "TIFF"),
        RGB,
    ),
    "turned by EXIF": (turned(), RGB),
    "animated": (
        saved(
            Image.fromarray(GREY),
            "PNG",
            save_all=True,
            append_images=[Image.fromarray(255 - GREY)],
        ),
        GREY,
    ),
    "with another ending": (WRITTEN["bmp"], RGB),
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
    found = pixels.read_image(path, 8).astype(int)
    assert np.abs(found - right).max() <= 1, (found[..., 0], right[..., 0])
    (folded,) = pixels.read_folder(tmp_path, 8)
    np.testing.assert_array_equal(folded, found)
