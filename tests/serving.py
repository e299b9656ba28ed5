"""A real server in a thread: uvicorn on a free port, the engine with the `local` executor."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastvideo_inference.engine.config import ServeConfig
from fastvideo_inference.serve.app import listen, serve

BALL = {"prompt": "a red ball moving left", "seed": 1, "guidance_scale": 1}
LONG = {**BALL, "num_inference_steps": 100}
"""Far more steps than any test waits for."""
PATIENCE_S = 60.0


class Running:
    """A server in a thread; requests to it return status, headers and JSON or bytes."""

    def __init__(self, config: ServeConfig) -> None:
        self._listener = listen("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = config.folder
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(config)))
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    async def _run(self, config: ServeConfig) -> None:
        self.loop, self._signals = asyncio.get_running_loop(), asyncio.Queue[int]()
        ready = self._ready.set
        await serve(config, listener=self._listener, signals=self._signals, on_ready=ready)

    def signal(self) -> None:
        self.loop.call_soon_threadsafe(self._signals.put_nowait, signal.SIGTERM)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.signal()
            self.signal()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def ask(
        self,
        method: str,
        path: str,
        values: Any = None,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        key: str = "",
    ) -> tuple[int, http.client.HTTPMessage, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        headers = {**({"authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        if values is not None:
            body = json.dumps(values).encode()
            headers["content-type"] = "application/json"
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            found = answer.read()
        finally:
            connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, answer.headers, json.loads(found) if is_json else found

    def create(self, values: dict[str, Any], **how: Any) -> dict[str, Any]:
        status, _, job = self.ask("POST", "/v1/videos", values, **how)
        assert status == 200, job
        return dict(job)

    def refused(self, method: str, path: str, *given: Any, **how: Any) -> dict[str, Any]:
        """Return the error of a request, once it is of the right shape."""
        status, headers, answer = self.ask(method, path, *given, **how)
        assert 400 <= status < 500, (status, answer)
        assert answer.keys() == {"error"}
        error = answer["error"]
        assert error.keys() == {"message", "type", "code", "param"}
        assert error["message"] and "\n" not in error["message"]
        assert len(error["message"]) < 500
        assert "Traceback" not in error["message"]
        return {**error, "status": status, "headers": headers}

    def events(self, job_id: str, *, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the events of a job until its stream ends."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            connection.request("GET", f"/v1/videos/{job_id}/events", headers=headers)
            answer = connection.getresponse()
            assert answer.headers.get_content_type() == "text/event-stream"
            for line in answer:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)
        finally:
            connection.close()

    def finished(self, values: dict[str, Any], **how: Any) -> dict[str, Any]:
        """Create a job and follow it to its end."""
        job = self.create(values, **how)
        *_, (_, last) = self.events(job["id"])
        assert last["status"] == "completed", last["error"]
        return last


Start = Callable[..., Running]


def config_of(model: Path, folder: Path, **values: Any) -> ServeConfig:
    """Return a config of one worker in this process."""
    worker = {"model": str(model), "devices": ["cpu"]}
    given = {"worker": [worker], "executor": "local", "folder": folder, **values}
    return ServeConfig.model_validate(given)
