"""Archives that may come from anywhere: read in memory, never extracted.

What an archive says of the size of its content is checked before room is made for it.
"""

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

# Unpacked bytes that are too few to be a bomb, and how much smaller data may be packed:
# pictures of plain shapes shrink to a hundredth, zeros to a thousandth.
_SMALL, _LEAST_SHARE = 2**28, 200
# Members of an archive, of which an official one has nine.
_MOST_MEMBERS = 1000
_PACKED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))


class ArchiveError(ValueError):
    """An archive is damaged, too large or of another kind; says which, in few words."""


def read_tar(
    file: IO[bytes], wanted: Callable[[str], bool], *, most: int
) -> dict[str, bytes]:
    """Returns the regular files in a tar archive that are wanted, by their names.

    Args:
      file: the archive, plain or packed by gzip, bzip2 or xz.
      wanted: whether a member of some name is.
      most: bytes that the archive may have, unpacked.

    Raises:
      ArchiveError: it is damaged or holds more.
    """
    found: dict[str, bytes] = {}
    with _one_error(), _unpacked(file) as unpacked:
        stream = _Bounded(unpacked, most)
        # One pass: what is skipped is counted too, and so are headers.
        with tarfile.open(fileobj=stream, mode="r|", bufsize=2**18) as archive:  # type: ignore[call-overload]
            for count, member in enumerate(archive):
                if count >= _MOST_MEMBERS or member.name in found:
                    raise ArchiveError("a name twice, or too many members")
                if member.isreg() and wanted(member.name):
                    content = archive.extractfile(member)
                    found[member.name] = content.read() if content else b""
        while stream.read(2**20):
            pass  # at the end the checksum is compared
    return found


def _unpacked(file: IO[bytes]) -> contextlib.AbstractContextManager[Any]:
    magic = file.read(6)
    file.seek(0)
    opener = next((o for m, o in _PACKED if magic.startswith(m)), None)
    return opener(file) if opener else contextlib.nullcontext(file)


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


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Makes an ArchiveError of what the packings, zip, tar, NumPy and Python raise."""
    try:
        yield
    except (ArchiveError, FileNotFoundError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise ArchiveError(said) from error


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
    if Path(path).exists() and not Path(path).is_file():  # a pipe may have no end
        raise ArchiveError("no regular file")
    with _one_error(), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        infos = {info.filename.removesuffix(".npy"): info for info in members}
        if len(infos) < len(members):
            raise ArchiveError("two members of one name")
        chosen = choose(list(infos))
        if missing := [name for name in chosen if name not in infos]:
            raise ArchiveError(f"no {' and no '.join(missing)}")
        length = Path(path).stat().st_size
        return {name: _array(archive, infos[name], length) for name in chosen}


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, length: int) -> np.ndarray:
    check_packed(info.file_size, min(info.compress_size, length), info.filename)
    with archive.open(info) as stream:
        # NumPy makes room for what the header promises, and reads what is there.
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):  # which compares the checksum, at the end
            raise ArchiveError(f"{info.filename} with more than its array")
    return array
