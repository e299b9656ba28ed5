"""Open-loop load on any server of OpenAI's Videos API, and what became of each request.

samples = [*send(server, request, times=arrivals(0.5, 200, seed=0), poll_s=0.1)]
score(samples, slo).attainment

Requests are sent at their times whether or not others have ended, so a slow server gets no slower
load. The clock of one runs from its POST to the last byte of its file at the client.
"""

from __future__ import annotations

import http.client
import json
import math
import queue
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

from fastvideo import media
from fastvideo_inference.goodput.plan import WARM_UP, Slo

TIMEOUT_S = 600.0  # of one request, after which it is given up as failed
_QUANTILES = (0.5, 0.95, 0.99)
_LATE_SEND_S = 0.1


@dataclass(frozen=True)
class Server:
    """Where to send, and the key; requests go as multipart forms, as OpenAI's own client sends."""

    url: str
    api_key: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no URL."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server {self.url!r} must look like http://127.0.0.1:8000")


@dataclass(frozen=True)
class Sample:
    """One request: when it was to be sent and was (seconds since the start), and its end.

    `status` is "completed", "rejected" (429, 503), or "failed" with `error`. `latency_s` is from
    POST to the last byte, of a rejected one to its answer. `server` is what the server says took
    how long; `frames` how many frames the file holds, 0 if it cannot be decoded.
    """

    due_s: float
    sent_s: float
    status: str
    latency_s: float
    frames: int = 0
    error: str = ""
    server: Mapping[str, float] = field(default_factory=dict)


def send(
    server: Server,
    fields: Sequence[Mapping[str, Any]],
    times: Sequence[float],
    *,
    poll_s: float,
) -> Iterator[Sample]:
    """Send a request at each of the times, of fields in turn, and yield samples as they end."""
    started, ended = time.perf_counter(), queue.Queue[Sample]()
    with tempfile.TemporaryDirectory() as folder:

        def one(index: int, due_s: float) -> None:
            sent = time.perf_counter()
            path = Path(folder, f"{index}.mp4")
            values = {k: str(v) for k, v in fields[index % len(fields)].items()}
            status, error, told = _follow(server, values, path, poll_s=poll_s)
            latency_s = time.perf_counter() - sent
            ended.put(
                Sample(due_s, sent - started, status, latency_s, error=error, server=told)
                if status != "completed"
                else Sample(due_s, sent - started, status, latency_s, _frames(path), server=told)
            )

        def start_all() -> None:
            for index, due_s in enumerate(times):
                time.sleep(max(0.0, started + due_s - time.perf_counter()))
                threading.Thread(target=one, args=(index, due_s), daemon=True).start()

        threading.Thread(target=start_all, daemon=True).start()
        for _ in times:
            yield ended.get()


def _follow(
    server: Server, values: dict[str, str], path: Path, *, poll_s: float
) -> tuple[str, str, dict[str, float]]:
    """Make one clip; return how it ended, why, and the server's own seconds."""
    give_up = time.perf_counter() + TIMEOUT_S
    try:
        with closing(_Client(server)) as client:
            status, body = client.ask("POST", "/v1/videos", values)
            if status in (429, 503):
                return "rejected", _message(body), {}
            job = _json(status, body)
            while job["status"] in ("queued", "in_progress"):
                if time.perf_counter() > give_up:
                    return "failed", f"not done after {TIMEOUT_S:g} s", {}
                time.sleep(poll_s)
                job = _json(*client.ask("GET", f"/v1/videos/{job['id']}"))
            if job["status"] != "completed":
                return "failed", str((job.get("error") or {}).get("message", job["status"])), {}
            status, body = client.ask("GET", f"/v1/videos/{job['id']}/content")
            if status != 200:
                return "failed", _message(body), {}
            path.write_bytes(body)
            return "completed", "", _told(job)
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return "failed", f"{type(error).__name__}: {error}", {}


class _Client:
    """One kept connection."""

    def __init__(self, server: Server) -> None:
        parts = urlsplit(server.url)
        is_secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        assert parts.hostname, "checked above"
        self._connection = kind(parts.hostname, parts.port, timeout=TIMEOUT_S)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {server.api_key}"} if server.api_key else {}

    def ask(
        self, method: str, path: str, values: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Return the status and the body of an answer."""
        headers, body = dict(self._headers), b""
        if values is not None:
            mark = token_hex(16)
            headers["content-type"] = f"multipart/form-data; boundary={mark}"
            form = "".join(
                f'--{mark}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
                for name, value in values.items()
            )
            body = f"{form}--{mark}--\r\n".encode()
        self._connection.request(method, self._base + path, body or None, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


def _json(status: int, body: bytes) -> dict[str, Any]:
    if status >= 400:
        raise ValueError(_message(body))
    found: dict[str, Any] = json.loads(body)
    return found


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _told(job: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds that a server tells of a job, where it does: ours in all."""
    stages = job.get("stage_seconds") or {}
    told = {f"stage.{name}": float(s) for name, s in stages.items()}
    if job.get("accepted_at_s") is not None and job.get("finished_at_s") is not None:
        told["total"] = job["finished_at_s"] - job["accepted_at_s"]
        told["waits"] = told["total"] - sum(stages.values())
    return told


def _frames(path: Path) -> int:
    try:
        return len(media.read_video(path)[0])
    except (ValueError, OSError):
        return 0
    finally:
        path.unlink()


@dataclass(frozen=True)
class Score:
    """What a run at one rate gave; shares are of attempted requests after the first tenth.

    `attainment` counts requests that are in time *and* whose file holds the frames asked for;
    `attainment_3x` those within three times what one alone takes. `wrong_rejects` are refused ones
    after which a later one was taken and was done before the refused one's own deadline.
    """

    attempted: int
    attainment: float
    attainment_3x: float | None
    statuses: Mapping[str, int]
    invalid: int
    late_accepts: int
    wrong_rejects: int
    late_sends: int
    latency_s: Mapping[str, float]
    server_s: Mapping[str, Mapping[str, float]]


def score(
    samples: Sequence[Sample], slo: Slo, *, num_frames: int, alone_s: float | None = None
) -> Score:
    """Return the score of a run; `alone_s` is a clip's seconds on an idle server."""
    ordered = sorted(samples, key=lambda one: one.due_s)
    kept = ordered[int(len(ordered) * WARM_UP) :]

    def within(limit_s: float) -> float:
        good = (s.status == "completed" and s.frames == num_frames for s in kept)
        return sum(g and s.latency_s <= limit_s for g, s in zip(good, kept, strict=True)) / len(
            kept
        )

    done = [s for s in kept if s.status == "completed"]
    names = sorted({name for s in done for name in s.server})
    return Score(
        attempted=len(kept),
        attainment=within(slo.deadline_s),
        attainment_3x=within(3 * alone_s) if alone_s else None,
        statuses=Counter(s.status for s in kept),
        invalid=sum(s.frames != num_frames for s in done),
        late_accepts=sum(s.latency_s > slo.deadline_s for s in done),
        wrong_rejects=sum(_is_wrong(s, kept, slo.deadline_s) for s in kept),
        late_sends=sum(s.sent_s - s.due_s > _LATE_SEND_S for s in kept),
        latency_s=_quantiles([s.latency_s for s in done]),
        server_s={n: _quantiles([s.server[n] for s in done if n in s.server]) for n in names},
    )


def _is_wrong(sample: Sample, samples: Sequence[Sample], deadline_s: float) -> bool:
    """Tell whether a refused request could have been done, since a later one was."""
    if sample.status != "rejected":
        return False
    limit = sample.sent_s + deadline_s
    later = (s for s in samples if s.status == "completed" and s.sent_s >= sample.sent_s)
    return any(s.sent_s + s.latency_s <= limit for s in later)


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"p{100 * q:g}": ordered[max(0, math.ceil(q * len(ordered)) - 1)] for q in _QUANTILES}
