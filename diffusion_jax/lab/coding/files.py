"""Images to compressed files and back, and what a file says, by a run as a codec."""

from typing import Any

import numpy as np

from diffusion_jax.codec import archive, container, progressive
from diffusion_jax.codec.container import Decoded
from diffusion_jax.codec.profile import Chain, Profile
from diffusion_jax.lab.coding.coder import Coder, bar


def compress(
    coder: Coder, images: np.ndarray, layout: str = "progressive", **options: Any
) -> bytes:
    """Returns the file of images, uint8 [N, H, W, C], and shows how far it is.

    The options are those of `progressive.encode`; an archive has none.

    Raises:
      DataError: images of another shape or type, or none.
    """
    profile, denoise = coder.profile, coder.denoise
    with bar("compressing", len(images) * len(profile.chain(layout).times)) as tick:
        if layout == "archive":
            return archive.encode(profile, denoise, images, tick=tick)
        return progressive.encode(profile, denoise, images, tick=tick, **options)


def decompress(coder: Coder, data: bytes, **options: Any) -> Decoded:
    """Returns the images of a file, or what is there of it says of them.

    The options are those of `progressive.decode`; an archive has none.

    Raises:
      DataError: no such file, another run's, or damaged.
    """
    profile, denoise = coder.profile, coder.denoise
    file = container.opened(data, profile)
    total = file.number * len(profile.chain(file.layout).times)
    with bar("decompressing", total) as tick:
        if file.layout == "archive":
            return archive.decode(profile, denoise, data, tick=tick)
        return progressive.decode(profile, denoise, data, tick=tick, **options)


def in_words(data: bytes, profile: Profile | None) -> list[str]:
    """Returns what a file says, line by line; without its profile that is less.

    Raises:
      DataError: no such file, or damaged in front of its payload.
    """
    file = container.opened(data, profile)
    there = f"{len(file.payload):,} of {file.length:,} bytes"
    said = [
        f"layout    {file.layout}, {file.number:,} image{'s' * (file.number != 1)}",
        f"profile   {file.identity.hex()}",
        f"header    {file.header} bytes",
        f"payload   {there}{', whole' if file.whole else ', cut'}",
        f"listed    {len(file.listed.place)} values of x0, {len(file.place)} pixels",
    ]
    if profile is None:
        return said
    size = file.number * int(np.prod(profile.shape))
    said.append(f"in all    {8 * len(data) / size:.3f} bits/dim")
    if file.layout == "progressive":
        said += _table(profile.progressive, file, size)
    return said


def _table(chain: Chain, file: container.File, size: int) -> list[str]:
    """Returns a line for each step: its bits, and where a cut after it would leave."""
    there = 8 * len(file.payload)
    said = ["  after   bits/image   bits/dim   RMSE (of 255)   there"]
    each = (chain.chunks * chain.bits)[::-1]
    errors = rmse(chain)[::-1]
    names = ["nothing", *(f"t = {t}" for t in chain.times[-2::-1])]
    for name, bits, error in zip(
        names, np.append(0, np.cumsum(each)), errors, strict=True
    ):
        share = bits * file.number / size
        has = "yes" if there >= bits * file.number else "no"
        said.append(f"{name:>9}{bits:11}{share:11.3f}{error:16.1f}   {has:>5}")
    all_ = 8 * file.length
    has = "yes" if file.whole else "no"
    said.append(
        f"   pixels{all_ / file.number:11.1f}{all_ / size:11.3f}{0:16.1f}   {has:>5}"
    )
    return said


def rmse(chain: Chain) -> np.ndarray:
    """Returns how far x0 is as the network sees it from x_0, ..., x_n, of 255, [n + 1].

    The root of the mean square over the images that the profile was measured on.
    """
    above = (chain.sd**2 - chain.small[:, None]) / chain.c0[:, None] ** 2
    errors = np.concatenate([chain.pixel_sd[None] ** 2, above])
    return np.asarray(127.5 * np.sqrt(errors.mean(axis=1)))
