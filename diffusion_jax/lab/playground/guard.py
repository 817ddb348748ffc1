"""Lets in who has the token and comes by the right name, and bounds what is sent.

Whoever opens a page of another site lets that site send requests to this machine. So
each must come under a name of this machine (a name of theirs may lead here, by DNS
rebinding) and have the cookie that only the printed address gives, which a browser
does not send along from another site. No answer allows another site to read it.
"""

import hmac
import ipaddress
import secrets
import socket
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class LargeError(Exception):
    """A body has more bytes than it may."""


class Guard:
    """An application around another, which answers who may not go on."""

    def __init__(self, app: ASGIApp, token: str, port: int, *, remote: bool) -> None:
        """Guards `app`; `remote` allows other addresses than those of loopback."""
        self.app, self.token, self.remote = app, token, remote
        self.cookie = f"playground_{port}"  # which does not tell ports apart

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        refused = None
        if scope["type"] == "http":  # and not the start and the end of the server
            refused = self._refused(Request(scope))

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    found.setdefault(name, value)
            await send(message)

        await (refused or self.app)(scope, receive, with_headers)

    def _refused(self, request: Request) -> ASGIApp | None:
        """Returns the answer to who may not go on; None to who may."""
        host = request.headers.get("host", "")
        if not self._ours(host):
            return _says(
                "the address must be of this machine, such as 127.0.0.1; got another. "
                "Open the address that the command printed.",
                403,
            )
        origin = request.headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return _says("requests must be those of the page; got another site's.", 403)
        given = request.query_params.get("token", "")
        if request.url.path == "/" and self._same(given):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(
                self.cookie, self.token, httponly=True, samesite="strict", path="/"
            )
            return answer
        cookies = SimpleCookie()
        with suppress(CookieError):
            cookies.load(request.headers.get("cookie", ""))
        if self.cookie in cookies and self._same(cookies[self.cookie].value):
            return None
        return PlainTextResponse(
            "This page needs the address that the command printed, with its token.",
            403,
        )

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())

    def _ours(self, host: str) -> bool:
        """Returns whether a Host header names this machine; any port may lead here."""
        name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
        name = name.removeprefix("[").removesuffix("]").lower()
        # No other site can give itself an address of numbers.
        own = name == machine().lower() or _address(name) is not None
        return is_loopback(name) or (self.remote and own)


def token() -> str:
    """Returns 128 random bits as text."""
    return secrets.token_urlsafe(16)


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def machine() -> str:
    """Returns the name of this machine, for an address that others can open."""
    return socket.gethostname()


async def body(request: Request, most: int) -> bytes:
    """Returns the body of a request.

    Args:
      request: whose body nobody has read.
      most: bytes that it may have; no more are read.

    Raises:
      LargeError: it has more.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise LargeError(f"the body must have at most {most:,} bytes; got more.")
        parts.append(part)
    return b"".join(parts)


def _says(text: str, status: int) -> JSONResponse:
    return JSONResponse({"error": text}, status)
