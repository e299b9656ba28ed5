"""Open-loop load on any server of OpenAI's Videos API, and what became of each request.

samples = send(server, requests, times=arrivals(0.5, 200, seed=0), poll_s=0.1)
score(samples, slo, num_frames=81).attainment

Requests are sent at their times whether or not others have ended, so a slow server gets no slower
load. Latency runs from POST to the last byte of the file at the client; files are decoded after the
run, since the server may share this machine.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

from fastvideo import media
from fastvideo_inference.goodput.plan import WARM_UP, Slo

TIMEOUT_S = 600.0  # of one request, which then failed
_QUANTILES = (0.5, 0.9, 0.95, 0.99)
_LATE_SEND_S = 0.1
_GONE = "server is gone"
_REJECTED = (429, 503, 529)


@dataclass(frozen=True)
class Server:
    """Where to send, and the key; requests go as multipart forms, as OpenAI's own client sends."""

    url: str
    api_key: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no URL."""
        parts = urlsplit(self.url)
        try:
            is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is none
            is_url = False
        if not is_url:
            raise ValueError(f"server {self.url!r} must look like http://127.0.0.1:8000")

    def is_gone(self) -> bool:
        """Tell whether nothing listens there any more."""
        client = _Client(self)
        try:
            client.connection.connect()
        except OSError:
            return True
        finally:
            client.connection.close()
        return False


@dataclass(frozen=True)
class Sample:
    """One request: when it was due and sent (seconds since the start), and its end.

    `status` is "completed", "rejected" (429, 503, 529; `retry_after_s` if the server says when), or
    "failed" with `error`. `latency_s` of a rejected request ends with the answer. `server` holds
    the server's own seconds; `frames` how many the file holds, 0 if it cannot be decoded.
    """

    due_s: float
    sent_s: float
    status: str
    latency_s: float
    frames: int = 0
    error: str = ""
    retry_after_s: float | None = None
    server: Mapping[str, float] = field(default_factory=dict)


def send(
    server: Server,
    fields: Sequence[Mapping[str, Any]],
    times: Sequence[float],
    *,
    poll_s: float,
) -> list[Sample]:
    """Send a request at each of the times, of fields in turn; stop early if the server is gone."""
    started, ended, stop = time.perf_counter(), queue.Queue[tuple[int, Sample]](), threading.Event()
    samples: dict[int, Sample] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:

        def one(index: int, due_s: float) -> None:
            sent = time.perf_counter()
            values = {k: str(v) for k, v in fields[index % len(fields)].items()}
            found = follow(server, values, Path(folder, str(index)), poll_s=poll_s, stop=stop)
            latency_s = time.perf_counter() - sent
            ended.put((index, Sample(due_s, sent - started, latency_s=latency_s, **found)))

        def start_all() -> None:
            for index, due_s in enumerate(times):
                if stop.wait(max(0.0, started + due_s - time.perf_counter())):
                    return
                threading.Thread(target=one, args=(index, due_s), daemon=True).start()

        threading.Thread(target=start_all, daemon=True).start()
        try:
            while len(samples) < len(times) and is_complete(samples.values()):
                index, sample = ended.get()
                samples[index] = sample
        finally:
            stop.set()
        return [
            replace(one, frames=_frames(Path(folder, str(index))))
            if one.status == "completed"
            else one
            for index, one in sorted(samples.items())
        ]


def is_complete(samples: Iterable[Sample]) -> bool:
    """Tell whether the server lived to the end of a run."""
    return not any(one.error.startswith(_GONE) for one in samples)


def follow(
    server: Server,
    values: Mapping[str, str],
    path: Path | None,
    *,
    poll_s: float,
    stop: threading.Event,
) -> dict[str, Any]:
    """Make one clip, its file at `path`; return the fields of a sample that tell how it ended."""
    give_up, client = time.perf_counter() + TIMEOUT_S, _Client(server)
    try:
        answer, body = client.ask("POST", "/v1/videos", values)
        if answer.status in _REJECTED:
            after = answer.headers.get("retry-after", "")
            after_s = float(after) if after.isdigit() else None
            return {"status": "rejected", "error": _message(body), "retry_after_s": after_s}
        while (job := _checked(answer, body))["status"] in ("queued", "in_progress"):
            if stop.wait(poll_s) or time.perf_counter() > give_up:
                return {"status": "failed", "error": f"not done in {TIMEOUT_S:g} s"}
            answer, body = client.ask("GET", f"/v1/videos/{job['id']}")
        if job["status"] != "completed":
            raise ValueError((job.get("error") or {}).get("message", job["status"]))
        answer, body = client.ask("GET", f"/v1/videos/{job['id']}/content")
        content = _checked(answer, body, is_json=False)
        if path:
            path.write_bytes(content)
        return {"status": "completed", "server": _server_s(job)}
    except Exception as error:  # whatever a server answers, a request has an end
        is_lost = isinstance(error, OSError | http.client.HTTPException) and server.is_gone()
        text = f"{type(error).__name__}: {error}"
        return {"status": "failed", "error": f"{_GONE}: {text}" if is_lost else text}
    finally:
        client.connection.close()


class _Client:
    """One kept connection."""

    def __init__(self, server: Server) -> None:
        parts = urlsplit(server.url)
        is_secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        assert parts.hostname, "checked above"
        self.connection = kind(parts.hostname, parts.port, timeout=TIMEOUT_S)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {server.api_key}"} if server.api_key else {}

    def ask(
        self, method: str, path: str, values: Mapping[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send a request, values as a form; return the answer and its body."""
        mark, headers = token_hex(16), dict(self._headers)
        fields = [
            f'--{mark}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in (values or {}).items()
        ]
        if fields:
            headers["content-type"] = f"multipart/form-data; boundary={mark}"
            fields.append(f"--{mark}--\r\n")
        self.connection.request(method, self._base + path, "".join(fields).encode(), headers)
        answer = self.connection.getresponse()
        return answer, answer.read()


def _checked(answer: http.client.HTTPResponse, body: bytes, *, is_json: bool = True) -> Any:
    if answer.status >= 400:
        raise ValueError(_message(body))
    return json.loads(body) if is_json else body


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _server_s(job: Mapping[str, Any]) -> dict[str, float]:
    """Return a server's own seconds of a job, if it has such fields: stages, total and the rest."""
    stages = job.get("stage_seconds") or {}
    found = {f"stage.{name}": float(s) for name, s in stages.items()}
    if job.get("accepted_at_s") is not None and job.get("finished_at_s") is not None:
        found["total"] = job["finished_at_s"] - job["accepted_at_s"]
        found["queue"] = max(0.0, found["total"] - sum(stages.values()))
    return found


def _frames(path: Path) -> int:
    try:
        return len(media.read_video(path)[0])
    except (ValueError, OSError):
        return 0
    finally:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Score:
    """Counts and shares of a run, of attempted requests after the first tenth.

    `attainment` counts requests in time *and* whose file holds the frames asked for;
    `attainment_3x` those within three times the seconds of a clip alone. Seconds are of completed
    requests; the server's "queue" is all of its time in which no stage worked. `late_accepts` were
    taken and ended late, `wrong_rejects` were refused although a later request ended before their
    deadline, `untimed_rejects` without a time at which they would fit.
    """

    attempted: int
    attainment: float
    attainment_3x: float | None
    throughput_per_s: float
    statuses: Mapping[str, int]
    invalid: int
    late_accepts: int
    wrong_rejects: int
    untimed_rejects: int
    late_sends: int
    latency_s: Mapping[str, float]
    server_s: Mapping[str, Mapping[str, float]]


def score(
    samples: Sequence[Sample],
    slo: Slo,
    *,
    num_frames: int,
    alone_s: float | None = None,
    warm_up: float = WARM_UP,
) -> Score:
    """Return the score of a run; `alone_s` is a clip's seconds on an idle server.

    `warm_up`: the share of the requests, the first ones, that is dropped.
    """
    ordered = sorted(samples, key=lambda one: one.due_s)
    kept = ordered[int(len(ordered) * warm_up) :]
    done = [s for s in kept if s.status == "completed"]
    rejected = [s for s in kept if s.status == "rejected"]
    spent_s = max((s.sent_s + s.latency_s for s in kept), default=0.0) - kept[0].due_s

    def within(limit_s: float) -> float:
        return sum(s.frames == num_frames and s.latency_s <= limit_s for s in done) / len(kept)

    return Score(
        attempted=len(kept),
        attainment=within(slo.deadline_s),
        attainment_3x=within(3 * alone_s) if alone_s else None,
        throughput_per_s=len(done) / spent_s,
        statuses=dict(Counter(s.status for s in kept)),
        invalid=sum(s.frames != num_frames for s in done),
        late_accepts=sum(s.latency_s > slo.deadline_s for s in done),
        wrong_rejects=sum(_is_wrong(s, done, slo.deadline_s) for s in rejected),
        untimed_rejects=sum(s.retry_after_s is None for s in rejected),
        late_sends=sum(s.sent_s - s.due_s > _LATE_SEND_S for s in kept),
        latency_s=_quantiles([s.latency_s for s in done]),
        server_s={
            name: _quantiles([s.server[name] for s in done if name in s.server])
            for name in sorted({name for s in done for name in s.server})
        },
    )


def _is_wrong(rejected: Sample, done: Sequence[Sample], deadline_s: float) -> bool:
    """Tell whether a refused request could have been done, since a later one was."""
    limit_s = rejected.sent_s + deadline_s
    return any(rejected.sent_s <= s.sent_s <= limit_s - s.latency_s for s in done)


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"p{100 * q:g}": ordered[max(0, math.ceil(q * len(ordered)) - 1)] for q in _QUANTILES}
