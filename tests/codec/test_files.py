"""Files: the same on every machine and for ever, and refused where they are damaged."""

import struct
import zlib
from pathlib import Path

import codec_toys
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import continuous, schedule
from diffusion_jax.codec import archive, container, fitting, progressive, steps
from diffusion_jax.codec import profile as profiles
from diffusion_jax.errors import DataError
from diffusion_jax.lab.coding import files, pixels
from diffusion_jax.storage import tensor_files

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = (4, 4, 1)


def toy(shape=SHAPE):
    profile, denoise = codec_toys.five([50, 90, 140, 196], shape)
    return profile, denoise, codec_toys.five_images(np.random.default_rng(0), 5, shape)


def encoded(layout, profile, denoise, images, **options):
    make = archive.encode if layout == "archive" else progressive.encode
    return make(profile, denoise, images, **options)


def decoded(layout, profile, denoise, data, **options):
    if layout == "archive":
        return archive.decode(profile, denoise, data, **options).images
    return progressive.decode(profile, denoise, data, **options).images


@pytest.mark.parametrize("layout", ["progressive", "archive"])
def test_other_machines_read_the_same(layout):
    """Those that differ by less than 2^-34 do; those beyond are told that they do."""
    profile, exact, images = toy((8, 8, 1))
    rng = np.random.default_rng(0)
    step = 2.0**-12

    def denoise(x, t):
        # Some values lie on an edge, where rounding could go either way.
        found = exact(x, t)
        edge = (np.floor(found / step) + 0.5) * step
        return np.where(np.round(1e6 * found) % 120 == 0, edge, found)

    data = encoded(layout, profile, denoise, images)
    assert len(container.opened(data, profile).listed.place) > 5
    for _ in range(2):
        other = lambda x, t: denoise(x, t) + rng.uniform(-1e-11, 1e-11, x.shape)  # noqa: E731
        got = decoded(layout, profile, other, data)
        np.testing.assert_array_equal(got, images)
    far = lambda x, t: exact(x, t) + rng.uniform(-1e-3, 1e-3, x.shape)  # noqa: E731
    with pytest.raises(ValueError, match=r"must .*; got "):
        decoded(layout, profile, far, data)


def test_any_batch_reads_what_any_other_wrote():
    profile, denoise, images = toy()
    data = progressive.encode(profile, denoise, images, batch_size=1)
    assert data == progressive.encode(profile, denoise, images, batch_size=3)
    got = progressive.decode(profile, denoise, data, batch_size=2)
    np.testing.assert_array_equal(got.images, images)


@pytest.mark.parametrize("layout", ["progressive", "archive"])
@pytest.mark.parametrize("version", [1, 2])
def test_files_of_all_versions_are_read_for_ever(version, layout):
    """Made by each version, with a network that is one matrix."""
    name = GOLDEN / f"codec_{version}"
    stored, profile = np.load(f"{name}.npz"), profiles.load(Path(f"{name}.safetensors"))
    data = stored[layout].tobytes()
    assert container.opened(data, profile).version == version
    got = decoded(layout, profile, linear(stored["matrix"]), data)
    np.testing.assert_array_equal(got, stored["images"])


def test_a_file_of_many_images_has_few_heads():
    """Of the first version it had one for each 1,024 pixel values, up to 1,024."""
    assert [archive._lanes(2**k) for k in (8, 13, 18, 30)] == [1, 8, 64, 64]
    assert [archive._lanes(2**k, 1) for k in (8, 13, 18, 30)] == [1, 8, 256, 1024]


def linear(matrix):
    def denoise(x, t):
        return (x.reshape(len(x), -1) @ matrix / (1 + t / 50)).reshape(x.shape)

    return denoise


@pytest.mark.parametrize("layout", ["progressive", "archive"])
def test_what_was_never_seen_is_kept_and_noise_is_stored_plainly(layout):
    profile, denoise, images = toy()
    odd = images.copy()
    odd[1, 2, 3], odd[4, 3, 3] = 77, 254
    data = encoded(layout, profile, denoise, odd)
    assert len(container.opened(data, profile).place) == 2
    np.testing.assert_array_equal(decoded(layout, profile, denoise, data), odd)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    data = encoded(layout, profile, denoise, noise)
    assert container.opened(data).layout == "raw"
    assert len(data) < noise.size + 24
    np.testing.assert_array_equal(decoded(layout, profile, denoise, data), noise)
    with pytest.raises(DataError, match="plain pixels must be whole; got"):
        decoded(layout, profile, denoise, data[:-1])


@pytest.mark.parametrize("layout", ["progressive", "archive"])
def test_a_damaged_file_is_refused_or_says_that_it_is_cut(layout):
    """Never other pixels than those compressed, never another kind of error."""
    profile, denoise, images = toy()
    data, refused = encoded(layout, profile, denoise, images), 0
    read = archive if layout == "archive" else progressive
    for seed in range(200):
        bad = damaged(np.random.default_rng(seed), data)
        try:
            got, whole = read.decode(profile, denoise, bad)[:2]
        except ValueError as error:
            said, refused = str(error), refused + 1
        else:
            said = "; got "
            assert not whole or (got == images).all(), seed
        assert "; got " in said, said
    assert refused > 100


def damaged(rng, data):
    """A file with bits flipped, bytes changed, cut out or put in, or its end lost."""
    bad = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        # The header is as likely as all the rest.
        end = len(bad) if rng.integers(2) else min(24, len(bad))
        place = int(rng.integers(0, max(1, end)))
        match rng.integers(5):
            case 0:
                bad[place : place + 1] = bytes([bad[place] ^ 1 << rng.integers(8)])
            case 1:
                bad[place : place + 1] = bytes([rng.integers(256)])
            case 2:
                bad[place : place + 3] = b""
            case 3:
                bad[place:place] = rng.bytes(2)
            case 4:
                del bad[max(place, 1) :]
        bad = bad or bytearray(b"D")
    return bytes(bad)


def head(number, *rest, version=1, layout=0, identity=b"12345678"):
    start = b"DDPX" + bytes([version, layout]) + identity
    return start + container.varint(number) + b"".join(rest)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (b"", "b''"),
        (b"\x89PNG1234567890abc", "PNG"),
        (b"DDPX\x01\x00123", "ends within it, after 9 bytes"),
        (head(1)[:14], "ends within it"),
        (head(1, version=3), "3 and 0"),
        (head(1, layout=7), "1 and 7"),
        (head(0), "0 images"),
        (head(2**30), "1,073,741,824 images"),
        (head(1)[:14] + b"\xff" * 8, "a number beyond"),
        (head(1, b"\x00\x00", b"\xff" * 5), "a number beyond"),
        (head(1, b"\xff\xff\x03"), "ends within it"),
        (head(1, b"\x01\x05\xff\x7f\x00\x00"), "a listed value"),
        (head(1, b"\x00\x00\x00", b"1234more"), "4 bytes more"),
    ],
)
def test_headers_that_cannot_be_are_refused(data, got, refuses):
    with refuses(got):
        container.opened(data)


def test_a_file_belongs_to_a_profile(refuses):
    profile, denoise, images = toy()
    other = profile._replace(seed=1)
    data = progressive.encode(profile, denoise, images)
    with refuses(other.identity.hex()):
        progressive.decode(other, denoise, data)
    with refuses("progressive"):
        archive.decode(profile, denoise, data)
    stack = archive.encode(profile, denoise, images)
    with refuses("archive"):
        progressive.decode(profile, denoise, stack)
    with pytest.raises(DataError, match="must be whole; got"):
        archive.decode(profile, denoise, stack[:-1])
    file = container.opened(stack, profile)
    for payload in (file.payload[:4], file.payload + b"\x00"):
        with refuses(f"a payload of {len(payload)} bytes"):
            archive.stack_of(file._replace(payload=payload), profile)
    bad = bytearray(data)
    bad[-1] ^= 1
    with refuses("16,777,217 images"):
        many = head(2**24 + 1, identity=profile.identity)
        container.opened(many, profile)
    with refuses("others by their CRC-32"):
        progressive.decode(profile, denoise, bytes(bad))


def test_images_of_another_kind_are_refused(refuses, monkeypatch):
    profile, denoise, images = toy()
    for bad, got in (
        (images[..., 0], "uint8 of 4x4"),
        (images.astype(np.float32), "float32 of 4x4x1"),
        (images[:, :2], "uint8 of 2x4x1"),
        (images[:0], "0 images"),
    ):
        with refuses(got):
            progressive.encode(profile, denoise, bad)
    with monkeypatch.context() as patch, refuses("5 images of 4x4x1"):
        patch.setattr(steps, "MOST_PIXELS", 79)
        progressive.encode(profile, denoise, images)
    with refuses("'best'"):
        progressive.encode(profile, denoise, images, rule="best")
    with refuses("'median'"):
        progressive.decode(profile, denoise, b"", show="median")


def test_a_profile_is_read_as_it_was_written_or_refused(tmp_path):
    profile, _, _ = toy()
    path = tmp_path / "codec.safetensors"
    profiles.save(profile, path)
    again = profiles.load(path)
    assert again.identity == profile.identity
    assert again.about == profile.about
    other = profile._replace(alphabet=np.arange(9, dtype=np.uint8))
    assert other.identity != profile.identity
    stored = tensor_files.read(path)
    for name, value in (
        ("archive.sd", stored.arrays["archive.sd"][:-1]),
        ("archive.chunk", 0 * stored.arrays["archive.chunk"] + 1),
        ("progressive.bits", stored.arrays["progressive.bits"] + 17),
        ("progressive.c0", np.nan * stored.arrays["progressive.c0"]),
        ("archive.pixel_sd", 0 * stored.arrays["archive.pixel_sd"]),
        ("archive.delta_bits", 99 + stored.arrays["archive.delta_bits"]),
        ("alphabet", stored.arrays["alphabet"][::-1]),
    ):
        arrays = {**stored.arrays, name: value}
        tensor_files.write_safetensors(path, arrays, stored.meta)
        with pytest.raises(DataError, match=r"must be a profile .*; got .*\. Make it"):
            profiles.load(path)


def test_fitting_finds_the_deviations_and_equal_shares():
    scale, shape = np.array([0.3, 0.1, 0.2, 0.05]), (2, 2, 1)
    _, denoise = codec_toys.gaussian(scale, [1, 2], shape)
    rng = np.random.default_rng(0)
    images = codec_toys.gaussian_images(rng, 600, scale, shape)
    levels = codec_toys.SCHEDULE
    found = fitting.fit(denoise, levels, images, batch_size=600)
    chain = found.archive
    wanted = (1 / scale**2 + codec_toys.SNR[chain.times[1:], None]) ** -1
    errors = (chain.sd**2 - chain.small[:, None]) / chain.c0[:, None] ** 2
    np.testing.assert_allclose(errors, wanted, rtol=0.25)
    assert len(found.alphabet) == 256
    bits = fitting.rates_of(chain).sum(axis=1)
    assert bits.max() < 2 * np.median(bits)
    assert chain.steps in fitting.STEPS
    for bad, got in ((images[:1], "uint8"), (images.astype(float), "float64")):
        with pytest.raises(DataError, match=rf"must be two or more.*got {got}"):
            fitting.fit(denoise, levels, bad)
    exploding = continuous.discretize(continuous.ve(), 20, clean=True)
    with pytest.raises(DataError, match=r"must preserve the variance.*; got another"):
        fitting.fit(denoise, exploding, images)
    with pytest.raises(DataError, match="must predict finite values; got others"):
        fitting.fit(lambda x, t: x * np.nan, levels, images)


def test_fitting_finds_where_errors_are_large():
    """By dimension and by texture, as the product of both."""
    rng = np.random.default_rng(0)
    own, factor = np.array([0.01, 0.05, 0.2]), np.array([0.2, 1.0, 3.0])
    kind = rng.choice([0, 20, 31], (9000, 3), p=[0.5, 0.3, 0.2])
    sd = own * factor[np.searchsorted([0, 20, 31], kind)]
    found, textures = fitting._deviations(
        np.square(sd * rng.normal(size=sd.shape)), kind
    )
    np.testing.assert_allclose(found * textures[kind], sd, rtol=0.06)
    assert np.square(found).mean() == pytest.approx(np.square(sd).mean(), rel=0.06)


def test_an_image_that_holds_more_is_seen_from_an_earlier_place():
    """As far as the bits of the mean image lead: here one holds thrice as much."""
    logsnr = -np.linspace(-4, 4, 801)  # information is a straight line of e^logsnr
    times = np.arange(0, 801, 10)
    density = np.exp(-logsnr[times])[:, None] * [[0.5, 1.5]]
    pixels = np.linspace(100, 900, len(times))[:, None] * [[1, 1]]
    scan = fitting.Scan(times, *[None] * 4, None)._replace(each=density, pixels=pixels)
    # To the 40th place: the first goes twice as far, the second two thirds of it.
    assert fitting._late(scan, logsnr, 40) == pytest.approx(
        (100 + 900 - 800 * 40 * 2 / 240) / 2
    )


def test_symbols_share_the_information_and_none_is_empty():
    profile, _ = codec_toys.gaussian(np.geomspace(0.01, 0.5, 64), [2, 190], (8, 8, 1))
    chain = profile.progressive
    rates = fitting.rates_of(chain)[0]
    loads = np.bincount(chain.chunk[0], rates)
    assert len(loads) == chain.chunks[0] > 10
    assert loads.max() < 1.2 * loads.min()


def test_the_chain_is_chosen_by_size_and_then_by_what_matters():
    fake = codec_toys.gaussian(0.2, [20, 190], (2, 2, 1))[0].archive
    sizes = [(10, 103.0), (20, 102.0), (20, 101.0), (30, 100.0)]
    sized = [(fake._replace(times=np.array([t])), bits) for t, bits in sizes]
    chain, bits = fitting._best(sized, lambda c: int(c.times[0]))
    # 30 is smaller than any, 10 too large, and of the two at 20 the smaller is taken.
    assert (chain.times[0], bits) == (20, 101.0)


def test_times_share_the_information_equally_and_begin_in_noise():
    log_alpha, logsnr = map(np.asarray, schedule.tables(schedule.cosine(4000)))
    scale, times = 0.4, fitting._scanned(log_alpha, logsnr)
    # All but 10^-4 bits a dimension, of x0 = 1, is gone where a chain begins.
    left = np.exp(2 * log_alpha[times[-1] - 1 : times[-1] + 1]) / (2 * np.log(2))
    assert left[0] > 1e-4 * 0.98 > left[1] * 0.97
    errors = scale**2 / (1 + scale**2 * np.exp(logsnr[times]))
    errors = np.repeat(errors[:, None], 30, 1)
    ones = np.ones((len(times), profiles.TEXTURES))
    each = np.zeros((len(times), 2))
    scan = fitting.Scan(times, errors, each, each, np.sqrt(errors), ones)
    chain = fitting._chain(scan, log_alpha, logsnr, 3, 8, 0)
    rates = fitting.rates_of(chain).sum(axis=1)
    np.testing.assert_allclose(rates, rates.mean(), rtol=0.02)
    # A symbol has at most 10 bits of information, and two more than it has of it.
    each = rates / chain.chunks
    assert (each <= 10).all()
    assert (chain.chunks == np.ceil(rates / 10)).all()
    assert (np.abs(chain.bits - each - 2) <= 0.5).all()


def test_what_a_cut_leaves_is_told_by_the_errors_of_the_profile():
    scale = np.array([0.3, 0.05, 0.2, 0.1])
    profile, _ = codec_toys.gaussian(scale, [20, 90, 190], (2, 2, 1))
    snr = codec_toys.SNR[profile.archive.times][:, None]
    wanted = 127.5 * np.sqrt((1 / (1 / scale**2 + snr)).mean(axis=1))
    np.testing.assert_allclose(files.rmse(profile.archive), wanted)


def png_of_16_bits():
    """An RGB image, which Pillow opens as one of 8 bits."""
    rows = b"".join(b"\0" + bytes(range(24)) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def test_image_files_are_read_as_they_are_or_not_at_all(tmp_path):
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    image, exif = Image.fromarray(grey), Image.Exif()
    for mode in ("L", "P", "RGB", "LA"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    exif[0x0112] = 6  # a quarter turn to the right
    got = pixels.read([tmp_path], SHAPE)
    np.testing.assert_array_equal(got, np.stack([grey[..., None]] * 4))
    Image.fromarray(grey[:3]).save(tmp_path / "L.png", exif=exif)
    got = pixels.read([tmp_path / "L.png"], (4, 3, 1))
    np.testing.assert_array_equal(got[0, ..., 0], np.rot90(grey[:3], -1))
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[0, 0, 1] = 9
    bad = tmp_path / "bad.png"
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - grey)]}
    for write, why in (
        (lambda: Image.fromarray(colour).save(bad), "colours"),
        (lambda: Image.fromarray(grey[:3]).save(bad), "3x4 pixels"),
        (lambda: Image.fromarray(grey.astype(np.uint16)).save(bad), "mode I;16"),
        (lambda: Image.new("LA", (4, 4), (5, 9)).save(bad), "transparent"),
        (lambda: bad.write_bytes(png_of_16_bits()), "mode RGB, 16 bits"),
        (lambda: image.save(bad, **frames), "several frames"),
        (lambda: bad.write_bytes(b"no image"), "cannot identify"),
        (lambda: bad.unlink(), "No such file"),
    ):
        write()
        with pytest.raises(DataError, match=f"8 bits.*; got .*{why}"):
            pixels.read([bad], SHAPE)
