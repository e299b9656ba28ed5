"""One press of Generate: its clips are made one after the other, and a view says how far it is.

Clips are sent one at a time, so that two browsers that ask for several take turns.
"""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from fastvideo import Job, Progress, VideoPipeline, bundled_models, shapes_kept

MAX_CLIPS = 8
_PAUSE_S = 0.2  # after which a run looks whether it is to stop, and asks for its place
_BESIDE = ("model", "decoder", "slo_class")
_WHOLE = re.compile(r"\s*-?\d{1,20}\s*")
_FOUND_AT = re.compile(r" in the call(?=:)| \(from [^()]*\)$")

View = dict[str, Any]


class _Stopped(Exception):  # noqa: N818 - no error
    pass


@dataclass
class Run:
    """The clips that a form asks for: `count` of each of its `sides`, which are settings.

    `stop` may be set from any thread; closing the iterator of `views` cancels as well.
    """

    url: str
    form: Any
    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)

    def views(self) -> Iterator[View]:
        """Yield what the page shows, complete each time: it may miss some of them."""
        self._view: View = {"phase": "waiting", "clips": [], "notices": [], "error": None}
        try:
            for number, (side, pipe, request) in enumerate(todo := self._todo()):
                self._view |= {"number": number, "total": len(todo), "side": side}
                yield from self._make(pipe, request, side)
            self._view["phase"] = "over"
        except _Stopped:
            self._view["phase"] = "stopped"
        except (ValueError, OSError, RuntimeError) as error:  # the server's, and the disk's
            text = _FOUND_AT.sub("", " ".join(str(error).split()))
            word = re.match(r"\w*", text)
            self._view |= {"phase": "failed", "error": text, "field": word and word[0]}
        yield self._view

    def _todo(self) -> list[tuple[int, Any, Any]]:
        """Return (side, pipeline, request) of each clip; sides share their seeds."""
        form = self.form if isinstance(self.form, dict) else {}
        sides, count = form.get("sides"), _whole(form.get("count", 1))
        if not isinstance(sides, list) or not 1 <= len(sides) <= 2:
            raise ValueError("sides must be a list of the settings of one clip, or of two")
        if not isinstance(count, int) or not 1 <= count <= MAX_CLIPS:
            raise ValueError(f"count {count} must be a whole number from 1 to {MAX_CLIPS}")
        rows: list[list[tuple[int, Any, Any]]] = []
        for number, side in enumerate(sides):
            pipe, fields = self._pipeline(side)
            if rows:
                fields["seed"] = rows[0][0][2].seed
            requests = pipe.requests(count=count, **fields)
            rows.append([(number, pipe, request) for request in requests])
        return [one for pair in zip(*rows, strict=True) for one in pair]

    def _pipeline(self, side: Any) -> tuple[Any, View]:
        if not isinstance(side, Mapping) or not isinstance(side.get("prompt"), str):
            raise ValueError("prompt is missing; say what the clip should show")
        given = {name: value for name, value in side.items() if value not in (None, "")}
        beside = {name: given.pop(name) for name in _BESIDE if name in given}
        given = {"prompt": side["prompt"], **given}
        if "seed" in given:
            given["seed"] = _whole(given["seed"])
        return VideoPipeline.connect(self.url, **beside), given

    def _make(self, pipe: Any, request: Any, side: int) -> Iterator[View]:
        self._view |= {"phase": "waiting", "stage": None, "preview": None, "ahead": None}
        yield self._view
        job = pipe.send(request, previews=True)
        try:
            yield from self._follow(job)
            self._view["clips"] = [*self._view["clips"], self._clip(job, side)]
        finally:
            job.cancel()  # the page has its file, or wants none
        yield self._view

    def _follow(self, job: Job) -> Iterator[View]:
        heard: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_listen, args=(job, heard), daemon=True).start()
        while True:
            if self.stop.is_set():
                raise _Stopped
            try:
                event = heard.get(timeout=_PAUSE_S)
            except Empty:
                self._view["ahead"] = job.queue_position
                event = None
            if isinstance(event, Exception):
                raise event
            if event is job:  # its end
                return
            self._show(job, event)
            yield self._view

    def _show(self, job: Job, event: Any) -> None:
        waits = self._view["ahead"] is not None and self._view["stage"] is None
        if isinstance(event, Progress):
            place = {"stage": event.stage, "index": event.index, "steps": event.total}
            self._view |= {**place, "ahead": None}
        elif hasattr(event, "png"):
            self._view["preview"] = base64.b64encode(event.png).decode()
        elif hasattr(event, "text"):
            self._view["notices"] = [*self._view["notices"], event.text]
        phase = "waiting" if waits and not isinstance(event, Progress) else "making"
        self._view |= {"phase": phase, "left_s": job.values.get("eta_s")}

    def _clip(self, job: Job, side: int) -> View:
        is_bundled = job.values["model"] in bundled_models()
        video = job.result(decode=is_bundled)
        path = video.save(self.folder / f"{uuid4().hex}.mp4")
        request = video.recipe["request"]
        kept: dict[str, bool] = {}
        if is_bundled and video.frames is not None:
            kept = shapes_kept(request["prompt"], video.frames, fps=video.fps)
        return {
            "id": path.stem,
            "path": str(path),
            "side": side,
            "model": job.values["model"],
            "recipe": video.recipe,
            "seconds": video.timings,
            "notices": list(video.notices),
            "kept": kept,
            "is_bundled": is_bundled,
        }


def _listen(job: Job, heard: SimpleQueue[Any]) -> None:
    try:
        for event in job.events():
            heard.put(event)
        heard.put(job)
    except (ValueError, OSError, RuntimeError) as error:
        heard.put(error)


def _whole(given: Any) -> Any:
    """Return the whole number that a text stands for, of any size; other values as they are."""
    return int(given) if isinstance(given, str) and _WHOLE.fullmatch(given) else given
