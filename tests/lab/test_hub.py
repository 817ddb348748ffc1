"""Networks fetched from a hub: a server of this machine that speaks as the real one."""

import http.server
import json
import socket
import threading
import time

import pytest

from diffusion_jax.lab.network_files import hub

constants = pytest.importorskip("huggingface_hub.constants")

COMMIT = "0123456789" * 4
MODULE = "diffusion_pytorch_model"
PIPELINE = [
    *("README.md", "model_index.json", "scheduler/scheduler_config.json"),
    *("unet/config.json", f"unet/{MODULE}.safetensors"),
]
CONTENT = {
    "me/alone": ["config.json", f"{MODULE}.safetensors", f"{MODULE}.bin", ".gitignore"],
    "me/pipeline": [
        *PIPELINE,
        *(f"unet/{MODULE}.bin", f"unet/{MODULE}.fp16.safetensors"),
        *("vae/config.json", "logs/events.out"),
    ],
    "me/old": ["config.json", f"{MODULE}.bin"],
    "me/text": ["config.json", "model.safetensors"],
    "me/empty": [],
    "me/gated": ["config.json", f"{MODULE}.safetensors"],
    "me/broken": 500,
    "me/gone": 404,
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what the package asks of the hub, and notes it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Answers with a list of files, or one of them; as to someone unknown."""
        self.server.asked.append((self.command, self.path))
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        found = CONTENT.get(name, 401)
        if isinstance(found, int):
            code = {"X-Error-Code": "RepoNotFound"} if found == 401 else {}
            self.reply(b"", found, code)
        elif api:
            known = {"type": "file", "oid": "0"}
            rows = [
                {**known, "path": f, "rfilename": f, "size": len(f"{name} {f}")}
                for f in found
            ]
            about = {"id": name, "sha": COMMIT, "siblings": rows, "tags": []}
            self.reply(json.dumps(rows if parts[4:5] == ["tree"] else about).encode())
        elif name == "me/gated":
            self.reply(b"", 403, {"X-Error-Code": "GatedRepo"})
        else:
            file = "/".join(parts[4:])
            headers = {"ETag": f'"{file.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
            self.reply(f"{name} {file}".encode(), 200, headers)

    do_HEAD = do_GET  # noqa: N815

    def reply(self, content, status=200, headers=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        """Says nothing."""


@pytest.fixture
def server(monkeypatch):
    """The address of a hub; every other address is refused."""
    connect = socket.socket.connect

    def only_here(self, address):
        assert address[0] in ("127.0.0.1", "localhost")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # Read when the package is imported: those of the one who tests do not count.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        server.address = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


NEEDED = {
    "me/alone": ["config.json", f"{MODULE}.safetensors"],
    "me/old": ["config.json", f"{MODULE}.bin"],
    "me/pipeline": PIPELINE,
}


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_needed_is_fetched_once_and_serves_without_a_network(
    server, tmp_path, capfd, name, refuses
):
    nowhere, expected = "http://127.0.0.1:1", NEEDED[name]
    folder = hub.fetch(name, cache=tmp_path, endpoint=server.address)
    assert tmp_path in folder.parents
    files = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
    assert sorted(files) == expected
    for file in files:
        assert (folder / file).read_text() == f"{name} {file}"
    files = [path.partition("/resolve/")[2] for _, path in server.asked]
    assert {f"{COMMIT}/{file}" for file in expected} == set(files) - {""}
    assert not capfd.readouterr().err
    assert hub.fetch(name, cache=tmp_path, endpoint=nowhere) == folder
    (weights,) = folder.rglob(f"{MODULE}*")
    weights.unlink()
    began = time.monotonic()
    with refuses(f"hf download {name} --local-dir DIR"):
        hub.fetch(name, cache=tmp_path, endpoint=nowhere)
    assert time.monotonic() - began < 10  # said at once
    server.asked.clear()
    hub.fetch(name, cache=tmp_path, endpoint=server.address)
    assert weights.is_file()
    assert not [path for _, path in server.asked if path.endswith("config.json")]


SAID = {
    "me/unknown": "status 401: there is none of this name",
    "me/gone": "status 404: there is none of this name",
    "me/gated": "its owner asks for consent first",
    "me/text": "config.json, model.safetensors. Name",
    "me/empty": "an empty repository",
    "me/broken": "500",
}


def test_what_the_hub_refuses_is_said(server, tmp_path, refuses):
    for name, got in SAID.items():
        with refuses(got):
            hub.fetch(name, cache=tmp_path, endpoint=server.address)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "name", ["", "cifar10", "a/b/c", "me/../..", "/me", "https://h.co/me", "me/a--b"]
)
def test_other_names_are_refused(name, refuses):
    with refuses(repr(name)):
        hub.fetch(name, endpoint="unasked")


def test_silence_is_given_up(server, tmp_path, refuses, monkeypatch):
    """Of what looks up names, too, which knows no limit of its own."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: time.sleep(5))
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    began = time.monotonic()
    with refuses("Check the network"):
        hub.fetch("me/alone", cache=tmp_path, endpoint=server.address)
    assert time.monotonic() - began < 5
