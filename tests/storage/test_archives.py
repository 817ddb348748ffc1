"""Archives: what unpacks to more than it may is refused, and honest data are not."""

import gzip
import io
import tarfile

import pytest

from diffusion_jax.storage import archives


def tar(size, **headers):
    """An archive of one member."""
    file, info = io.BytesIO(), tarfile.TarInfo("one")
    info.size, info.pax_headers = size, headers
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(bytes(size)))
    return io.BytesIO(file.getvalue())


def read(file, **bounds):
    wanted = {"most": 2**20, "total": 2**20} | bounds
    return archives.read_tar(file, lambda name: True, **wanted)


def test_a_member_comes_out_whole():
    assert read(tar(5000)) == {"one": bytes(5000)}


def test_holes_of_sparse_members_are_not_filled():
    about = {"size": "30000", "numblocks": "1", "map": "0,0"}
    sparse = {f"GNU.sparse.{name}": value for name, value in about.items()}
    assert read(tar(0, **sparse)) == {}


@pytest.mark.parametrize("bounds", [{"most": 4999}, {"total": 4999}], ids=str)
def test_more_than_it_may_have_is_refused(bounds):
    with pytest.raises(archives.ArchiveError, match="4999"):
        read(tar(5000), **bounds)


# The second fills the pieces that are read to the last byte.
@pytest.mark.parametrize("size", [5000, 1_300_000])
def test_the_checksum_at_the_end_is_looked_at(size):
    packed = bytearray(gzip.compress(tar(size).getvalue()))
    bounds = {"most": 2**21, "total": 2**21}
    assert read(io.BytesIO(packed), **bounds) == {"one": bytes(size)}
    packed[-8] ^= 1
    with pytest.raises(archives.ArchiveError, match="CRC"):
        read(io.BytesIO(packed), **bounds)


def test_a_name_stands_for_one_member():
    one = tar(10).getvalue()[:1024]
    with pytest.raises(archives.ArchiveError, match="two members named one"):
        read(io.BytesIO(one + one + bytes(1024)))


def test_pictures_of_plain_shapes_are_no_bomb():
    archives.check_packed(3_020_000_000, 26_700_000, "an array")
    with pytest.raises(archives.ArchiveError, match="as no data do"):
        archives.check_packed(2**30, 2**20, "an array")
