"""Archives that may come from anywhere: read in memory, and no more than they may hold.

Nothing is ever extracted, so no member can leave a folder. What an archive says of the
size of its content is checked before room is made for it, and what unpacks to more than
data do is refused: pictures of plain shapes shrink to a hundredth, zeros to a
thousandth.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

# Members of an archive, of which an official one has nine.
_MOST_MEMBERS = 1000
# Unpacked bytes that are too few to be a bomb, and how much smaller data may be packed.
_SMALL, _LEAST_SHARE = 2**28, 200
_PACKED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))


class ArchiveError(ValueError):
    """What an archive is, in place of what it must be: a few words."""


def read_tar(
    file: IO[bytes], wanted: Callable[[str], bool], *, most: int, total: int
) -> dict[str, bytes]:
    """Returns the regular members of a tar archive that are wanted, by their names.

    Links, devices, sparse files and all others are passed over.

    Args:
      file: the archive, plain or packed by gzip, bzip2 or xz, at its beginning.
      wanted: whether a member of some name is.
      most: bytes that a wanted member may have.
      total: bytes that the archive may have, unpacked.

    Raises:
      ArchiveError: it is damaged or holds more.
    """
    found: dict[str, bytes] = {}
    with _one_error():
        magic = file.read(6)
        file.seek(0)
        opener = next((o for m, o in _PACKED if magic.startswith(m)), None)
        with opener(file) if opener else contextlib.nullcontext(file) as unpacked:
            stream = _Bounded(unpacked, total)
            # One pass: what is skipped is counted too.
            with tarfile.open(fileobj=stream, mode="r|", bufsize=2**18) as archive:  # type: ignore[call-overload]
                for count, member in enumerate(archive, start=1):
                    if count > _MOST_MEMBERS:
                        raise ArchiveError(f"more than {_MOST_MEMBERS} members")
                    # A sparse one unpacks to holes that nobody has counted.
                    plain = member.isreg() and not member.issparse()
                    if not plain or not wanted(member.name):
                        continue
                    if member.name in found:
                        raise ArchiveError(f"two members named {member.name}")
                    if member.size > most:
                        raise ArchiveError(
                            f"{member.name} of {member.size} bytes, not at most {most}"
                        )
                    content = archive.extractfile(member)
                    found[member.name] = content.read() if content else b""
            while stream.read(2**20):  # whose end has the checksum of all
                pass
    return found


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Makes an ArchiveError of all that packings, zip, tar, NumPy and Python raise."""
    try:
        yield
    except ArchiveError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise ArchiveError(said) from error


class _Bounded:
    """A stream that ends in an error where it has more than it may have."""

    def __init__(self, file: Any, most: int) -> None:
        self.file, self.left, self.most = file, most, most

    def read(self, size: int) -> bytes:
        content: bytes = self.file.read(min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise ArchiveError(f"more than {self.most} bytes, unpacked")
        return content


def check_packed(unpacked: int, packed: int, what: str) -> None:
    """Raises ArchiveError where data would be far smaller packed than data ever are."""
    if unpacked > max(_SMALL, _LEAST_SHARE * packed):
        raise ArchiveError(
            f"{what} that unpacks from {packed} to {unpacked} bytes, as no data do"
        )


def read_npz(
    path: str | os.PathLike[str], choose: Callable[[list[str]], Sequence[str]]
) -> dict[str, np.ndarray]:
    """Returns arrays of an .npz file by name. Pickles in it are never opened.

    Args:
      path: the file.
      choose: from the names of all arrays to those to read.

    Raises:
      ArchiveError: it is no such file, or damaged, or lacks an array, or one is of
        objects, or its header promises other than is there.
      FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ArchiveError("no regular file")
    with path.open("rb") as file, _one_error(), zipfile.ZipFile(file) as archive:
        infos: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in infos:
                raise ArchiveError(f"two members named {name}")
            infos[name] = info
        chosen = choose(list(infos))
        if missing := [name for name in chosen if name not in infos]:
            raise ArchiveError(f"no {' and no '.join(missing)}")
        length = path.stat().st_size
        return {name: _array(archive, infos[name], length) for name in chosen}


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, length: int) -> np.ndarray:
    check_packed(info.file_size, min(info.compress_size, length), info.filename)
    with archive.open(info) as stream:
        # It makes room for what a header promises, but fills none that is not there.
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
        # At its end the checksum is looked at.
        if stream.read(1):
            raise ArchiveError(f"{info.filename} with more than its array")
    return array
