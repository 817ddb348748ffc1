"""Downloads a file: to a temporary place, checked, then renamed.

Either the whole file with the right digest appears under its name, or nothing does
and a `DataError` says why, within seconds where there is no network.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from diffusion_jax.errors import DataError
from diffusion_jax.storage import files
from diffusion_jax.storage.waiting import Bar

_CHUNK = 2**18
# Seconds in all until an answer begins (name look-up, connection, encryption,
# redirects), and without a single byte until a transfer has stalled.
_CONNECT, _STALL = 5.0, 30.0
T = TypeVar("T")


def cache_folder() -> Path:
    """Returns the folder diffusion_jax of the user's cache.

    That is in `XDG_CACHE_HOME`, else in `~/.cache`.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "diffusion_jax"


def fetch(
    url: str,
    path: str | os.PathLike[str],
    *,
    sha256: str | None,
    most: int = 2**30,
) -> Path:
    """Returns `path`, at which the file behind `url` now lies whole and checked.

    Proxies are taken from the environment, as urllib does.

    Args:
      url: https; http too of this machine itself, by its address. So are all that it
        leads on to.
      path: where the file shall lie; its folder is made if need be.
      sha256: the digest the content must have, in hexadecimal; None where none is
        known, and then only the length that the server states is checked.
      most: bytes that it may have.

    Raises:
      DataError: no answer, a refusal, a stall, or other bytes than expected. Nothing
        is then left behind.

    >>> fetch("ftp://example.org/a", "/tmp/a", sha256="00")
    Traceback (most recent call last):
    ...
    diffusion_jax.errors.DataError: a URL must begin with https://; got \
ftp://example.org/a. Download it by hand.
    """
    check_address(url)
    path = Path(path)
    try:
        with files.replacing(path) as file:
            headers = {"User-Agent": "diffusion_jax"}
            request = urllib.request.Request(url, headers=headers)
            opener = urllib.request.build_opener(_Redirects)
            opened = within(_CONNECT, lambda: opener.open(request, timeout=_STALL))
            with opened as response:
                digest = _copy(response, file, url, most)
            if sha256 is not None and digest != sha256.lower():
                raise DataError(
                    f"the file at {url} must have SHA-256 {sha256}; got {digest}. "
                    "It was changed on the way or at the source: it was not kept."
                )
    except TimeoutError as error:
        raise DataError(
            f"a server must answer within {_CONNECT:g} s, and then send bytes at "
            f"least every {_STALL:g} s; got none from {url} for that long. "
            "Check the network and try again, or download it by hand."
        ) from error
    except DataError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(
            f"{url} must be within reach and {path.parent} writable; got {error}. "
            f"Check the address, the network and the disk, or download it by hand to "
            f"{path}."
        ) from error
    return path


def check_address(url: str, before: str = "") -> None:
    """Raises DataError for an address at which others could change what is fetched.

    Args:
      url: the address.
      before: the one that led there, if one did.

    >>> check_address("https://example.org/a")
    >>> check_address("http://127.0.0.1:8000/a")
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise DataError(
            f"a URL must be an address; got {url} ({error}). Correct it."
        ) from error
    # What never leaves this machine needs no encryption; but nobody else leads to it.
    hosts = {urllib.parse.urlsplit(one).hostname for one in (url, before or url)}
    here = parts.scheme == "http" and hosts <= {"127.0.0.1", "::1", "localhost"}
    if parts.scheme != "https" and not here:
        led = f", where {before} leads" if before else ""
        raise DataError(
            f"a URL must begin with https://; got {url}{led}. Download it by hand."
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to addresses of the same kind alone."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Returns the request for the new address, or raises DataError."""
        check_address(newurl, req.full_url)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def within(seconds: float, work: Callable[[], T]) -> T:
    """Returns a function's value, or raises TimeoutError when that takes too long.

    Look-ups of names have no timeout of their own and a host may have many addresses
    that each hang, so the whole of it runs in a thread that is waited for.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except Exception as error:  # raised again where it is waited for
            answer.set_exception(error)

    threading.Thread(target=run, name="network", daemon=True).start()
    return answer.result(timeout=seconds)


def _copy(response: Any, file: Any, url: str, most: int) -> str:
    """Returns the SHA-256 of the bytes copied, having checked how many they were."""
    stated = response.headers.get("Content-Length")
    expected = int(stated) if stated else None
    digest, done = hashlib.sha256(), 0
    said = f"downloading {url.rsplit('/', 1)[-1]}"
    with Bar(None, said, expected, unit="B", unit_scale=True) as bar:
        # Of one that says that it is too long nothing is fetched.
        while max(done, expected or 0) <= most and (chunk := response.read(_CHUNK)):
            done += len(chunk)
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    long = max(done, expected or 0)
    if long > most or expected not in (None, done):
        must, got = (f"at most {most}", long) if long > most else (expected, done)
        raise DataError(
            f"the file at {url} must have {must} bytes; got {got}. The transfer was "
            "cut off or the file is another one: try again, or download it by hand."
        )
    return digest.hexdigest()
