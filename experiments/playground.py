"""Opens a trained network in the browser: `python -m experiments.playground [RUN]`.

One sees each step of a drawing, compares samplers, mixes images, paints and
compresses. It is served to this machine alone, under an address with a token. Without
any run it shows a small network of digits that comes with the package.
"""

import dataclasses
import socket
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from diffusion_jax.errors import ConfigError, needs
from diffusion_jax.lab.process import entry, replaceable
from diffusion_jax.lab.schema import choices
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.facts import between

MARK = b"<title>diffusion in one file</title>"
"""By which a page that was written here is known."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to open, and where it is served."""

    MAIN: ClassVar = (
        "run page overwrite port address open allow_remote raw average step strict"
    )
    run: choices.Named = None
    page: Path | None = None
    """Write FILE.html in place of serving: a page that draws without a server, with the
    network and its weights inside. For small ones, without classes."""
    overwrite: bool = False
    """Whether `--page FILE` may replace what is no page of this project."""
    port: Annotated[int, between(0, 65535)] = 8765
    """Port to serve at; 0 for any that is free."""
    address: str = "127.0.0.1"
    """Address to serve at; this machine alone when not given."""
    open: bool = False
    """Whether to open the page in a browser."""
    allow_remote: bool = False
    """Whether `--address` may be one that other machines reach."""
    which: choices.Which = Weights()


def main(argv: Sequence[str]) -> int:
    """Serves until it is interrupted; returns the exit code."""
    options = entry.parse(Options, argv, "playground", __doc__)
    if options.page is not None:
        return write_page(options)
    for package in ("starlette", "uvicorn"):
        needs(package, "open the playground", "playground")
    # Which no mistake in the arguments should wait for.
    import uvicorn

    from diffusion_jax.lab.playground import guard, server, subject

    remote = not guard.is_loopback(options.address)
    if remote and not options.allow_remote:
        raise ConfigError(
            "--address must be 127.0.0.1, localhost or ::1, which others do not reach; "
            f"got {options.address}. Give --allow-remote too if they should."
        )
    listening = bound(options.address, options.port)
    port, token = listening.getsockname()[1], guard.token()
    opened = subject.opened(options.run, options, options.which)
    said = "the digits that come with the package, as there is no run in runs/ yet"
    print(f"{said if opened.shipped else opened.run.folder}: {opened.told}")
    if remote:
        print(
            f"note: served at {options.address}, which others may reach: whoever "
            "has the address below can use this one, and it is not encrypted",
            file=sys.stderr,
        )
    name = guard.machine() if options.address in ("0.0.0.0", "::") else options.address
    name = f"[{name}]" if ":" in name else name
    url = f"http://{name}:{port}/?token={token}"
    print(f"open {url}\nCtrl-C ends it", flush=True)
    if options.open:
        webbrowser.open(url)
    app = server.application(opened, token, port, remote=remote)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=2**16,
        limit_concurrency=64,
    )
    uvicorn.Server(settings).run(sockets=[listening])
    return 0


def write_page(options: Options) -> int:
    """Writes the page that needs no server; returns the exit code."""
    from diffusion_jax.lab.playground import alone, subject
    from diffusion_jax.storage import files

    path = options.page or Path()
    replaceable.check_file(path, MARK, overwrite=options.overwrite)
    opened = subject.opened(options.run, options, options.which)
    text = alone.page(opened)
    with files.replacing(path) as file:
        file.write(text.encode())
    print(f"{opened.told}: {path}, {len(text) / 1e6:.1f} MB, which opens by itself")
    return 0


def bound(host: str, port: int) -> socket.socket:
    """Returns a socket at an address, before anything is loaded.

    Raises:
      ConfigError: it is not to be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(
            f"cannot serve at {host}, port {port}: {error.strerror or error}. Give "
            "another --port, or 0 for any that is free."
        ) from error
    return found


if __name__ == "__main__":
    entry.guarded(main)
