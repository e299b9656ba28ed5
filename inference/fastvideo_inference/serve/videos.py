"""OpenAI's Videos API over the engine: create, retrieve, list, content, events, delete."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from fastvideo import media
from fastvideo.errors import one_line
from fastvideo.log import logger
from fastvideo_inference.engine.config import ServeConfig
from fastvideo_inference.engine.engine import Engine
from fastvideo_inference.engine.job import (
    TERMINAL,
    ConflictError,
    EngineStoppingError,
    Job,
    JobEvent,
    LateError,
    QueueFullError,
)
from fastvideo_inference.serve import body
from fastvideo_inference.serve.catalogue import Catalogue
from fastvideo_inference.serve.errors import ApiError, json_response
from fastvideo_inference.serve.keys import Keys

_ID = re.compile(r"video_[0-9a-f]{32}")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_POLL_MS = (100, 1000)
_MAX_WAIT_S = 60.0  # in a full queue a place may be free earlier than anybody knows
_DELETE_S = 5.0  # for the journal, whose disk may be full
_PING_S = 10.0  # of silence, after which a stream says that it is alive


class Videos:
    """The routes under /v1/videos; `is_draining` refuses new jobs, `rejected` counts refusals."""

    def __init__(self, engine: Engine, config: ServeConfig, catalogue: Catalogue) -> None:
        self._engine, self._config, self._catalogue = engine, config, catalogue
        self.keys = Keys(config.key)
        self.rejected: Counter[str] = Counter()
        self.is_draining = False

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an app."""
        kinds = ("application/json", "multipart/form-data")
        content = {kind: {"schema": body.schema(self._catalogue.models)} for kind in kinds}
        extra = {"requestBody": {"content": content, "required": True}}
        app.add_api_route("/v1/videos", self.create, methods=["POST"], openapi_extra=extra)
        app.add_api_route("/v1/videos", self.list, methods=["GET"])
        app.add_api_route("/v1/videos/{video_id}", self.retrieve, methods=["GET"])
        app.add_api_route("/v1/videos/{video_id}", self.delete, methods=["DELETE"])
        app.add_api_route("/v1/videos/{video_id}/content", self.content, methods=["GET"])
        app.add_api_route("/v1/videos/{video_id}/events", self.events, methods=["GET"])

    async def create(self, request: Request) -> Response:
        """Accept a job for each clip; once this is answered they survive a restart."""
        try:
            job = await self._create(request)
        except ApiError as error:
            self.rejected[error.code] += 1
            raise
        logger.info("%s is accepted, for %s", job.id, job.submission.model)
        return self._answer(job)

    async def _create(self, request: Request) -> Job:
        owner = self.keys.owner(request)
        key = request.headers.get("idempotency-key", "")
        if key and not _IDEMPOTENCY_KEY.fullmatch(key):
            text = "Idempotency-Key must be 1 to 255 printable ASCII characters"
            raise ApiError(400, text, code="invalid_value")
        fields = await body.read(request)
        read = partial(
            body.submission,
            catalogue=self._catalogue,
            limits=self._config.limits,
            is_adaptive=any(one.allow_smaller for one in self._config.class_),
        )
        asked = replace(await asyncio.to_thread(read, fields), owner=owner, idempotency_key=key)
        async with self.keys.locks[owner]:
            try:
                is_new = self._engine.known(asked) is None  # a repeated request makes no clip
                if is_new:
                    self._check_limits(owner, clips=asked.count)
                job = await self._engine.submit(asked)
            except (ValueError, OSError) as error:
                raise _refusal(error) from None
            if is_new:
                self.keys.count(owner, clips=asked.count)
            return job

    def _check_limits(self, owner: str, *, clips: int) -> None:
        jobs = self._engine.jobs(owner=owner) if owner else []
        running = sum(job.status not in TERMINAL for job in jobs)
        self.keys.check(owner, running=running, clips=clips)

    async def retrieve(self, request: Request, video_id: str) -> Response:
        """Return a job; no worker is asked."""
        return self._answer(self._job(request, video_id))

    async def list(
        self,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str = "",
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """Return jobs of a key, newest first, those behind `after` in that order."""
        jobs = self._engine.jobs(owner=self.keys.owner(request))
        if order == "asc":
            jobs.reverse()
        if after:
            ids = [job.id for job in jobs]
            if after not in ids:
                raise ApiError(
                    404, "after must be the id of a video", code="not_found", param="after"
                )
            jobs = jobs[ids.index(after) + 1 :]
        data = [self._shape(job) for job in jobs[:limit]]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        ends = {"has_more": len(jobs) > limit, "first_id": first, "last_id": last}
        return json_response({"object": "list", "data": data, **ends})

    async def content(
        self, request: Request, video_id: str, variant: Literal["video", "thumbnail"] = "video"
    ) -> Response:
        """Return the mp4 or its first frame as WebP."""
        job = self._job(request, video_id)
        if job.path is None:
            text = f"the video is {_status(job)}; its content exists once it is completed"
            raise ApiError(409, text, code="video_not_ready")
        try:
            if variant == "thumbnail":
                image = await asyncio.to_thread(media.thumbnail, job.path)
                return Response(image, media_type="image/webp")
            facts = job.path.stat()
        except FileNotFoundError:  # it is being deleted
            raise _no_video() from None
        except (ValueError, OSError):
            text = "the file cannot be read any more"
            raise ApiError(409, text, code="video_damaged") from None
        name = f"{job.id}.mp4"
        return _File(job.path, media_type="video/mp4", filename=name, stat_result=facts)

    async def events(self, request: Request, video_id: str) -> Response:
        """Stream what happens to a job as server-sent events, until it has ended."""
        job = self._job(request, video_id)
        headers = {"cache-control": "no-store"}
        room = self.keys.stream(job.submission.owner, limit=self._config.limits.streams)
        return _Stream(self._lines(job.id), room, headers)

    async def _lines(self, job_id: str) -> AsyncIterator[str]:
        """Write events as text, and something after each silence, so that no client gives up."""
        events = self._engine.events(job_id)
        following = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                done, _ = await asyncio.wait([following], timeout=_PING_S)
                if not done:
                    yield ": alive\n\n"
                    continue
                event = following.result()
                if event is None:
                    return
                yield f"event: {event.kind}\ndata: {json.dumps(self._event(event))}\n\n"
                following = asyncio.ensure_future(anext(events, None))
        except KeyError:  # the job was deleted before the first event
            return
        finally:
            following.cancel()

    def _event(self, event: JobEvent) -> dict[str, Any]:
        job = self._engine.job(event.job_id)
        if event.kind == "status" and job is not None:
            return self._shape(job)
        match event.kind:
            case "preview":
                png = base64.b64encode(event.values["png"]).decode()
                return {**event.values, "png": png}
            case "notice":
                return {**event.values, "text": self._catalogue.public(event.values["text"])}
        return event.values

    async def delete(self, request: Request, video_id: str) -> Response:
        """Cancel a job and remove its file."""
        job = self._job(request, video_id)
        try:
            async with asyncio.timeout(_DELETE_S):
                with suppress(KeyError):  # another request did it meanwhile
                    await self._engine.delete(job.id)
        except EngineStoppingError as error:
            raise _refusal(error) from None
        except (OSError, TimeoutError) as error:
            raise _refusal(OSError(str(error) or "the journal does not answer")) from None
        return json_response({"id": job.id, "object": "video.deleted", "deleted": True})

    def _job(self, request: Request, video_id: str) -> Job:
        """Return a job of the request's key; to all others it does not exist."""
        owner = self.keys.owner(request)
        job = self._engine.job(video_id) if _ID.fullmatch(video_id) else None
        if job is None or job.submission.owner != owner:
            raise _no_video()
        return job

    def _answer(self, job: Job) -> Response:
        values = self._shape(job)
        low, high = _POLL_MS
        wait_ms = min(high, max(low, round(250 * (values["eta_s"] or 0))))
        return json_response(values, headers={"openai-poll-after-ms": str(wait_ms)})

    def _shape(self, job: Job) -> dict[str, Any]:
        """Return a job as OpenAI's clients read it, and beside that what ours read."""
        params, ended_s = job.submission.params, job.finished_at_s
        failure = job.failure
        is_complete, is_over = job.status == "completed", job.status in TERMINAL
        expires_s = None if ended_s is None else int(ended_s + self._config.limits.output_ttl_s)
        return {
            "id": job.id,
            "object": "video",
            "created_at": int(job.accepted_at_s),
            "completed_at": int(ended_s) if is_complete and ended_s is not None else None,
            "expires_at": expires_s,
            "status": _status(job),
            "progress": 100 if is_complete else min(99, int(100 * job.progress)),
            "prompt": params.prompt,
            "model": self._catalogue.id_of(job.submission.model),
            "seconds": f"{params.num_frames / params.fps:.4f}".rstrip("0").rstrip("."),
            "size": f"{params.width}x{params.height}",
            "error": failure
            and {"code": failure.code, "message": self._catalogue.public(failure.message)},
            "remixed_from_video_id": None,
            **params.model_dump(exclude={"prompt", "lora", "backend", "drop_gates"}),
            "clips": job.clips or (job.id,),
            "slo_class": job.slo_class,
            "queue_position": None if is_over else self._engine.queue_position(job.id),
            "eta_s": None if is_over else self._engine.eta_s(job.id),
            "predicted_s": job.predicted_s,
            "accepted_at_s": job.accepted_at_s,
            "finished_at_s": ended_s,
            "stage": job.stage or None,
            "stage_seconds": job.stage_seconds,
            "inference_time_s": sum(job.stage_seconds.values()) if is_complete else None,
            "frames_sha256": job.frames_sha256 or None,
            "notices": [self._catalogue.public(text) for text in job.notices],
            "recipe": job.recipe,
        }


class _File(FileResponse):
    """A file whose wrong ranges are errors of our shape, where the library's are plain text."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, or the range of it that is asked for."""

        async def checked(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                size = {"content-range": f"bytes */{self.headers['content-length']}"}
                raise HTTPException(416, "range: the file has no such bytes", headers=size)
            await send(message)

        await super().__call__(scope, receive, checked)


class _Stream(StreamingResponse):
    """Lines that are sent while there is room for them, which is taken when the answer begins."""

    def __init__(
        self, lines: AsyncIterator[str], room: AbstractContextManager[None], headers: dict[str, str]
    ) -> None:
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        with self._room:
            await super().__call__(scope, receive, send)


def _no_video() -> ApiError:
    return ApiError(404, "there is no such video", code="not_found", param="video_id")


def _status(job: Job) -> str:
    return "failed" if job.status == "cancelled" else job.status


def _refusal(error: ValueError | OSError) -> ApiError:
    """Return the answer to a submission that the engine does not take."""
    match error:
        case LateError():
            wait_s = error.retry_after_s
            return ApiError(429, str(error), code="late", retry_after_s=wait_s)
        case QueueFullError():
            wait_s = min(_MAX_WAIT_S, error.retry_after_s)
            return ApiError(429, str(error), code="queue_full", retry_after_s=wait_s)
        case EngineStoppingError():
            return ApiError(503, str(error), code="draining", retry_after_s=10)
        case ConflictError():
            return ApiError(409, str(error), code="idempotency_conflict")
        case ValueError():
            return body.invalid(error)
    logger.error("the journal fails: %s", one_line(error))
    return ApiError(503, "the server cannot write down a job", code="storage", retry_after_s=10)
