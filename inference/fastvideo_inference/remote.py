"""A server of `fastvideo serve` as a pipeline: the same call, and jobs that one may follow.

pipe = VideoPipeline.connect("http://127.0.0.1:8000")
pipe("a big red ball moving left at night", seed=1).save("ball.mp4")
job = pipe.submit("a big red ball moving left at night")
for event in job.events(): ...
"""

from __future__ import annotations

import base64
import http.client
import json
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from fastvideo import files, media, sampling
from fastvideo.errors import one_line
from fastvideo.log import logger
from fastvideo.sampling import GenerateRequest, read_layers
from fastvideo.stages import Notice, Progress
from fastvideo_inference import diffusers_names
from fastvideo_inference.video import Video

if TYPE_CHECKING:
    from fastvideo_inference.video import Frames

_TIMEOUT_S = 60.0  # a stream of events is never silent for so long
_CANCEL_S = 5.0  # for a job to be cancelled, while somebody waits for us to end
_RECONNECT_S = 60.0  # in which a server that was restarted may come back
_RETRY_S = 0.5


class BusyError(RuntimeError):
    """The server takes no more jobs for now; ask again after `retry_after_s`.

    It `is_full`, or else starting, ending or broken.
    """

    def __init__(self, message: str, *, retry_after_s: float, is_full: bool) -> None:
        super().__init__(message)
        self.retry_after_s, self.is_full = retry_after_s, is_full


@dataclass(frozen=True)
class PreviewImage:
    """A PNG contact sheet of what a clip looks like after step `index`."""

    stage: str
    index: int
    png: bytes


RemoteEvent: TypeAlias = Progress | Notice | PreviewImage


@dataclass(frozen=True)
class RemoteVideo(Video):
    """A clip that a server made. Its `frames` are decoded from the mp4, which is lossy, and its
    `frames_sha256` is that of the server's frames before the encoder; `save` writes the server's
    bytes.
    """

    data: bytes = b""
    digest: str = ""
    notices: tuple[str, ...] = ()

    @property
    def frames_sha256(self) -> str:
        """Digest of the frames as the server decoded them."""
        return self.digest

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the server's mp4; raise `FileExistsError` rather than overwrite."""
        path = media.check_output(path, overwrite=overwrite)
        with files.atomic(path, overwrite=overwrite) as new:
            new.write_bytes(self.data)
        return path


class Connection:
    """Requests to one server. Raises `ValueError` for what it refuses, `PermissionError` for the
    key, `BusyError` for later, `ConnectionError` if it is not there, else `RuntimeError`.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server {url!r} must look like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        self._key = f"Bearer {api_key}" if api_key else ""
        self._opener = build_opener(ProxyHandler({}))

    def json(
        self, method: str, path: str, values: dict[str, Any] | None = None, **how: Any
    ) -> dict[str, Any]:
        """Send values and return the answer's; `how` as in `open`."""
        with self.open(method, path, values, **how) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        values: dict[str, Any] | None = None,
        *,
        key: str = "",
        timeout_s: float = _TIMEOUT_S,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request, and give the answer to read from; twice with one `key` is once."""
        data = None if values is None else json.dumps(values).encode()
        headers = {**self._headers, **({"idempotency-key": key} if key else {})}
        request = Request(self.url + path, data, headers, method=method)
        if self._key:  # for this server alone, wherever it redirects to
            request.add_unredirected_header("authorization", self._key)
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                yield answer
        except HTTPError as error:
            raise _refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            why = one_line(reason) if isinstance(reason, Exception) else reason
            raise ConnectionError(f"server {self.url} does not answer: {why}") from None


def read_key(text: str | None) -> str | None:
    """Return an API key, or the one in the file that @FILE names."""
    if text is None or not text.startswith("@"):
        return text
    return files.read_text(text[1:]).strip()


def _refusal(answer: HTTPError) -> Exception:
    try:
        message = str(json.loads(answer.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        message = f"the server answers {answer.code} {answer.reason}"
    if answer.code in (429, 503):
        wait = answer.headers.get("retry-after", "1")
        wait_s = float(wait) if wait.isdigit() else 1.0
        return BusyError(message, retry_after_s=wait_s, is_full=answer.code == 429)
    if answer.code in (401, 403):
        return PermissionError(message)
    return ValueError(message) if answer.code < 500 else RuntimeError(message)


class _Patience:
    """How long a server that does not answer, or that says 503, may come back."""

    def __init__(self) -> None:
        self._since_s: float | None = None

    def check(self, error: Exception) -> None:
        """Raise the error if the time is over; say it the first time."""
        if self._since_s is None:
            self._since_s = time.monotonic()
            logger.warning("%s; asked again for %d s", one_line(error), _RECONNECT_S)
        if time.monotonic() - self._since_s > _RECONNECT_S:
            raise error


class Job:
    """One clip that a server makes; `values` are those of its last answer."""

    def __init__(self, connection: Connection, values: dict[str, Any]) -> None:
        self._connection = connection
        self.values = values

    @property
    def id(self) -> str:
        """The server's name of it."""
        return str(self.values["id"])

    @property
    def status(self) -> str:
        """As last heard: queued, in_progress, completed or failed."""
        return str(self.values["status"])

    @property
    def queue_position(self) -> int | None:
        """How many jobs the server makes before it, asked now; None once it is begun."""
        self.values = self._connection.json("GET", self._path)
        position: int | None = self.values["queue_position"]
        return position

    def events(self) -> Generator[RemoteEvent, None, None]:
        """Yield what happens until the job has ended; a lost connection is made again."""
        patience = _Patience()
        while self.is_open:
            try:
                for event in self._events():
                    patience = _Patience()
                    if event is not None:
                        yield event
            except (ConnectionError, BusyError) as error:
                patience.check(error)
            if self.is_open:
                time.sleep(_RETRY_S)

    def result(self, *, decode: bool = True) -> RemoteVideo:
        """Wait for the clip and fetch it; `RuntimeError` says why there is none.

        Without `decode` its `frames` are None: its file can be saved all the same.
        """
        deque(self.events(), maxlen=0)
        if self.status != "completed":
            failure = self.values["error"] or {}
            raise RuntimeError(failure.get("message") or f"the job ended as {self.status}")
        data = self._content()
        return RemoteVideo(
            fps=self.values["fps"],
            recipe=self.values["recipe"],
            timings=self.values["stage_seconds"],
            frames=_frames(data) if decode else None,
            data=data,
            digest=self.values["frames_sha256"],
            notices=tuple(self.values["notices"]),
        )

    def cancel(self) -> None:
        """Have the server stop at the next step, and forget the job and its file."""
        with suppress(ValueError):  # it is not there any more
            self._connection.json("DELETE", self._path, timeout_s=_CANCEL_S)

    @property
    def _path(self) -> str:
        return f"/v1/videos/{self.id}"

    @property
    def is_open(self) -> bool:
        """Whether it had not ended when last heard of."""
        return self.status in ("queued", "in_progress")

    def _content(self) -> bytes:
        patience = _Patience()
        while True:
            try:
                with self._connection.open("GET", f"{self._path}/content") as answer:
                    return answer.read()
            except (ConnectionError, BusyError) as error:
                patience.check(error)
                time.sleep(_RETRY_S)

    def _events(self) -> Iterator[RemoteEvent | None]:
        """Yield None once the server answers, then what happens."""
        with self._connection.open("GET", f"{self._path}/events") as answer:
            yield None
            for event, values in _server_sent(answer):
                if event == "status":  # alone, if the job was deleted meanwhile
                    self.values = {**self.values, **values}
                elif event == "progress":
                    yield Progress(values["stage"], values["index"], values["total"])
                elif event == "notice":
                    yield Notice(values["stage"], values["text"])
                elif event == "preview":
                    png = base64.b64decode(values["png"])
                    yield PreviewImage(values["stage"], values["index"], png)


def _frames(data: bytes) -> Frames:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "clip.mp4")
        file.write_bytes(data)
        return media.read_video(file)[0]


def _server_sent(lines: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    event, data = "", ""
    for line in lines:
        name, _, value = line.decode().rstrip("\r\n").partition(": ")
        if name == "event":
            event = value
        elif name == "data":
            data = value
        elif not name and data:
            yield event, json.loads(data)
            event, data = "", ""


class RemotePipeline:
    """`VideoPipeline.connect(URL)`: the call of a pipeline, made by a server."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        decoder: str | None = None,
        slo_class: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self._connection = Connection(url, api_key=api_key)
        beside = {"model": model, "decoder": decoder, "slo_class": slo_class}
        self._beside = {name: value for name, value in beside.items() if value is not None}

    def __call__(
        self, prompt: str | Sequence[str], *, count: int | None = None, **fields: Any
    ) -> Video | list[Video]:
        """Make clips with the keywords of `VideoPipeline`; see `RemoteVideo`.

        Refused are `latents`, `output="latents"`, callbacks, and what the server's operator
        decides: attention, backend, drop_gates. `lora` names those of the server's config.
        """
        requests, is_one = self._requests(prompt, count, fields)
        with closing(self.jobs(requests)) as jobs:
            made: list[Video] = [job.result() for job in jobs]
        return made[0] if is_one else made

    def offers(self) -> dict[str, Any]:
        """Return what the server offers: models (`data`) with their defaults and limits, names of
        LoRAs and SLO classes, its own limits, and whether it is ready.
        """
        return self._connection.json("GET", "/v1/models")

    def requests(
        self, prompt: str | Sequence[str], *, count: int | None = None, **fields: Any
    ) -> list[GenerateRequest]:
        """Return the requests of a call, each with its seed, for `send` or `jobs`."""
        return self._requests(prompt, count, fields)[0]

    def _requests(
        self, prompt: str | Sequence[str], count: int | None, fields: dict[str, Any]
    ) -> tuple[list[GenerateRequest], bool]:
        """Return the requests of a call, and whether it asks for one clip rather than a list."""
        own = {} if count is None else {"count": count}
        fields = diffusers_names.merged(own, fields, None)
        count, seed = fields.pop("count", None), fields.pop("seed", None)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        seeds = seed if isinstance(seed, list | tuple | range) else [seed]
        asked = [self._request(one, {**fields, "seed": s}) for one in prompts for s in seeds]
        each = 1 if count is None else count
        clips = [clip for one in asked for clip in sampling.clips(one, each)]
        return clips, isinstance(prompt, str) and count is None and seeds is not seed

    def submit(self, prompt: str, *, previews: bool = False, **fields: Any) -> Job:
        """Have the server queue a clip; `BusyError` if its queue is full."""
        return self.send(self._request(prompt, fields), previews=previews)

    def send(self, request: GenerateRequest, *, previews: bool = False) -> Job:
        """Have the server queue a request that was read before."""
        values = {**request.model_dump(exclude_none=True), **self._beside, "previews": previews}
        create = partial(self._connection.json, "POST", "/v1/videos", values, key=token_hex(16))
        try:
            return Job(self._connection, create())
        except ConnectionError:  # if the answer alone was lost, the same key finds its job
            time.sleep(_RETRY_S)
            return Job(self._connection, create())
        except KeyboardInterrupt:  # the server may have accepted it
            with suppress(Exception):
                Job(self._connection, create(timeout_s=_CANCEL_S)).cancel()
            raise

    def jobs(self, requests: Sequence[GenerateRequest]) -> Generator[Job, None, None]:
        """Yield a job for each request, in order, queued as far ahead as the server takes them.

        Jobs that have not ended when the iterator is closed are cancelled.
        """
        todo, queued, patience = deque(requests), deque[Job](), _Patience()
        try:
            while todo or queued:
                try:
                    while todo:
                        queued.append(self.send(todo[0]))
                        todo.popleft()
                except BusyError as busy:
                    if not queued:
                        if not busy.is_full:
                            patience.check(busy)
                        time.sleep(busy.retry_after_s)
                        continue
                yield queued[0]
                queued.popleft()
        finally:
            for job in (job for job in queued if job.is_open):
                with suppress(OSError, RuntimeError):  # the server is gone, and knows what is next
                    job.cancel()

    def _request(self, prompt: str, fields: dict[str, Any]) -> GenerateRequest:
        merged = diffusers_names.merged({}, fields, None)
        given = {name: value for name, value in merged.items() if value is not None}
        if given.pop("output", "frames") != "frames":
            raise ValueError("output: a server sends clips as mp4; latents stay there")
        for name in ("latents", "callback_on_step_end"):
            if name in given:
                raise ValueError(f"{name} does not go over HTTP; load the model here")
        return read_layers(("the call", {"prompt": prompt, **given}))
