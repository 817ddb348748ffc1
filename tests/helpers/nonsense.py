"""What a command does with nonsense: one named error, and nothing else at all.

`refuse` gives it to the real command or to a reader, in this process and through
`arguments.guarded`, and holds it to all that is promised: exit code 2, one error that
says what must hold, what was got and what to do, no traceback, no file made, changed or
removed, nothing executed, and neither the memory nor the time that a lying header asks
for.

More examples of the random ones: HYPOTHESIS_PROFILE=torture.
"""

import contextlib
import importlib
import io
import json
import os
import pickle
import re
import resource
import shlex
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np

from diffusion_jax.lab.network_files import networks
from diffusion_jax.lab.network_files.records import About, Network
from diffusion_jax.lab.process import entry
from diffusion_jax.lab.schema import config
from diffusion_jax.lab.wiring import build
from diffusion_jax.training import compilation

# Examples are few where every change waits for them, and many where there is time.
_SAME = {
    "deadline": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
    "database": None,
}
hypothesis.settings.register_profile("quick", max_examples=15, **_SAME)
hypothesis.settings.register_profile("torture", max_examples=400, **_SAME)
_NAME = os.environ.get("HYPOTHESIS_PROFILE", "quick")
PROFILE = hypothesis.settings.get_profile(_NAME)

ROOM = 2**30
"""Bytes of address space that a refusal may take beyond what the process has: a lying
header that is believed asks for more."""
PATIENCE = 10
"""Seconds of processor time that a refusal may take, on a busy machine."""

Content = bytes | Callable[[Path], bytes]
"""Of a file; or what makes it, told the folder."""
SEVERAL = ("eval_fid", "sample", "train")
"""Commands that work on several hosts."""
SMALL = config.replace(
    config.replace(config.Config(), "data", image_size=8),
    "net",
    channels=8,
    multipliers=(1,),
    blocks=1,
    attention=(),
    groups=4,
)
"""A network of 50 KB."""


def refuse(
    main: Callable[..., int], argv: list[Any], folder: Path, *, several: bool = False
) -> str:
    """Returns the error with which a command refused; fails where it did anything else.

    Args:
      main: of the command.
      argv: its arguments.
      folder: which holds all that the command can reach, and is to stay as it is.
      several: whether the command works on several hosts.
    """
    before, out, err = listing(folder), io.StringIO(), io.StringIO()
    given, sys.argv = sys.argv, ["command", *map(str, argv)]
    began, code = compilation.count(), None
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            contextlib.chdir(folder),
            little_memory(),
            little_time(),
        ):
            entry.guarded(main, several=several)
    except SystemExit as left:
        code = left.code
    finally:
        sys.argv = given
    said = err.getvalue()
    assert code == entry.BAD_INPUT, (code, out.getvalue()[-300:], said[-300:])
    assert compilation.count() == began, "something was compiled"
    check_words(said)
    assert listing(folder) == before, "something was written"
    return said


def refuse_line(line: str, folder: Path) -> str:
    """Returns the error with which a command line is refused, as `refuse` does."""
    name, *argv = shlex.split(line)
    main = importlib.import_module(f"experiments.{name}").main
    return refuse(main, argv, folder, several=name in SEVERAL)


def refuse_file(
    read: Callable[[Path], Any], made: Content, path: Path, folder: Path | None = None
) -> str:
    """Returns the error, which names the file, with which a reader refused a file.

    Args:
      read: what reads it.
      made: its content.
      path: where it shall be.
      folder: what is read in its place, such as the folder that it is in.
    """
    put(made, path)
    said = refuse(lambda _: read(folder or path), [], path.parent)
    assert path.name in said
    return said


def put(made: Content, path: Path) -> None:
    """Writes a file of some content, in a folder that may have to be made."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(made if isinstance(made, bytes) else made(path.parent))


def alone(monkeypatch: Any, home: Path) -> None:
    """Leads the search for caches and data of this machine into an empty folder."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home / "nowhere"))
    for name in ("TFDS_DATA_DIR", "DIFFUSION_JAX_INCEPTION"):
        monkeypatch.delenv(name, raising=False)


def check_words(said: str) -> None:
    """Fails where an error does not say what must hold, what was got, what to do.

    Or what cannot be done, why, and what to do.
    """
    assert "Traceback" not in said, said
    if said.startswith("error: "):
        parts = r"\b(must|needs)\b.*; got .+[.\n].+|^error: cannot .+: .+\. .+"
        assert re.search(parts, said, re.S), said
    else:  # of a flag, by the parser of the command line
        assert "--help" in said, said


def listing(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns all that is in a folder, with what shows that it was touched."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        # A folder in which a lock came and went is as it was.
        touched = 0 if path.is_dir() else about.st_mtime_ns
        found[str(path)] = (about.st_mode, about.st_size, touched)
    return found


@contextlib.contextmanager
def little_time(seconds: int = PATIENCE) -> Iterator[None]:
    """The block fails where it takes longer, be it at work or waiting."""

    def stop(number: int, frame: Any) -> None:
        raise AssertionError(f"no end after {seconds} s")

    before = [signal.signal(n, stop) for n in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(
            (signal.SIGPROF, signal.SIGALRM), before, strict=True
        ):
            signal.signal(number, handler)


@contextlib.contextmanager
def little_memory(room: int = ROOM) -> Iterator[None]:
    """Within, the process gets little address space beyond what it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def write_network(path: Path) -> None:
    """Writes the file of a network that never learnt anything."""
    like = build.param_shapes(SMALL)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)
    about = About("last", 1, "a test", {}, recipe=True)
    networks.write_file(path, Network(SMALL, params, about, "0" * 64))


class Evil:
    """Unpickled by a reader that runs what it reads, it makes a file."""

    def __init__(self, canary: Path, function: Callable[..., Any] = os.mkdir) -> None:
        """Of a path that must never come to be."""
        self.canary, self.function = canary, function

    def __reduce__(self) -> Any:
        """Returns what unpickling calls."""
        return self.function, (str(self.canary),)


def evil(folder: Path, protocol: int = 2) -> bytes:
    """Returns a pickle that makes `folder`/canary where it is run."""
    return pickle.dumps(Evil(folder / "canary"), protocol)


def objects(folder: Path) -> bytes:
    """Returns an .npy file of an object array with a pickle inside."""
    file = io.BytesIO()
    values = np.array([Evil(folder / "canary")], object)
    np.lib.format.write_array(file, values, allow_pickle=True)
    return file.getvalue()


def npy(
    array: Any = None, *, head: str | bytes | None = None, version: bytes = b"\1\0"
) -> bytes:
    """Returns an .npy file: of an array, or of any header before 64 bytes of data."""
    if head is None:
        file = io.BytesIO()
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        return file.getvalue()
    raw = head.encode() if isinstance(head, str) else head
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(raw))
    return b"\x93NUMPY" + version + size + raw + bytes(64)


def npz(
    members: dict[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> bytes:
    """Returns a zip archive of members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.comment = comment
    return file.getvalue()


def tensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Returns a safetensors file of any header, true or not.

    Args:
      header: what JSON can have, or the bytes themselves.
      data: what follows.
      length: of the header, as the file states it.
    """
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    stated = len(raw) if length is None else length
    return struct.pack("<Q", stated) + raw + data


def tensor_entry(
    shape: list[Any], first: int, end: int, kind: str = "F32"
) -> dict[str, Any]:
    """Returns what a safetensors header says of a tensor."""
    return {"dtype": kind, "shape": shape, "data_offsets": [first, end]}
