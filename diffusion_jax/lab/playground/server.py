"""Answers the requests of the page: its routes, and what is in memory between them.

  GET  /                     the page
  GET  /api/run              what the network is, and who is being served
  POST /api/denoise          and interpolate, inpaint, compress: lines of JSON
                             (application/x-ndjson), one a step
  POST /api/resume           the rest of the lines of a job that was stopped
  DELETE /api/jobs/ID        stops a job before its next step
  PUT  /api/image            a file as the body, kept under an id
  GET  /api/file/ID          a compressed image
  GET  /api/metrics?since=N  what the run has logged after step N
  GET  /api/samples/STEP     the picture that it drew then

No path of a file comes from whoever asks.
"""

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Send

from diffusion_jax.errors import ConfigError, DataError
from diffusion_jax.lab.coding import coder
from diffusion_jax.lab.playground import answers, asked, guard, plans, subject
from diffusion_jax.lab.playground.desk import BusyError, Desk, Kept
from diffusion_jax.lab.playground.subject import Subject
from diffusion_jax.lab.schema import sampling
from diffusion_jax.lab.schema.config import Config

JSON, FILE = 2**20, 2 * 2**20
"""Most bytes of a request in JSON, and of an image file."""
CSP = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; "
    "script-src 'nonce-{0}'; style-src 'nonce-{0}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Table(NamedTuple):
    """What there is between two requests."""

    subject: Subject
    desk: Desk
    images: Kept[np.ndarray]
    drawings: Kept[answers.Drawing]
    """Those that were stopped."""
    files: Kept[answers.Bytes]
    counts: dict[Config, float]
    """Network evaluations (NFE) by the way to sample."""
    coders: list[coder.Coder]
    """One, once it was needed."""


class Lines(StreamingResponse):
    """Lines of JSON, whose source is closed when nobody reads on."""

    async def stream_response(self, send: Send) -> None:
        """Sends the lines."""
        lines: Any = self.body_iterator
        async with aclosing(lines):
            await super().stream_response(send)


def application(opened: Subject, token: str, port: int, *, remote: bool) -> ASGIApp:
    """Returns the application that serves a network.

    The address of the page must have the token. `remote` is whether it answers under
    other addresses than those of loopback.
    """
    table = Table(
        opened,
        Desk(),
        Kept(32, "the image"),
        Kept(4, "the job"),
        Kept(32, "the file"),
        {},
        [],
    )

    routes = [
        Route("/", _page),
        Route("/api/run", _run),
        *(
            Route(f"/api/{kind.__name__.lower()}", _draw, methods=["POST"])
            for kind in asked.KINDS
        ),
        Route("/api/jobs/{name}", _stop, methods=["DELETE"]),
        Route("/api/image", _image, methods=["PUT"]),
        Route("/api/file/{name}", _file),
        Route("/api/metrics", _metrics),
        Route("/api/samples/{step:int}", _sample),
    ]
    handlers: dict[Any, Any] = {
        HTTPException: _refused,
        ValueError: _wrong,  # of which ConfigError and DataError are kinds
        guard.LargeError: lambda _, error: _error(str(error), 413),
        BusyError: lambda *_: _error(
            "too many drawings wait; got one more. Wait, or stop.", 429
        ),
    }
    inner = Starlette(routes=routes, exception_handlers=handlers)
    inner.state.table = table
    return guard.Guard(inner, token, port, remote=remote)


def _table(request: Request) -> Table:
    table: Table = request.app.state.table
    return table


async def _page(request: Request) -> Response:
    nonce = secrets.token_urlsafe(16)
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    policy = {"Content-Security-Policy": CSP.format(nonce)}
    return HTMLResponse(page.replace("__NONCE__", nonce), headers=policy)


async def _run(request: Request) -> Response:
    table = _table(request)
    rules = {
        name: {
            "steps": rule.steps,
            "grid": rule.grid,
            "options": sorted(rule.options),
            "orders": rule.orders,
        }
        for name, rule in sampling.RULES.items()
        if rule.grid is not None
    }
    return JSONResponse(
        subject.describe(table.subject)
        | {
            "rules": rules,
            "most": asked.IMAGES,
            "jobs": table.desk.order,
            "codec": coder.path_of(table.subject.run.folder).is_file(),
            "logged": table.subject.run.metrics.is_file(),
        }
    )


async def _draw(request: Request) -> Response:
    """Answers all that takes the thread that computes."""
    table = _table(request)
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return _error("the body must be application/json; got another type.", 415)
    name = request.url.path.rpartition("/")[2]
    kind = next(kind for kind in asked.KINDS if kind.__name__.lower() == name)
    told: Any = asked.read(await guard.body(request, JSON), kind)
    if isinstance(told, asked.Resume):
        drawing = table.drawings.get(told.job)
        if told.job in table.desk.order:
            raise ConfigError("the job must have stopped; got a running one. Wait.")
        return _streamed(table, request, drawing.lines, drawing, told.job)
    if isinstance(told, asked.Compress):
        image = table.images.get(told.image)
        packed = answers.Bytes(table.subject, image, nearest=told.nearest)
        own = table.files.put(packed)

        def lines() -> Iterator[answers.Line]:
            yield {"file": own}
            yield from packed.lines(_coder(table))

        return _streamed(table, request, lines, None)
    table.desk.check()

    def planned() -> answers.Drawing:
        route = getattr(plans, name)(table.subject, told, table.images.get)
        return answers.Drawing(route, table.counts)

    loop = asyncio.get_running_loop()  # which does not wait for what JAX computes
    drawing = await loop.run_in_executor(table.desk.thread, planned)
    return _streamed(table, request, drawing.lines, drawing)


def _streamed(
    table: Table,
    request: Request,
    lines: Callable[[], Iterator[answers.Line]],
    drawing: answers.Drawing | None,
    name: str = "",
) -> Response:
    """Returns the answer that has a line for each step."""
    name = table.desk.enter(name)
    if drawing is not None:
        table.drawings.put(drawing, name)

    async def text() -> AsyncIterator[str]:
        yield json.dumps({"job": name}) + "\n"
        done = False
        try:
            each = table.desk.each(name, lines(), request.is_disconnected)
            async with aclosing(each) as found:  # type: ignore[type-var]
                async for line in found:
                    done = done or "done" in line
                    yield json.dumps(line) + "\n"
            if not done:
                yield json.dumps({"stopped": True, "job": name}) + "\n"
        except (ConfigError, DataError, ValueError) as error:
            yield json.dumps({"error": str(error)}) + "\n"
        finally:
            if done:
                table.drawings.values.pop(name, None)

    return Lines(text(), media_type="application/x-ndjson")


async def _stop(request: Request) -> Response:
    if not _table(request).desk.stop(request.path_params["name"]):
        return _error("the job must be one that waits or runs; got another.", 404)
    return JSONResponse({"stopped": True})


async def _image(request: Request) -> Response:
    table = _table(request)
    data = await guard.body(request, FILE)
    config = table.subject.config
    image, own = await run_in_threadpool(asked.decoded, data, config)
    return JSONResponse(
        {
            "id": table.images.put(image),
            "height": own[0],
            "width": own[1],
            "shown": base64.b64encode(image.tobytes()).decode(),
        }
    )


async def _file(request: Request) -> Response:
    try:
        found = _table(request).files.get(request.path_params["name"])
    except ConfigError as error:
        return _error(str(error), 404)
    return Response(
        found.data,
        media_type="application/octet-stream",
        headers={"Content-Disposition": 'attachment; filename="image.ddpx"'},
    )


async def _metrics(request: Request) -> Response:
    known = _table(request).subject
    since = request.query_params.get("since", "-1")
    if not since.removeprefix("-").isascii() or not since.removeprefix("-").isdigit():
        raise ConfigError("since must be a whole number; got none. Give a step.")
    what = known.run, known.drawable.sha256, int(since[:20])
    return JSONResponse(await run_in_threadpool(answers.metrics, *what))


async def _sample(request: Request) -> Response:
    run, step = _table(request).subject.run, request.path_params["step"]
    try:
        picture = await run_in_threadpool(answers.sample, run, step)
    except ConfigError as error:
        return _error(str(error), 404)
    return Response(picture, media_type="image/png")


def _coder(table: Table) -> coder.Coder:
    """Returns the network as a codec; made when it is first asked for."""
    if not table.coders:
        known = table.subject
        network = coder.Network(known.run, known.config, known.drawable, known.told)
        table.coders.append(coder.load(network))
    return table.coders[0]


def _error(text: str, status: int) -> Response:
    return JSONResponse({"error": text}, status)


def _wrong(request: Request, error: Exception) -> Response:
    """Returns the answer to what is out of bounds; ValueErrors say what must hold."""
    ours = isinstance(error, ConfigError | DataError) or "; got " in str(error)
    said = (
        str(error) if ours else "the request must be as the page makes it; got other."
    )
    return _error(said, 400)


def _refused(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 400
    return _error("there must be something at the address; got nothing.", status)
