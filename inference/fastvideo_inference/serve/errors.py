"""Refusals as HTTP answers of OpenAI's shape: one line, a code for programs, never a stack."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from fastapi.responses import Response

from fastvideo.errors import one_line
from fastvideo.log import logger

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_FOLDERS = re.compile(r"(?<![\w:/.~])~?/([^\s/'\":,;]+/)+")
_MAX_CHARS = 400  # a message may quote what the client sent


class ApiError(Exception):
    """What a client is answered instead of what it asked for; `param` is the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after_s = retry_after_s

    def response(self) -> Response:
        """Return the HTTP answer."""
        line = " ".join(str(self).split())
        message = line if len(line) <= _MAX_CHARS else f"{line[:_MAX_CHARS]}..."
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": message,
            "type": _TYPES.get(self.status, default),
            "code": self.code,
            "param": self.param,
        }
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return json_response({"error": error}, status=self.status, headers=headers)


def public(text: str) -> str:
    """Return a message without the folders of this machine's files."""
    return _FOLDERS.sub("", text)


def failure(error: Exception) -> ApiError:
    """Return the answer to a fault of the server, and log its reason."""
    logger.error("%s", one_line(error))
    logger.debug("", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def json_response(
    values: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return values as ASCII JSON: what a client sent may hold characters that UTF-8 has not."""
    return Response(
        json.dumps(values), status_code=status, headers=headers, media_type="application/json"
    )
