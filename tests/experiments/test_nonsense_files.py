"""Files of data that make no sense: archives, arrays, images, statistics."""

import bz2
import functools
import gzip
import lzma
import pickle
import struct
import tarfile
import zipfile

import hypothesis
import nonsense
import numpy as np
import pytest
from hypothesis import strategies as st
from nonsense import npy, npz

from diffusion_jax.data.sources import read_npz
from diffusion_jax.errors import DataError
from diffusion_jax.evaluation import moments
from diffusion_jax.lab.schema import config
from diffusion_jax.lab.wiring import build

GREY = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
GOOD = npy(GREY)
WHOLE = npz({"images.npy": GOOD, "labels.npy": npy(np.arange(3))})
HEAD = "{{'descr': {0!r}, 'fortran_order': False, 'shape': {1}, }}\n"


def raw_npz(head, **options):
    return npz({"images.npy": npy(head=head, **options)})


def header(kind, shape, **options):
    return raw_npz(HEAD.format(kind, shape), **options)


def patched(content, offset, value):
    """An archive with some bytes of its directory replaced."""
    at = content.index(b"PK\x01\x02") + offset
    return content[:at] + value + content[at + len(value) :]


NPZ = {
    "large images": npz({"images.npy": npy(np.tile(GREY, (1, 2, 2, 1)))}),
    "two members of a name": npz({"images.npy": GOOD, "imagez.npy": GOOD}).replace(
        b"imagez", b"images"
    ),
    "text as a member": npz({"images.npy": b"hello"}),
    "objects": lambda folder: npz({"images.npy": nonsense.objects(folder)}),
    "a pickle called images": lambda folder: npz({"images": nonsense.evil(folder)}),
    "objects of no length": header("|O", (0, 8, 8, 1)),
    "a field of objects": header([("a", "|O")], (3, 8, 8, 1)),
    "fields": header([("a", "|u1")], (3, 8, 8, 1)),
    "a header of all images there are": header("|u1", (10**9, 32, 32, 3)),
    "a header that comes round to 64": header("|u1", (2**58 + 1, 64)),
    "a header of less": header("|u1", (1, 4, 4, 1)),
    "a shape below 0 twice": header("|u1", (-1, -64)),
    "a shape of truth": header("|u1", (True, 64)),
    "a header of brackets": raw_npz("(" * 9000),
    "a header of a call": lambda folder: raw_npz(
        f"__import__('os').mkdir({str(folder / 'canary')!r})\n"
    ),
    "a header of a calculation": raw_npz("{'shape': 9**9**9}\n"),
    "a type of 2 GB": header("|V2147483647", (4,)),
    "a version of its own": header("|u1", (64,), version=b"\x09\0"),
    "a header longer than the file": npz(
        {"images.npy": b"\x93NUMPY\2\0" + struct.pack("<I", 2**31 - 1) + bytes(64)}
    ),
    "a bomb of zeros": lambda _: npz(
        {"images.npy": npy(np.zeros((2**22 + 1, 8, 8, 1), np.uint8))},
        zipfile.ZIP_DEFLATED,
    ),
    "a directory of other sizes": patched(WHOLE, 24, struct.pack("<I", 5)),
    "a directory of huge sizes": patched(WHOLE, 20, b"\xfe\xff\xff\xff" * 2),
    "a directory of another place": patched(WHOLE, 42, struct.pack("<I", 10**6)),
    "a packing of no name": patched(WHOLE, 10, b"\x63\0"),
    "encrypted": patched(WHOLE, 8, b"\1\0"),
    "a checksum of another file": patched(WHOLE, 16, b"abcd"),
    "a directory alone": WHOLE[WHOLE.index(b"PK\x01\x02") :],
}
IDX_HEAD = b"\0\0\x08\x03" + struct.pack(">3I", 3, 8, 8)
IDX = {
    "no axes": b"\0\0\x08\0" + bytes(64),
    "too many axes": b"\0\0\x08\xff" + bytes(2000),
    "images of no size": b"\0\0\x08\x03" + struct.pack(">3I", 3, 0, 8),
    "one axis": b"\0\0\x08\1" + struct.pack(">I", 64) + bytes(64),
    "gzip with a wrong checksum": gzip.compress(IDX_HEAD + bytes(192))[:-8] + bytes(8),
    "gzip of nothing": b"\x1f\x8b",
    "gzip of a bomb": lambda _: (
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2**20, 64, 64), 1)
        + gzip.compress(bytes(2**28)) * 16
    ),
    "gzip of a lying header": gzip.compress(b"\0\0\x08\x04" + b"\xff" * 16),
}


BATCH = "cifar-10-batches-bin/test_batch.bin"


def head(name=BATCH, **fields):
    """The head of a member of a tar archive."""
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def tar(content, name=BATCH, pack=gzip.compress):
    """A packed archive of one member."""
    filled = content + bytes(-len(content) % 512 + 1024)
    return pack(head(name, size=len(content)) + filled)


def python(content):
    """An archive with a pickle for a batch."""
    return tar(content, "cifar-10-batches-py/test_batch")


def array(raw=b"abcd", shape=(1, 3072)):
    """A pickle of a batch whose array has any bytes, or none, and any shape."""
    return python(
        b"\x80\x02}(C\x04datacnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"
        + pickle.dumps(shape, 2)[2:-1]
        + b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89"
        + pickle.dumps(raw, 3)[2:-1]
        + b"tbC\x06labels]K\x01au."
    )


DEEP = functools.reduce(lambda found, _: [found] * 10, range(30), [1] * 10)
LABELS = pickle.dumps({b"data": b"", b"labels": DEEP}, 2)
CIFAR = {
    "bzip2 cut off": tar(bytes(3073), pack=bz2.compress)[:40],
    "xz cut off": tar(bytes(3073), pack=lzma.compress)[:60],
    "a hard link to itself": gzip.compress(
        head(type=tarfile.LNKTYPE, linkname=BATCH) + bytes(1024)
    ),
    "a device": gzip.compress(head(type=tarfile.CHRTYPE) + bytes(1024)),
    "a member of 65 MB": gzip.compress(head(size=65 * 2**20) + bytes(4096)),
    "a member of 60 MB that is not there": gzip.compress(
        head(size=60 * 2**20) + bytes(4096)
    ),
    "a bomb beside it": lambda _: (
        gzip.compress(head("readme.html", size=2**29))
        + gzip.compress(bytes(2**24)) * 32
    ),
    "a bomb of members": lambda _: gzip.compress(
        b"".join(head(f"m{i}") for i in range(5000))
    ),
    "a bomb of a name": lambda _: (
        gzip.compress(head("././@LongLink", size=2**33 - 1, type=b"L"))
        + gzip.compress(bytes(2**26)) * 30
    ),
    "a pickle of code": lambda folder: python(nonsense.evil(folder)),
    "a pickle of an extension": python(b"\x80\x02\x82\x01."),
    "a pickle of a persistent object": python(b"Pname\n."),
    "a pickle of labels in labels": python(LABELS),
    "a pickle of bytes by number": array(10**12),
    "a pickle of a huge shape": array(shape=(2**40, 3072)),
    "a pickle with a far place": python(b"\x80\x02]r\xff\xff\xff\x7f."),
    "a pickle with a farther place": python(b"]p99999999999\n."),
    "a pickle of many steps": lambda _: python(b"\x80\x02(" + b"}" * 5_000_000 + b"t."),
    "a pickle of bytes that are not there": python(b"\x80\x04\x8e" + b"\xff" * 8),
}


def statistics(mu=np.zeros(64), sigma=np.eye(64)):  # noqa: B008
    return npz({"mu.npy": npy(mu), "sigma.npy": npy(sigma)})


REFERENCE = {
    "no mean": npz({"sigma.npy": npy(np.eye(64))}),
    "a mean of two axes": statistics(mu=np.zeros((8, 8))),
    "a mean of nothing": statistics(mu=np.zeros(0), sigma=np.zeros((0, 0))),
    "a mean nan": statistics(mu=np.full(64, np.nan)),
    "a covariance not symmetric": statistics(sigma=np.triu(np.ones((64, 64)))),
    "a covariance below 0": statistics(sigma=-np.eye(64)),
    "complex": statistics(mu=np.zeros(64, complex)),
}
TABLES = {"a.npz": NPZ, "a-ubyte": IDX, "cifar.tar.gz": CIFAR, "stats.npz": REFERENCE}
CASES = [(file, name) for file, table in TABLES.items() for name in table]


def read(path):
    """What the commands read of a file; of CIFAR-10 the test batch, soon made."""
    if path.name == "stats.npz":
        return moments.load_reference(path)
    if path.name == "cifar.tar.gz":
        cfg = config.Config(data=config.Data("cifar10", str(path), 32, 3))
        return build.load_data(cfg, split="test")
    kind = "npz" if path.suffix else "idx"
    return build.load_data(config.Config(data=config.Data(f"{kind}:{path}")))


@pytest.mark.parametrize(("file", "name"), CASES)
def test_files_are_refused(file, name, tmp_path):
    nonsense.refuse_file(read, TABLES[file][name], tmp_path / file)


@nonsense.PROFILE
@hypothesis.given(
    cut=st.integers(0, len(WHOLE) - 1), flips=st.lists(st.integers(0, len(WHOLE) - 1))
)
def test_damaged_arrays_are_the_same_or_refused(cut, flips, tmp_path_factory):
    """Cut anywhere, or with any bytes changed: never something else, silently."""
    whole = bytearray(WHOLE)
    for at in flips:
        whole[at] ^= 1 << (at % 8)
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    for content in (bytes(whole[:cut]), bytes(whole)):
        path.write_bytes(content)
        try:
            images, labels = read_npz(path)
        except DataError as error:
            nonsense.check_words(f"error: {error}")
        else:  # in what a reader passes over
            np.testing.assert_array_equal(images, GREY)
            assert labels is None or labels.tolist() == [0, 1, 2]
