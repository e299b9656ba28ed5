"""Around every request: an id, a log line, a bound on the body, and an answer whatever happens."""

from __future__ import annotations

import logging
import re
import secrets
import time
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvideo.log import logger
from fastvideo_inference.engine.config import ServeConfig
from fastvideo_inference.serve.errors import ApiError, failure

REQUEST_ID = ContextVar("request_id", default="-")
MAX_OPEN = 1024  # requests at once, half of which may follow jobs, and stay open
_CLIENT_ID = re.compile(rb"[\w.-]{1,64}")
_JOB_ID = re.compile(r"video_[0-9a-f]{32}")
_PORT = re.compile(r":\d*$")
_ADDRESS = re.compile(r"[\d.]+|[\da-f.:]*:[\da-f.:]*")  # what no name can be


class RequestIdFilter(logging.Filter):
    """Give every log record the id of its request, else of the job that it names, else "-"."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add `request_id`."""
        found = REQUEST_ID.get()
        if found == "-" and (job := _JOB_ID.search(record.getMessage())):
            found = job[0]
        record.request_id = found
        return True


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app, self._num_open = app, 0
        self._body_bytes, self._has_keys = config.limits.body_bytes, bool(config.key)
        self._hosts = {"localhost", *(name.lower() for name in config.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        own = headers.get(b"x-request-id", b"")
        request_id = own.decode() if _CLIENT_ID.fullmatch(own) else f"req_{secrets.token_hex(8)}"
        REQUEST_ID.set(request_id)
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        self._num_open += 1
        try:
            if self._num_open > MAX_OPEN and scope["path"] != "/healthz":
                text = f"{MAX_OPEN} requests are being answered"
                raise ApiError(503, text, code="overloaded", retry_after_s=1)
            self._check_origin(headers)
            bounded = self._bounded(headers, receive)
            await self._app(scope, bounded, send_with_id)
        except Exception as error:
            if not status:
                refusal = error if isinstance(error, ApiError) else failure(error)
                await refusal.response()(scope, receive, send_with_id)
            elif status < 500:  # amid an answer; what was answered 500 is in the log
                failure(error)
        finally:
            self._num_open -= 1
        level = logging.DEBUG if scope["method"] == "GET" and status < 400 else logging.INFO
        spent_ms = 1000 * (time.perf_counter() - started)
        logger.log(level, "%s %r %s %.1f ms", scope["method"], scope["path"], status, spent_ms)

    def _bounded(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Return `receive` that ends in 413 as soon as the body is known to be too long."""
        announced = headers.get(b"content-length", b"0")
        received = int(announced) if announced.isdigit() else 0
        self._check_size(received)
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            self._check_size(received)
            return message

        return bounded

    def _check_size(self, received: int) -> None:
        if received > self._body_bytes:
            text = f"the body must be at most {self._body_bytes} bytes"
            raise ApiError(413, text, code="body_too_large")

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """Without keys, refuse what a page of another site has a browser of this host send.

        Such a page may even have a name that resolves to this host (DNS rebinding), thus only
        addresses and known names are served.
        """
        if self._has_keys:
            return
        host, origin = headers.get(b"host", b""), headers.get(b"origin", b"")
        name = _PORT.sub("", host.decode("latin-1")).strip("[]").lower()
        if name not in self._hosts and not _ADDRESS.fullmatch(name):
            text = f"host {name!r} is unknown; hosts of the server's config names those it serves"
            raise ApiError(403, text, code="unknown_host")
        if origin and origin.partition(b"://")[2] != host:
            raise ApiError(403, "pages of other origins are refused", code="cross_origin")
