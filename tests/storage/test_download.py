"""Downloads from servers that work, stall, lie, cut off or are not there."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import socket
import threading
import time
from concurrent import futures

import pytest

from diffusion_jax.errors import DataError
from diffusion_jax.storage import download

CONTENT = os.urandom(600_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
LEADS = {
    "moved": "/whole",
    "to-http": "http://example.org/a",
    "to-ftp": "ftp://127.0.0.1/a",
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT in the manner that the path names."""

    def do_GET(self):
        manner = self.path.strip("/")
        if manner == "silent":
            self.server.release.wait(20)
            return
        if manner == "absent":
            self.send_error(404)
            return
        if manner in LEADS:
            self.send_response(302)
            self.send_header("Location", LEADS[manner])
            self.end_headers()
            return
        self.send_response(200)
        if manner not in ("unsized", "unsized-cut"):
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if manner in ("cut", "unsized-cut", "stall"):
            self.wfile.write(CONTENT[: len(CONTENT) // 2])
            if manner == "stall":
                self.wfile.flush()
                self.server.release.wait(20)
        elif manner == "changed":
            self.wfile.write(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
        else:
            self.wfile.write(CONTENT)

    def log_message(self, *arguments):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.release = threading.Event()
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def files_under(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("manner", ["whole", "unsized", "moved"])
@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_fetch_puts_the_whole_file_in_place(tmp_path, server, manner, size):
    path = tmp_path / "new" / "folder" / "a.bin"
    got = download.fetch(f"{server}/{manner}", path, sha256=SHA256, size=size)
    assert got == path
    assert path.read_bytes() == CONTENT
    assert files_under(tmp_path) == [path]


def test_fetch_without_a_digest_still_checks_the_length(tmp_path, server):
    """Where none is published: what comes is taken, unless it is cut off."""
    path = tmp_path / "a.bin"
    download.fetch(f"{server}/changed", path, sha256=None)
    assert len(path.read_bytes()) == len(CONTENT)
    with pytest.raises(DataError, match="must have 600000 bytes; got"):
        download.fetch(f"{server}/cut", tmp_path / "b.bin", sha256=None)
    assert files_under(tmp_path) == [path]


def test_fetch_replaces_a_file_only_by_a_whole_one(tmp_path, server):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(DataError):
        download.fetch(f"{server}/changed", path, sha256=SHA256)
    assert path.read_bytes() == b"old"
    download.fetch(f"{server}/whole", path, sha256=SHA256.upper())
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("manner", "size", "message"),
    [
        ("absent", None, "HTTP Error 404"),
        ("cut", None, "must have 600000 bytes; got"),
        ("unsized-cut", len(CONTENT), "must have 600000 bytes; got 300000"),
        ("unsized-cut", None, "must have SHA-256"),
        ("changed", None, "must have SHA-256"),
        ("whole", 599_999, "must have 599999 bytes; got 600000"),
        ("unsized", 599_999, "must have 599999 bytes; got"),
        ("stall", None, "at least every 0.3 s"),
        ("silent", None, "answer within 1 s"),
        # example.org is not asked: that would take longer.
        ("to-http", None, r"begin with https://; got .*, where http"),
        ("to-ftp", None, r"begin with https://; got .*, where http"),
    ],
)
def test_fetch_fails_by_name_and_in_time(tmp_path, server, manner, size, message):
    """A bad transfer ends within its time limits and leaves nothing behind."""
    start = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        download.fetch(
            f"{server}/{manner}",
            tmp_path / "a.bin",
            sha256=SHA256,
            size=size,
            connect_timeout=1.0,
            read_timeout=0.3 if manner == "stall" else 5.0,
        )
    assert time.monotonic() - start < 3
    assert f"{server}/{manner}" in str(caught.value)
    assert files_under(tmp_path) == []


def test_refused_connection_fails_at_once(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a"
        start = time.monotonic()
        with pytest.raises(DataError, match=r"must be within reach.*; got .*refused"):
            download.fetch(url, tmp_path / "a.bin", sha256=SHA256)
        assert time.monotonic() - start < 2
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("hangs", ["getaddrinfo", "create_connection"])
def test_connecting_has_one_deadline(tmp_path, monkeypatch, hangs):
    """A look-up has no timeout of its own, and each address has one to itself."""
    release = threading.Event()
    monkeypatch.setattr(socket, hangs, lambda *a, **k: release.wait(20))
    start, url = time.monotonic(), "https://example.invalid/a"
    with pytest.raises(DataError, match=r"answer within 0\.5 s"):
        download.fetch(url, tmp_path / "a", sha256=SHA256, connect_timeout=0.5)
    assert time.monotonic() - start < 2
    release.set()


def test_unknown_host_is_named(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DataError, match=r"must be within reach.*; got .*not known"):
        download.fetch("https://example.invalid/a", tmp_path / "a", sha256=SHA256)


def test_other_addresses_are_refused(tmp_path):
    for url in ("ftp://a.org/a", "file:///etc/hostname", "http://a.org/a", "a"):
        with pytest.raises(DataError, match="must begin with http"):
            download.fetch(url, tmp_path / "a", sha256=SHA256)


def test_unwritable_folder_is_named(tmp_path, server):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="writable"):
        download.fetch(f"{server}/whole", tmp_path / "file" / "a", sha256=SHA256)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left")])
def test_interruption_leaves_nothing(tmp_path, server, monkeypatch, error):
    real = download._copy

    def interrupted(response, file, *arguments):
        file.write(CONTENT[:1000])
        real(response, file, *arguments)
        raise error

    monkeypatch.setattr(download, "_copy", interrupted)
    with pytest.raises((KeyboardInterrupt, DataError)):
        download.fetch(f"{server}/whole", tmp_path / "a.bin", sha256=SHA256)
    assert files_under(tmp_path) == []


def test_concurrent_downloads_do_not_mix(tmp_path, server):
    path = tmp_path / "a.bin"
    fetch = functools.partial(download.fetch, sha256=SHA256)
    with futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fetch, [f"{server}/whole"] * 4, [path] * 4)) == [path] * 4
    assert path.read_bytes() == CONTENT
    assert files_under(tmp_path) == [path]


def test_bar_is_quiet_where_there_is_no_terminal(tmp_path, server, capfd):
    download.fetch(f"{server}/whole", tmp_path / "a.bin", sha256=SHA256)
    assert capfd.readouterr() == ("", "")


def test_encryption_is_never_left():
    there, here = "https://example.org/a", "http://127.0.0.1/a"
    for before, after in (
        (there, "http://example.org/a"),
        (there, here),
        (there, "file:///etc/passwd"),
        (here, "http://example.org/a"),
        (here, "http://127.0.0.1.example.org/a"),
        (here, "http://127.0.0.1@example.org/a"),
    ):
        with pytest.raises(DataError, match="must begin with https://"):
            download.check_address(after, before)
        download.check_address("https://example.com/b", before)


@pytest.mark.parametrize("manner", ["whole", "unsized"])
def test_a_file_has_no_more_than_it_may(tmp_path, server, manner):
    path = tmp_path / "a.bin"
    with pytest.raises(DataError, match="must have at most 599999 bytes; got"):
        download.fetch(f"{server}/{manner}", path, sha256=SHA256, most=599_999)
    assert files_under(tmp_path) == []
    download.fetch(f"{server}/{manner}", path, sha256=SHA256, most=600_000)
