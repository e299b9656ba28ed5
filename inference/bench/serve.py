"""What a first user of `fastvideo serve` waits for, on this machine.

python inference/bench/serve.py                     # the bundled model, all defaults
python inference/bench/serve.py --config x.toml     # any words of `serve`

Prints the seconds from typing the command to the last byte of a first clip, and the milliseconds of
a status read on a kept connection while a second, larger clip is made.
"""

from __future__ import annotations

import http.client
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

PAUSE_S = 0.02  # between two reads, as of a busy client


def main() -> None:
    """Start a server in a folder of its own, measure, and end it."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "fastvideo", "serve", "--port", "0", *sys.argv[1:]]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rpartition(":")[2])
            listening_s = time.perf_counter() - started
            connection = http.client.HTTPConnection("127.0.0.1", port)
            job = follow(connection, {"prompt": "a big red ball moving left", "seed": 1}, [])
            ask(connection, "GET", f"/v1/videos/{job['id']}/content")
            first_s = time.perf_counter() - started
            reads_s: list[float] = []
            large = {"prompt": "a big red ball", "seed": 2, "size": "256x256"}
            follow(connection, large, reads_s)
        finally:
            server.send_signal(signal.SIGTERM)
    cuts = statistics.quantiles(reads_s, n=100)
    print(f"listening after {listening_s:.2f} s, last byte of the first clip {first_s:.2f} s")
    print(f"{len(reads_s)} status reads: median {1e3 * cuts[49]:.2f} ms, p99 {1e3 * cuts[98]:.2f}")


def follow(
    connection: http.client.HTTPConnection, values: dict[str, Any], reads_s: list[float]
) -> dict[str, Any]:
    """Have a clip made, and note how long each read of its status took."""
    job = json.loads(ask(connection, "POST", "/v1/videos", values))
    while job["status"] in ("queued", "in_progress"):
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        answer = ask(connection, "GET", f"/v1/videos/{job['id']}")
        reads_s.append(time.perf_counter() - started)
        job = json.loads(answer)
    assert job["status"] == "completed", job["error"]
    return dict(job)


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    values: dict[str, Any] | None = None,
) -> bytes:
    """Return the body of an answer."""
    headers = {"content-type": "application/json"}
    connection.request(method, path, json.dumps(values) if values else None, headers)
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, body
    return body


if __name__ == "__main__":
    main()
