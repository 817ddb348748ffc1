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
        if not manner.startswith("unsized"):
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
def test_fetch_puts_the_whole_file_in_place(tmp_path, server, manner, capfd):
    path = tmp_path / "new" / "folder" / "a.bin"
    fetch = functools.partial(download.fetch, sha256=SHA256.upper(), most=600_000)
    assert fetch(f"{server}/{manner}", path) == path
    assert path.read_bytes() == CONTENT
    with pytest.raises(DataError):  # what is there stays
        fetch(f"{server}/changed", path)
    assert path.read_bytes() == CONTENT
    assert files_under(tmp_path) == [path]
    with pytest.raises(DataError, match="writable"):
        fetch(f"{server}/{manner}", path / "below")
    assert capfd.readouterr() == ("", "")  # no bar, without a terminal


HTTPS = r"begin with https://; got .*, where http"


@pytest.mark.parametrize(
    ("manner", "options", "message"),
    [
        ("absent", {}, "HTTP Error 404"),
        ("cut", {}, "must have 600000 bytes; got 300000"),
        ("cut", {"sha256": None}, "must have 600000 bytes; got 300000"),
        ("unsized-cut", {}, "must have SHA-256"),
        ("changed", {}, "must have SHA-256"),
        ("whole", {"most": 599_999}, "must have at most 599999 bytes; got 600000"),
        ("unsized", {"most": 599_999}, "must have at most 599999 bytes; got 600000"),
        ("stall", {}, "at least every 0.5 s"),
        ("silent", {}, "answer within 0.5 s"),
        # example.org is not asked: that would take longer.
        ("to-http", {}, HTTPS),
        ("to-ftp", {}, HTTPS),
    ],
)
def test_fetch_fails_by_name_and_in_time(
    tmp_path, server, monkeypatch, manner, options, message
):
    """A bad transfer ends within its time limits and leaves nothing behind."""
    monkeypatch.setattr(download, "_STALL", 0.5)
    monkeypatch.setattr(download, "_CONNECT", 0.5 if manner == "silent" else 5)
    start = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        download.fetch(
            f"{server}/{manner}", tmp_path / "a.bin", **{"sha256": SHA256, **options}
        )
    assert time.monotonic() - start < 3
    assert f"{server}/{manner}" in str(caught.value)
    assert files_under(tmp_path) == []


def unknown(*_, **__):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize(
    ("look_up", "message"),
    [
        (unknown, r"must be within reach.*; got .*not known"),
        (lambda *_, **__: time.sleep(3), r"answer within 0\.5 s"),
    ],
)
def test_looking_up_a_name_fails_in_time(tmp_path, monkeypatch, look_up, message):
    """A look-up has no timeout of its own."""
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(download, "_CONNECT", 0.5)
    start, url = time.monotonic(), "https://example.invalid/a"
    with pytest.raises(DataError, match=message):
        download.fetch(url, tmp_path / "a", sha256=SHA256)
    assert time.monotonic() - start < 2
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    ["ftp://a.org/a", "file:///etc/hostname", "http://a.org/a", "a"]
    + [f"http://127.0.0.1{more}/a" for more in (".example.org", "@example.org")],
)
def test_other_addresses_are_refused(tmp_path, url):
    with pytest.raises(DataError, match="must begin with https://"):
        download.fetch(url, tmp_path / "a", sha256=SHA256)


def test_concurrent_downloads_do_not_mix(tmp_path, server):
    path = tmp_path / "a.bin"
    fetch = functools.partial(download.fetch, sha256=SHA256)
    with futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fetch, [f"{server}/whole"] * 4, [path] * 4)) == [path] * 4
    assert path.read_bytes() == CONTENT
    assert files_under(tmp_path) == [path]
