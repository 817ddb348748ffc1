"""The file: what is in front of the bits, and what of it can be wrong.

  0   4  magic, "DDPX"
  4   1  version, 2; of version 1 an archive has more heads, and a progressive file no
         scales of errors
  5   1  layout: 0 progressive, 1 archive, 2 raw
  6   8  identity of the profile
  14     N, the number of images
         values of x0 that another machine could be in doubt of
         pixels outside the alphabet
         number of bytes of the payload, then the payload
  end 4  CRC-32 of all pixels

Numbers are varints (LEB128: 7 bits a byte, the lowest first). Nothing in a file makes
code run, and no number is believed before it was compared with what it can be.
"""

import zlib
from typing import NamedTuple

import numpy as np

from diffusion_jax.codec.certified import ONE, Listed
from diffusion_jax.codec.profile import LAYOUTS as CHAINS
from diffusion_jax.codec.profile import Profile
from diffusion_jax.codec.steps import MOST_PIXELS, Split
from diffusion_jax.errors import DataError

MAGIC, VERSION = b"DDPX", 2
LAYOUTS = (*CHAINS, "raw")
MOST = 2**31 - 1
"""Of any number in a file."""
_AGAIN = "Copy it again from where it was made."


class File(NamedTuple):
    """What a file says, in so far as it is there."""

    version: int
    layout: str
    identity: bytes
    """Of the profile."""
    number: int
    """Of images."""
    listed: Listed
    place: np.ndarray
    """Of pixels outside the alphabet, int64, rising."""
    value: np.ndarray
    """Of the same, uint8."""
    payload: bytes
    """What there is of it."""
    length: int
    """Bytes that the payload has in all."""
    crc: int | None
    """None where the file ends before it."""
    header: int
    """Bytes in front of the payload."""

    @property
    def whole(self) -> bool:
        """Returns whether nothing is missing."""
        return self.crc is not None


class Decoded(NamedTuple):
    """What was in a file, as far as it goes."""

    images: np.ndarray
    """uint8 [N, H, W, C]."""
    whole: bool
    """Whether the file was; if so, they are exact."""
    depth: np.ndarray
    """int64 [N]: steps of the chain that were left out for each image."""
    exact: int
    """Pixel values that are known to be exact, of all images together."""


def packed(
    layout: str,
    profile: Profile,
    images: np.ndarray,
    parts: Split,
    listed: Listed,
    payload: bytes,
) -> bytes:
    """Returns the bytes of a file, or of one with plain pixels if that is smaller.

    Its parts are the images with the values outside the alphabet apart.
    """
    lists = _list(listed.place, listed.value + ONE) + _list(parts.place, parts.value)
    body = lists + varint(len(payload)) + payload
    plain = np.ascontiguousarray(images).tobytes()
    bare = varint(0) + varint(0) + varint(len(plain)) + plain
    if len(bare) < len(body):
        layout, body = "raw", bare
    head = MAGIC + bytes([VERSION, LAYOUTS.index(layout)]) + profile.identity
    check = zlib.crc32(plain).to_bytes(4, "little")
    return head + varint(len(images)) + body + check


def opened(data: bytes, profile: Profile | None = None) -> File:
    """Returns what a file says, of which the end may be missing.

    It has to be made with the profile, if one is at hand.

    Raises:
      DataError: it is no such file, of another version or another profile, cut in
        front of the payload, damaged, or too large.
    """
    if data[:4] != MAGIC[: len(data)] or len(data) < 4:
        raise DataError(
            f"a compressed file must begin with {MAGIC.decode()}; got "
            f"{data[:4]!r}. Give one that experiments.codec compress wrote."
        )
    if len(data) < 14:
        raise _cut(len(data))
    if not 1 <= data[4] <= VERSION or data[5] >= len(LAYOUTS):
        raise DataError(
            f"a compressed file must be of version 1 to {VERSION}, with a layout below "
            f"{len(LAYOUTS)}; got {data[4]} and {data[5]}. It is damaged, or of "
            "another version of this program: use that one."
        )
    layout, identity = LAYOUTS[data[5]], data[6:14]
    if profile is not None and identity != profile.identity:
        name = profile.about.get("name", "this run")
        raise DataError(
            f"a file must be read with the profile that wrote it, {identity.hex()}; "
            f"got that of {name}, {profile.identity.hex()}. Name the run that it was "
            "made with, with the same weights and the same fit."
        )
    count, place = number_at(data, 14)
    size = int(np.prod(profile.shape)) if profile is not None else 1
    if not 1 <= count <= MOST_PIXELS // size:
        raise damaged(f"{count:,} images, of which none or too many fit")
    spots, values, place = _listed(data, place)
    outside, pixels, place = _listed(data, place)
    if values.max(initial=0) > 2 * ONE or pixels.max(initial=0) > 255:
        raise damaged("a listed value outside its range")
    if outside.max(initial=0) >= count * size and profile is not None:
        raise damaged("a pixel outside all images")
    length, place = number_at(data, place)
    payload, rest = data[place : place + length], data[place + length :]
    if len(rest) > 4:
        raise damaged(f"{len(rest) - 4} bytes more than it names")
    crc = int.from_bytes(rest, "little") if len(rest) == 4 else None
    listed = Listed(spots, values - ONE)
    pixels = pixels.astype(np.uint8)
    head = data[4], layout, identity, count
    return File(*head, listed, outside, pixels, payload, length, crc, place)


def checked(images: np.ndarray, file: File) -> Decoded:
    """Returns images that are all those of a whole file.

    Raises:
      DataError: they are not.
    """
    if zlib.crc32(np.ascontiguousarray(images).tobytes()) != file.crc:
        raise DataError(
            "the pixels must be those that were compressed; got others by their "
            "CRC-32. The file is damaged, or this machine's network differs by more "
            "than 5.8e-11: nothing was written. " + _AGAIN
        )
    return Decoded(images, True, np.zeros(file.number, np.int64), images.size)


def other(wanted: str, file: File, profile: Profile) -> Decoded:
    """Returns the images of a file of plain pixels, of which no layout is asked.

    Raises:
      DataError: it is cut or damaged, or of a layout that is not the one wanted.
    """
    if file.layout != "raw":
        raise DataError(
            f"the file must have the layout {wanted}; got {file.layout}. Read it with "
            f"codec.{file.layout}.decode."
        )
    if file.length != file.number * int(np.prod(profile.shape)):
        raise damaged(f"{file.length:,} bytes of pixels")
    if not file.whole:
        raise cut_whole("a file of plain pixels", file)
    pixels = np.frombuffer(file.payload, np.uint8)
    return checked(pixels.reshape(-1, *profile.shape).copy(), file)


def cut_whole(what: str, file: File) -> DataError:
    """Returns the error for a file that can only be read whole."""
    there, all_ = file.header + len(file.payload), file.header + file.length + 4
    return DataError(
        f"{what} must be whole; got {there:,} of {all_:,} bytes. {_AGAIN} Use --layout "
        "progressive for files that may be cut."
    )


def varint(number: int) -> bytes:
    """Returns a number as bytes.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def number_at(data: bytes, place: int) -> tuple[int, int]:
    """Returns a number that `varint` wrote, and the place after it.

    Raises:
      DataError: the data end within it, or it is beyond 2^31.
    """
    number, shift = 0, 0
    while place < len(data):
        number |= (data[place] & 127) << shift
        place, shift, more = place + 1, shift + 7, data[place] & 128
        if number > MOST or shift > 35:
            raise damaged("a number beyond 2^31")
        if not more:
            return number, place
    raise _cut(len(data))


def _list(places: np.ndarray, values: np.ndarray) -> bytes:
    """Returns numbers at rising places as bytes: their count, gaps and values."""
    gaps = np.diff(places, prepend=-1) - 1
    pairs = zip(gaps.tolist(), values.tolist(), strict=True)
    return varint(len(places)) + b"".join(varint(g) + varint(v) for g, v in pairs)


def _listed(data: bytes, place: int) -> tuple[np.ndarray, np.ndarray, int]:
    count, place = number_at(data, place)
    if 2 * count > len(data) - place:
        raise _cut(len(data))
    pairs = []
    for _ in range(count):
        gap, place = number_at(data, place)
        value, place = number_at(data, place)
        pairs.append((gap, value))
    gaps, values = np.array(pairs, np.int64).reshape(-1, 2).T
    return np.cumsum(gaps + 1) - 1, values, place


def _cut(length: int) -> DataError:
    return DataError(
        "a compressed file must have its header; got one that ends within it, after "
        f"{length:,} bytes. {_AGAIN}"
    )


def damaged(what: str) -> DataError:
    """Returns the error for what no writer of files leaves."""
    return DataError(
        f"a compressed file must be as it was written; got {what}. {_AGAIN}"
    )
