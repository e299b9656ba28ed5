"""The server: its routes as an ASGI app, and its life from listening to drained.

signal = await serve(config, listener=listen("127.0.0.1", 8000), signals=asyncio.Queue())
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from fastvideo import __version__
from fastvideo.errors import one_line
from fastvideo.log import logger
from fastvideo_inference.engine.config import Limits, ServeConfig
from fastvideo_inference.engine.engine import Engine
from fastvideo_inference.serve import metrics
from fastvideo_inference.serve.catalogue import Catalogue
from fastvideo_inference.serve.errors import ApiError, failure, json_response
from fastvideo_inference.serve.guard import Guard
from fastvideo_inference.serve.videos import Videos

MAX_CONNECTIONS = 2048  # each is a file descriptor; half of them may be idle
HEAD_S = 10.0  # for the head of a request, and what is left of the body of an answered one
_CLOSING_S = 2  # for answers that are being sent when the engine has ended
_CLEANING_S = 30.0


class App:
    """All routes; `asgi` is what a server runs."""

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        self._engine, self._catalogue = engine, Catalogue(config)
        self.videos = Videos(engine, config, self._catalogue)
        app = FastAPI(title="fastvideo", version=__version__, docs_url=None, redoc_url=None)
        self.videos.add_to(app)
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/healthz", self.health, methods=["GET"])
        app.add_api_route("/readyz", self.ready, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        for error in (ApiError, HTTPException, RequestValidationError, Exception):
            app.add_exception_handler(error, _answer)
        self.asgi = Guard(app, config)

    async def models(self, request: Request) -> Response:
        """List the models, the default one first, with what a page needs to know of each, and
        beside them what requests may name.
        """
        self.videos.keys.owner(request)
        offers = await asyncio.to_thread(self._catalogue.offers)
        return json_response({"object": "list", **offers, "ready": self._engine.is_ready()})

    async def health(self) -> Response:
        """Say that the process answers."""
        return json_response({"status": "ok"})

    async def ready(self) -> Response:
        """Say whether the default model has made a clip, and jobs are accepted."""
        if self._engine.is_ready() and not self.videos.is_draining:
            return json_response({"status": "ready"})
        raise ApiError(503, "the server is starting or ending", code="not_ready", retry_after_s=1)

    async def metrics(self) -> Response:
        """Return what Prometheus scrapes."""
        text = metrics.render(self._engine.stats(), self.videos.rejected)
        return Response(text, media_type=metrics.CONTENT_TYPE)


async def _answer(request: Request, error: Exception) -> Response:
    """Answer any exception in the one shape that errors have."""
    match error:
        case ApiError():
            return error.response()
        case HTTPException():
            code = "not_found" if error.status_code == 404 else "invalid_request"
            answer = ApiError(error.status_code, str(error.detail), code=code).response()
            answer.headers.update(error.headers or {})
            return answer
        case RequestValidationError():
            first = error.errors()[0]
            name = str(first["loc"][-1])
            text = f"{name}: {first['msg']}"
            return ApiError(400, text, code="invalid_value", param=name).response()
    return failure(error).response()


class _Protocol(H11Protocol):
    """uvicorn's, which also closes connections on which no whole request head comes in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, unless there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.close()
        self._expect_request_after(None)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        answered = self.cycle  # what was pipelined begins in here
        super().on_response_complete()
        self._expect_request_after(answered)

    def _expect_request_after(self, cycle: RequestResponseCycle | None) -> None:
        self.loop.call_later(HEAD_S, self._give_up, cycle)

    def _give_up(self, cycle: RequestResponseCycle | None) -> None:
        if self.cycle is cycle:
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn without its handlers of signals: the first one drains, and that is ours to do."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket, before anything is loaded; `OSError` says where it could not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # where it says the address again
        raise OSError(f"cannot listen at {host}:{port}: {reason}") from None
    # asyncio sets it only on sockets that were made as IPPROTO_TCP; without it an answer's body
    # waits 40 ms for the acknowledgement of its head
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve(
    config: ServeConfig,
    *,
    listener: socket.socket,
    signals: asyncio.Queue[int],
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve until the first signal, drain, and return it; a second one ends the drain."""
    engine = Engine(config)
    app = App(engine, config)
    server = _Server(
        uvicorn.Config(
            app.asgi,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_CLOSING_S,
        )
    )
    try:
        async with AsyncExitStack() as held:
            held.push_async_callback(engine.stop)
            await engine.start()
            async with asyncio.TaskGroup() as group:
                group.create_task(server.serve(sockets=[listener]))
                cleaning = group.create_task(_keep_clean(engine, config.limits))
                readying = group.create_task(_announce(engine, on_ready))
                first = await signals.get()
                app.videos.is_draining = True
                logger.warning("no more jobs are accepted; a second signal ends running ones")
                drain, second = (group.create_task(c) for c in (engine.drain(), signals.get()))
                await asyncio.wait([drain, second], return_when=asyncio.FIRST_COMPLETED)
                for task in (cleaning, readying, drain, second):
                    task.cancel()
                server.should_exit = True  # it closes its socket, and waits for its answers
                await held.aclose()  # which ends the streams of events
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return first


async def _announce(engine: Engine, on_ready: Callable[[], None]) -> None:
    await engine.ready()
    on_ready()


async def _keep_clean(engine: Engine, limits: Limits) -> None:
    while True:
        await clean(engine, limits, now_s=time.time())
        await asyncio.sleep(min(_CLEANING_S, limits.output_ttl_s / 2))


async def clean(engine: Engine, limits: Limits, *, now_s: float) -> None:
    """Delete jobs that ended too long ago, and the oldest ones while files exceed the quota."""
    ended = [(job.finished_at_s, job) for job in engine.jobs() if job.finished_at_s is not None]
    kept_bytes = 0
    for finished_at_s, job in sorted(ended, key=lambda pair: pair[0], reverse=True):
        with suppress(OSError):  # it is gone
            kept_bytes += job.path.stat().st_size if job.path is not None else 0
        if now_s > finished_at_s + limits.output_ttl_s or kept_bytes > limits.output_bytes:
            try:
                await engine.delete(job.id)
            except KeyError:
                pass  # a client was faster
            except OSError as error:
                logger.error("%s is not removed: %s", job.id, one_line(error))
