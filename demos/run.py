"""One press of Generate: its clips are made one after the other, and a view says how far it is.

Clips are sent one at a time, so that two browsers that ask for several take turns.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from secrets import token_hex
from typing import Any

from fastvideo import Job, Progress, VideoPipeline, bundled_models, shapes_kept

MAX_CLIPS = 8
ERRORS = (ValueError, OSError, RuntimeError)  # of the request, the server, the disk
_PAUSE_S = 0.2  # after which a run looks whether it is to stop, and asks for its place
_WHOLE = re.compile(r"\s*-?\d{1,20}\s*")
_SOURCE = re.compile(r" in the call(?=:)| \(from [^()]*\)$")

View = dict[str, Any]


def one_line(error: BaseException) -> str:
    """Return an error without the line breaks and the place, which is always the form."""
    return _SOURCE.sub("", " ".join(str(error).split()))


@dataclass
class Run:
    """The clips that a form asks for: `count` of each of its `sides`, which are settings.

    `stop` may be set from any thread; to close the iterator of `views` cancels as well.
    """

    url: str
    form: Any
    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)

    def views(self) -> Iterator[View]:
        """Yield what the page shows, complete each time: it may miss some of them."""
        self._view: View = {"phase": "waiting", "clips": []}
        try:
            for number, (side, pipe, request) in enumerate(todo := self._todo()):
                self._view |= {"number": number, "total": len(todo), "side": side}
                self._view |= {"stage": None, "preview": None, "ahead": None}
                yield from self._make(pipe, request)
            self._view["phase"] = "stopped" if self.stop.is_set() else "over"
        except ERRORS as error:
            text = one_line(error)
            word = re.split(r"\W", text, maxsplit=1)[0]
            self._view |= {"phase": "failed", "error": text, "field": word}
        yield self._view

    def _todo(self) -> list[tuple[int, Any, Any]]:
        """Return (side, pipeline, request) of each clip; the sides share their seeds."""
        form = self.form if isinstance(self.form, dict) else {}
        sides, count = form.get("sides"), _whole(form.get("count", 1))
        if not isinstance(sides, list) or not 1 <= len(sides) <= 2:
            raise ValueError("sides must be a list of one or two settings")
        if not isinstance(count, int) or not 1 <= count <= MAX_CLIPS:
            raise ValueError(f"count {count} must be a whole number from 1 to {MAX_CLIPS}")
        rows: list[list[tuple[int, Any, Any]]] = []
        for number, side in enumerate(sides):
            if not isinstance(side, dict) or not isinstance(side.get("prompt"), str):
                raise ValueError("prompt is missing; say what the clip should show")
            given = {k: v for k, v in side.items() if v not in (None, "") or k == "prompt"}
            beside = {k: given.pop(k) for k in ("model", "decoder", "slo_class") if k in given}
            given["seed"] = rows[0][0][2].seed if rows else _whole(given.get("seed"))
            pipe = VideoPipeline.connect(self.url, **beside)
            rows.append([(number, pipe, one) for one in pipe.requests(count=count, **given)])
        return [one for pair in zip(*rows, strict=True) for one in pair]

    def _make(self, pipe: Any, request: Any) -> Iterator[View]:
        if self.stop.is_set():
            return
        job = pipe.send(request, previews=True)
        try:
            yield self._view
            yield from self._follow(job)
            if not self.stop.is_set():
                self._view["clips"] = [*self._view["clips"], self._clip(job)]
                yield self._view
        finally:
            job.cancel()  # the page has its file, or wants none

    def _follow(self, job: Job) -> Iterator[View]:
        """Yield a view after each event and pause, until the job has ended or is to stop."""
        heard: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_listen, args=(job, heard), daemon=True).start()
        event: Any = None
        while event is not job and not self.stop.is_set():
            try:
                event = heard.get(timeout=_PAUSE_S)
            except Empty:
                event = None
                self._view["ahead"] = job.queue_position
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Progress):
                self._view |= {"stage": event.stage, "index": event.index, "steps": event.total}
            elif hasattr(event, "png"):
                self._view["preview"] = base64.b64encode(event.png).decode()
            is_begun = self._view["stage"] or job.status == "in_progress"
            self._view["phase"] = "making" if is_begun else "waiting"
            self._view["left_s"] = job.values.get("eta_s")
            yield self._view

    def _clip(self, job: Job) -> View:
        model = job.values["model"]
        video = job.result(decode=model in bundled_models())
        request, kept = video.recipe["request"], {}
        name = re.sub(r"[^a-z0-9]+", "-", request["prompt"].lower())[:40].strip("-")
        path = self.folder / f"{name or 'clip'}-{request['seed']}-{token_hex(3)}.mp4"
        video.save(path)
        if video.frames is not None:
            kept = shapes_kept(request["prompt"], video.frames, fps=video.fps)
        told = {"seconds": video.timings, "notices": list(video.notices), "kept": kept}
        recipe = json.dumps(video.recipe)  # as text: a browser would round its seed
        return {"file": str(path), "model": model, "recipe": recipe, **told}


def _listen(job: Job, heard: SimpleQueue[Any]) -> None:
    """Pass on a job's events, and at their end the job, or why there is none."""
    try:
        for event in job.events():
            heard.put(event)
        heard.put(job)
    except ERRORS as error:
        heard.put(error)


def _whole(given: Any) -> Any:
    """Return the whole number that a text stands for, of any size; other values as they are."""
    return int(given) if isinstance(given, str) and _WHOLE.fullmatch(given) else given
