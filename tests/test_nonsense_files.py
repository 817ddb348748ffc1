"""Files of data that make no sense: archives, arrays, images, statistics."""

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import warnings
import zipfile

import hypothesis
import nonsense
import numpy as np
import pytest
from hypothesis import strategies as st
from nonsense import cases, npy, npz, refuse

from diffusion_jax.training.formats import DataError, read_npz
from experiments import build, config, eval_fid, eval_nll, train

GREY = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
GOOD = npy(GREY)
WHOLE = npz({"images.npy": GOOD, "labels.npy": npy(np.arange(3))})
HEAD = "{{'descr': {0!r}, 'fortran_order': False, 'shape': {1}, }}\n"


def header(kind, shape, **options):
    return npz({"images.npy": npy(head=HEAD.format(kind, shape), **options)})


def raw_npz(head, **options):
    return npz({"images.npy": npy(head=head, **options)})


def packed(content, method=zipfile.ZIP_DEFLATED):
    return npz({"images.npy": content}, method)


def larger(content):
    """An archive whose directory says that its member unpacks to 2 GB."""
    return patched(content, 24, struct.pack("<I", 2**31))


def twice():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for _ in range(2):
            with warnings.catch_warnings(action="ignore"):
                archive.writestr("images.npy", GOOD)
    return file.getvalue()


def patched(content, offset, value, *, last=False):
    """An archive with some bytes of its directory replaced."""
    at = (content.rindex if last else content.index)(b"PK\x01\x02") + offset
    return content[:at] + value + content[at + len(value) :]


NPZ = {
    "empty": b"",
    "text": b"images = [0, 1, 2]",
    "zeros": bytes(4096),
    "an array alone": GOOD,
    "a pickle": pickle.dumps([1, 2, 3]),
    "no members": npz({}),
    "members of other names": npz({"a.npy": GOOD, "b.npy": GOOD}),
    "a member that climbs": npz({"../images.npy": GOOD}),
    "a member deep below that climbs": npz({"a/../../images.npy": GOOD}),
    "a member of the root": npz({"/etc/images.npy": GOOD}),
    "two members of a name": twice,
    "text as a member": npz({"images.npy": b"hello"}),
    "an empty member": npz({"images.npy": b""}),
    "a folder as a member": npz({"images/": b""}),
    "a pickle as a member": npz({"images.npy": pickle.dumps([1])}),
    "objects": lambda folder: npz({"images.npy": nonsense.objects(folder)}),
    "objects as labels": lambda folder: npz(
        {"images.npy": GOOD, "labels.npy": nonsense.objects(folder)}
    ),
    "a pickle called images": lambda folder: npz({"images": nonsense.evil(folder)}),
    "objects of no length": header("|O", (0, 8, 8, 1)),
    "a field of objects": header([("a", "|O")], (3, 8, 8, 1)),
    "fields": header([("a", "|u1")], (3, 8, 8, 1)),
    "floats": npz({"images.npy": npy(GREY.astype(np.float32))}),
    "16 bits": npz({"images.npy": npy(GREY.astype(np.uint16))}),
    "signed": npz({"images.npy": npy(GREY.astype(np.int8))}),
    "complex": npz({"images.npy": npy(GREY.astype(np.complex64))}),
    "dates": header("<M8[s]", (8,)),
    "text in an array": npz({"images.npy": npy(np.array(["a", "b"]))}),
    "no axes": npz({"images.npy": npy(np.uint8(3))}),
    "one axis": npz({"images.npy": npy(GREY.ravel())}),
    "five axes": npz({"images.npy": npy(GREY[None])}),
    "no images": npz({"images.npy": npy(GREY[:0])}),
    "images of no size": npz({"images.npy": npy(GREY[:, :0])}),
    "images larger than asked for": npz(
        {"images.npy": npy(np.tile(GREY, (1, 2, 2, 1)))}
    ),
    "wide images": npz({"images.npy": npy(GREY[:, :4])}),
    "images of RGB": npz({"images.npy": npy(GREY.repeat(3, 3))}),
    "a label too few": npz({"images.npy": GOOD, "labels.npy": npy(np.arange(2))}),
    "labels of floats": npz({"images.npy": GOOD, "labels.npy": npy(np.zeros(3))}),
    "labels beyond 32 bits": npz(
        {"images.npy": GOOD, "labels.npy": npy(np.array([1, 2, 2**40]))}
    ),
    "labels of two axes": npz(
        {"images.npy": GOOD, "labels.npy": npy(np.zeros((3, 1), int))}
    ),
    "a header of a terabyte": header("|u1", (2**40,)),
    "a header of all images there are": header("|u1", (10**9, 32, 32, 3)),
    "a header beyond all numbers": header("|u1", (2**63, 2**63)),
    "a header that comes round to 64": header("|u1", (2**58 + 1, 64)),
    "a header of less": header("|u1", (1, 4, 4, 1)),
    "a header of 4 GB for 1": header("|u1", (4, 32768, 32768, 1)),
    "a shape below 0": header("|u1", (-1, 8, 8, 1)),
    "a shape below 0 twice": header("|u1", (-1, -64)),
    "a shape of a fraction": header("|u1", (1.5, 8)),
    "a shape of text": header("|u1", ("a",)),
    "a shape of truth": header("|u1", (True, 64)),
    "no shape": raw_npz("{'descr': '|u1', 'fortran_order': False}\n"),
    "a header of no words": raw_npz(""),
    "a header that does not end": raw_npz("{'descr': (((((((((((\n"),
    "a header of brackets": raw_npz("(" * 9000),
    "a header of a call": lambda folder: raw_npz(
        f"__import__('os').mkdir({str(folder / 'canary')!r})\n"
    ),
    "a header of a calculation": raw_npz("{'shape': 9**9**9}\n"),
    "a header of bytes of no text": raw_npz(b"\xff\xfe" * 20),
    "a type of no name": header("nonsense", (8,)),
    "a type of 2 GB": header("|V2147483647", (4,)),
    "a version of its own": header("|u1", (64,), version=b"\x09\0"),
    "a version of named fields": header("|u1", (64,), version=b"\3\0"),
    "a header longer than the file": npz(
        {"images.npy": b"\x93NUMPY\2\0" + struct.pack("<I", 2**31 - 1) + bytes(64)}
    ),
    "a bomb of zeros": lambda _: packed(bomb_npy(2**28 + 64)),
    "a bomb by bzip2": lambda _: larger(packed(bomb_npy(2**20), zipfile.ZIP_BZIP2)),
    "a bomb by xz": lambda _: larger(packed(bomb_npy(2**20), zipfile.ZIP_LZMA)),
    "a directory of other sizes": patched(WHOLE, 24, struct.pack("<I", 5)),
    "a directory of huge sizes": patched(WHOLE, 20, b"\xfe\xff\xff\xff" * 2),
    "a directory of another place": patched(WHOLE, 42, struct.pack("<I", 10**6)),
    "a packing of no name": patched(WHOLE, 10, b"\x63\0"),
    "encrypted": patched(WHOLE, 8, b"\1\0"),
    "a checksum of another file": patched(WHOLE, 16, b"abcd"),
    "a directory alone": WHOLE[WHOLE.index(b"PK\x01\x02") :],
    "no directory": WHOLE[: WHOLE.index(b"PK\x01\x02")],
}
IDX_HEAD = b"\0\0\x08\x03" + struct.pack(">3I", 3, 8, 8)
IDX = {
    "empty": b"",
    "two bytes": b"\0\0",
    "text": b"MNIST, honestly",
    "of floats": b"\0\0\x0d\x03" + IDX_HEAD[4:] + bytes(4 * 192),
    "no axes": b"\0\0\x08\0" + bytes(64),
    "too many axes": b"\0\0\x08\xff" + bytes(2000),
    "axes cut off": IDX_HEAD[:9],
    "cut off": IDX_HEAD + bytes(100),
    "too long": IDX_HEAD + bytes(500),
    "images of no size": b"\0\0\x08\x03" + struct.pack(">3I", 3, 0, 8),
    "no images": b"\0\0\x08\x03" + struct.pack(">3I", 0, 8, 8),
    "one axis": b"\0\0\x08\1" + struct.pack(">I", 64) + bytes(64),
    "a header of all memory": b"\0\0\x08\x04" + b"\xff" * 16 + bytes(100),
    "a header of 60 GB": b"\0\0\x08\x03" + struct.pack(">3I", 10**8, 28, 28),
    "gzip cut off": gzip.compress(IDX_HEAD + bytes(192))[:20],
    "gzip of text": gzip.compress(b"hello"),
    "gzip with a wrong checksum": gzip.compress(IDX_HEAD + bytes(192))[:-8] + bytes(8),
    "gzip of nothing": b"\x1f\x8b",
    "gzip of a bomb": lambda _: (
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2**20, 64, 64), 1)
        + gzip.compress(bytes(2**28)) * 16
    ),
    "gzip of a lying header": gzip.compress(b"\0\0\x08\x04" + b"\xff" * 16),
}


def bomb_npy(count):
    return npy(head=HEAD.format("|u1", (count // 64, 8, 8, 1)))[:-64] + bytes(count)


def member(name="cifar-10-batches-bin/test_batch.bin", size=0, **fields):
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def tar(*members, opener=gzip.compress, form=tarfile.PAX_FORMAT):
    """A packed archive of (TarInfo or a name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in members:
            info = member(name) if isinstance(name, str) else name
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return opener(file.getvalue())


def python(content):
    """An archive with a pickle for a batch."""
    raw = content if isinstance(content, bytes) else pickle.dumps(content, 2)
    return tar(("cifar-10-batches-py/test_batch", raw))


def lying(size):
    """An archive whose only member says that it is larger than what follows."""
    info = member(size=size)
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))


def linked(kind, target):
    info = member(type=kind, linkname=target)
    return gzip.compress(info.tobuf() + bytes(1024))


def nested(depth, width=10):
    found: list = [1] * width
    for _ in range(depth):
        found = [found] * width
    return found


def array_of(*state, kind=b"u1"):
    """A pickle of a batch whose array has the state of one's choice, as code for it."""
    push = pickle.dumps(state, 2)[2:-1]
    return (
        b"\x80\x02}(U\x04data"
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R"
        + push
        + b"bU\x06labels]K\1au."
    )


BATCH = "cifar-10-batches-bin/test_batch.bin"
RECORD = bytes([7]) + bytes(3072)
CIFAR = {
    "empty": b"",
    "text": b"not an archive",
    "zeros": bytes(10_240),
    "gzip of text": gzip.compress(b"hello"),
    "gzip cut off": tar((BATCH, RECORD * 5))[:60],
    "gzip with a wrong checksum": tar((BATCH, RECORD * 5))[:-8] + bytes(8),
    "bzip2 cut off": tar((BATCH, RECORD * 5), opener=bz2.compress)[:40],
    "xz cut off": tar((BATCH, RECORD * 5), opener=lzma.compress)[:60],
    "a zip": npz({BATCH: RECORD}),
    "no members": tar(),
    "a member that climbs": tar((f"../{BATCH}", RECORD)),
    "a member of the root": tar((f"/{BATCH}", RECORD)),
    "a member that climbs inside": tar(
        ("cifar-10-batches-bin/../../test_batch.bin", RECORD)
    ),
    "a member in another folder": tar(("test_batch.bin", RECORD)),
    "a symbolic link": linked(tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": linked(tarfile.LNKTYPE, "/etc/passwd"),
    "a hard link to itself": linked(tarfile.LNKTYPE, BATCH),
    "a device": linked(tarfile.CHRTYPE, ""),
    "a block device": linked(tarfile.BLKTYPE, ""),
    "a pipe": linked(tarfile.FIFOTYPE, ""),
    "a folder": linked(tarfile.DIRTYPE, ""),
    "a member of 8 GB that is not there": lying(2**33 - 1),
    "a member of 60 MB that is not there": lying(60 * 2**20),
    "a record cut off": tar((BATCH, RECORD[:-1])),
    "no records": tar((BATCH, b"")),
    "a label of 200": tar((BATCH, bytes([200]) + bytes(3072))),
    "a bomb of a member": lambda _: tar((BATCH, bytes(100 * 2**20))),
    "a bomb beside it": lambda _: bomb_tar(),
    "a bomb of members": lambda _: gzip.compress(
        b"".join(member(f"m{i}").tobuf() for i in range(5000))
    ),
    "a bomb of a name": lambda _: (
        gzip.compress(
            member("././@LongLink", size=2**33 - 1, type=b"L").tobuf(tarfile.GNU_FORMAT)
        )
        + gzip.compress(bytes(2**26)) * 30
    ),
    "a bomb of words": lambda _: (
        gzip.compress(
            member("pax", size=2**33 - 1, type=b"x").tobuf(tarfile.GNU_FORMAT)
        )
        + gzip.compress(b"9" * 2**26) * 30
    ),
    "a pickle cut off": python(b"\x80\x02}q\x00(U\x04data"),
    "a pickle of nothing": python(b""),
    "a pickle of text": python(b"hello"),
    "a pickle of a list": python([1, 2, 3]),
    "a pickle without labels": python({b"data": b""}),
    "a pickle of a number for data": python({b"data": 5, b"labels": [1]}),
    "a pickle of code": lambda folder: python(nonsense.evil(folder)),
    "a pickle of code, protocol 0": lambda folder: python(nonsense.evil(folder, 0)),
    "a pickle of code, protocol 5": lambda folder: python(nonsense.evil(folder, 5)),
    "a pickle of eval": python(b"cbuiltins\neval\n(S'1'\ntR."),
    "a pickle of getattr": python(b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'x'\ntR."),
    "a pickle of an extension": python(b"\x80\x02\x82\x01."),
    "a pickle of a persistent object": python(b"Pname\n."),
    "a pickle of numpy's own code": python(
        b"cnumpy.testing\nrundocs\n(S'/etc/passwd'\ntR."
    ),
    "a pickle of labels in labels": python({b"data": b"", b"labels": nested(30)}),
    "a pickle of labels of text": array_of(1, (1, 3072), None, False, b"x"),
    "a pickle of objects": python(
        pickle.dumps({b"data": np.array([[1]], object), b"labels": [1]}, 2)
    ),
    "a pickle of floats": python(
        pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}, 2)
    ),
    "a pickle of bytes by number": lambda _: python(by_number(10**12)),
    "a pickle of a huge shape": lambda _: python(by_shape((2**40, 3072))),
    "a pickle of a shape below 0": lambda _: python(by_shape((-1, 3072))),
    "a pickle with a far place": python(b"\x80\x02]r\xff\xff\xff\x7f."),
    "a pickle with a farther place": python(b"]p99999999999\n."),
    "a pickle of many steps": lambda _: python(b"\x80\x02(" + b"}" * 5_000_000 + b"t."),
    "a pickle of bytes that are not there": python(b"\x80\x04\x8e" + b"\xff" * 8),
    "a pickle of a text that is not there": python(b"\x80\x02X\xff\xff\xff\x7f."),
    "a pickle without an end": python(b"\x80\x02" + b"(" * 50_000),
    "a pickle of a stack that is empty": python(b"\x80\x02R."),
    "a pickle of protocol 200": python(b"\x80\xc8."),
}


def by_number(count):
    """A pickle of an array whose bytes are a number: so many zeros, to the naive."""
    return (
        b"\x80\x02}(C\x04datacnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x01M\x00\x0c\x86"
        b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89"
        + pickle.dumps(count, 2)[2:-1]
        + b"tbC\x06labels]K\x01au."
    )


def by_shape(shape):
    return (
        b"\x80\x02}(C\x04datacnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"
        + pickle.dumps(shape, 2)[2:-1]
        + b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89C\x04abcd"
        + b"tbC\x06labels]K\x01au."
    )


def bomb_tar():
    """Half a gigabyte of zeros, packed, before the member that is wanted."""
    zeros = gzip.compress(bytes(2**24))
    head = member("readme.html", size=2**29).tobuf(tarfile.GNU_FORMAT)
    return gzip.compress(head) + zeros * 32 + tar((BATCH, RECORD))


MU, SIGMA = npy(np.zeros(64)), npy(np.eye(64))


def statistics(**arrays):
    members = {"mu.npy": MU, "sigma.npy": SIGMA}
    for name, value in arrays.items():
        members[f"{name}.npy"] = value if isinstance(value, bytes) else npy(value)
    return npz(members)


REFERENCE = {
    "empty": b"",
    "text": b"mu and sigma",
    "no mean": npz({"sigma.npy": SIGMA}),
    "no covariance": npz({"mu.npy": MU}),
    "a mean of two axes": statistics(mu=np.zeros((8, 8))),
    "a mean of nothing": statistics(mu=np.zeros(0), sigma=np.zeros((0, 0))),
    "a covariance of another size": statistics(sigma=np.eye(5)),
    "a mean nan": statistics(mu=np.full(64, np.nan)),
    "a covariance of infinity": statistics(sigma=np.full((64, 64), np.inf)),
    "a covariance not symmetric": statistics(sigma=np.triu(np.ones((64, 64)))),
    "a covariance below 0": statistics(sigma=-np.eye(64)),
    "complex": statistics(mu=np.zeros(64, complex)),
    "text in it": statistics(mu=np.array(["a"] * 64)),
    "truth in it": statistics(mu=np.zeros(64, bool)),
    "dates in it": statistics(mu=np.zeros(64, "M8[s]")),
    "objects": lambda folder: statistics(mu=nonsense.objects(folder)),
    "a huge header": statistics(mu=npy(head=HEAD.format("<f8", (2**40,)))),
    "a bomb": lambda _: npz(
        {
            "mu.npy": MU,
            "sigma.npy": npy(head=HEAD.format("<f8", (6000, 6000)))[:-64]
            + bytes(8 * 6000**2),
        },
        zipfile.ZIP_DEFLATED,
    ),
}
CASES = [
    *cases("npz of data", NPZ),
    *cases("IDX file", IDX),
    *cases("CIFAR-10 archive", CIFAR),
    *cases("reference statistics", REFERENCE),
]
OF = {
    kind: [case for case in CASES if case.kind == kind]
    for kind in ("npz of data", "IDX file", "CIFAR-10 archive", "reference statistics")
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The files of networks: of small grey images, and of CIFAR-10's."""
    folder = tmp_path_factory.mktemp("networks")
    large = config.replace(nonsense.SMALL, "data", image_size=32, channels=3)
    return {
        8: nonsense.write_network(folder / "small.safetensors"),
        32: nonsense.write_network(folder / "large.safetensors", large),
    }


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path_factory, monkeypatch):
    """No cache or data of this machine's is reached."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / "nowhere"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def put(case, path):
    """Writes a case's content into a file, which is returned."""
    made = case.make
    if callable(made):
        made = made(path.parent) if made.__code__.co_argcount else made()
    path.write_bytes(made)
    return path


@pytest.mark.parametrize("case", OF["npz of data"], ids=str)
def test_arrays_are_refused(case, networks, tmp_path):
    path = put(case, tmp_path / "a.npz")
    said = refuse(eval_nll.main, [networks[8], "--data", f"npz:{path}"], tmp_path)
    assert "a.npz" in said
    if "size" not in case.name:  # which is another check there
        refuse(
            eval_fid.main,
            [networks[8], "--data", "digits", "--samples", f"npz:{path}"],
            tmp_path,
            several=True,
        )


@pytest.mark.parametrize("case", OF["IDX file"], ids=str)
def test_idx_files_are_refused(case, networks, tmp_path):
    path = put(case, tmp_path / "a-ubyte")
    said = refuse(eval_nll.main, [networks[8], "--data", f"idx:{path}"], tmp_path)
    assert "a-ubyte" in said


@pytest.mark.parametrize("case", OF["CIFAR-10 archive"], ids=str)
def test_archives_are_refused(case, tmp_path):
    """The test batch alone is looked for: of one, an archive is quickly made."""
    path = put(case, tmp_path / "cifar.tar.gz")

    def main(argv):
        cfg = config.Config(data=config.Data("cifar10", str(path), 32, 3))
        build.load_data(cfg, split="test")
        return 0

    said = refuse(main, [], tmp_path)
    assert "cifar.tar.gz" in said
    if nonsense.THOROUGH or "bomb" not in case.name:  # which take seconds to unpack
        argv = ["cifar10", "--data.path", path, "--output", tmp_path / "runs"]
        refuse(train.main, argv, tmp_path, several=True)


@pytest.mark.parametrize("case", OF["reference statistics"], ids=str)
def test_statistics_are_refused(case, networks, tmp_path):
    path = put(case, tmp_path / "stats.npz")
    argv = [networks[8], "--data", "digits", "--reference", path]
    said = refuse(eval_fid.main, argv, tmp_path, several=True)
    assert "stats.npz" in said


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
