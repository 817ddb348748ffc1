"""Archives: what unpacks to more than it may is refused, and honest data are not."""

import gzip
import io
import tarfile

import pytest

from diffusion_jax.storage import archives


def tar(size, name="one"):
    """An archive of one file."""
    packed, info = io.BytesIO(), tarfile.TarInfo(name)
    info.size = size
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(info, io.BytesIO(bytes(size)))
    return packed.getvalue()


def read(content, most=2**21):
    return archives.read_tar(io.BytesIO(content), lambda name: True, most=most)


def test_more_than_it_may_have_is_refused():
    whole = tar(5000)
    assert read(whole, len(whole)) == {"one": bytes(5000)}
    for packed in (whole, gzip.compress(whole)):
        with pytest.raises(archives.ArchiveError, match=r"more than \d+ bytes"):
            read(packed, len(whole) - 1)
    # A header counts too: one may have a name as long as it likes.
    with pytest.raises(archives.ArchiveError, match="more than 100000 bytes"):
        read(gzip.compress(tar(1, name="x" * 200_000)), 100_000)


# The second fills the pieces that are read to the last byte.
@pytest.mark.parametrize("size", [5000, 1_300_000])
def test_the_checksum_at_the_end_is_looked_at(size):
    packed = bytearray(gzip.compress(tar(size)))
    assert read(packed) == {"one": bytes(size)}
    packed[-8] ^= 1
    with pytest.raises(archives.ArchiveError, match="CRC"):
        read(packed)


def test_pictures_of_plain_shapes_are_no_bomb():
    archives.check_packed(3_020_000_000, 26_700_000, "an array")
    with pytest.raises(archives.ArchiveError, match="as no data do"):
        archives.check_packed(2**30, 2**20, "an array")
