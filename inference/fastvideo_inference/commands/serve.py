"""`fastvideo serve`: an HTTP server of OpenAI's Videos API, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from fastvideo import files
from fastvideo.errors import OK, RefusedError, Terminated, refusing
from fastvideo.log import logger

if TYPE_CHECKING:
    import socket

    from fastvideo_inference.engine.config import ServeConfig

_FORMAT = "%(asctime)s %(levelname)s [%(request_id)s] %(message)s"


def serve(
    config: Annotated[Path | None, Option(help="TOML file. [all bundled models]")] = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    executor: Annotated[
        Literal["local", "process"] | None, Option(help="Where stages run. [process]")
    ] = None,
    check: Annotated[bool, Option("--check", help="Validate the config and end.")] = False,
) -> int:
    """Serve OpenAI's Videos API. SIGTERM or Ctrl-C accepts no more jobs and drains."""
    started = time.perf_counter()
    missing = [name for name in ("fastapi", "uvicorn", "python_multipart") if not find_spec(name)]
    if missing:
        text = f"serve needs {', '.join(missing)}; install with: pip install 'fastvideo[serve]'"
        raise RefusedError(text)
    from fastvideo_inference.serve import app
    from fastvideo_inference.serve import config as configs

    with refusing():
        found = configs.read(config, executor=executor)
        found = found.model_copy(update={"hosts": (*found.hosts, host)})
        if check:
            print(f"{config or 'the defaults'}: ok")
            return OK
        listener = app.listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}"
    print(url, flush=True)
    return _serve(found, listener, ready=f"{url} is ready after {{:.1f}} s", started=started)


def _serve(config: ServeConfig, listener: socket.socket, *, ready: str, started: float) -> int:
    from fastvideo_inference.serve.app import serve as run
    from fastvideo_inference.serve.guard import RequestIdFilter

    for handler in logger.handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.addFilter(RequestIdFilter())
    logging.getLogger("uvicorn").handlers = logger.handlers
    files.allow_many_claims()  # each client that follows a job holds a socket

    def announce() -> None:
        spent_s = time.perf_counter() - started
        print(ready.format(spent_s), file=sys.stderr, flush=True)

    async def until_signal() -> int:
        signals = asyncio.Queue[int]()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
        return await run(config, listener=listener, signals=signals, on_ready=announce)

    if asyncio.run(until_signal()) == signal.SIGTERM:
        raise Terminated
    raise KeyboardInterrupt
