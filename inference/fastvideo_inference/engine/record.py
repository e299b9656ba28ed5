"""A job as the engine holds it, the cache of encoded prompts, and what is counted of jobs."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastvideo.spec import Spec
from fastvideo_inference.engine import book, pools
from fastvideo_inference.engine.config import WorkerConfig
from fastvideo_inference.engine.fleet import Slot
from fastvideo_inference.engine.job import EventKind, Job, JobEvent

ENCODE = "encode_text"
_READER_EVENTS = 256  # that wait for a slow reader: the newest
_CACHE_BYTES, _CACHE_ENTRIES = 256 << 20, 256  # shared memory, and the descriptors of it
_Key = tuple[object, ...]


@dataclass(eq=False)
class Record:
    """A job, the index of its next stage, and the last checkpoint, from which it resumes.

    `forecast_s`: in how many seconds its end was expected when it came.
    `since`: the stage that an attempt is at, and the time of its start. `is_handed`: it waits
    between two stages. `is_over`: its end is decided; `ended` is set, and readers hear it, once the
    journal has committed it.
    """

    job: Job
    known_spec: Spec | None = None
    index: int = 0
    state: Any = None
    slot: Slot | None = None
    since: tuple[str, float] | None = None
    forecast_s: float | None = None
    is_handed: bool = False
    is_over: bool = False
    is_warmup: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    readers: list[asyncio.Queue[JobEvent | None]] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The job's id."""
        return self.job.id

    @property
    def spec(self) -> Spec:
        """The model's spec, which a job that is over needs no more."""
        assert self.known_spec is not None, "it is over"
        return self.known_spec

    @property
    def model(self) -> str:
        """The model's name, folder or hub id."""
        return self.job.submission.model

    @property
    def row(self) -> tuple[str, ...]:
        """The stages of the model."""
        return self.spec.stages

    @property
    def next(self) -> str:
        """The stage that it waits for, or is at."""
        return self.row[self.index]

    def fits(self, pool: WorkerConfig, stage: str = "") -> bool:
        """Tell whether a pool's workers can run a stage of it, "" for the next one."""
        return pools.unfit(pool, stage or self.next, self.job.submission, self.spec) is None

    def run_on(self, pool: WorkerConfig) -> tuple[str, ...]:
        """Return the next stages that a pool's worker can run without another between them."""
        return pools.run_on(pool, self.job.submission, self.spec, self.index)

    @property
    def is_queued(self) -> bool:
        """Whether no worker has had it."""
        return self.job.status == "queued"

    @property
    def turn(self) -> int:
        """0; a warm-up comes behind all others, but not for ever: after its time, first."""
        if not self.is_warmup:
            return 0
        return 1 if time.time() < self.job.accepted_at_s else -1

    @property
    def is_begun(self) -> bool:
        """Whether a worker has had it, and its end is not decided."""
        return self.job.status == "in_progress" and not self.is_over

    @property
    def work(self) -> float:
        """What one step costs."""
        return book.work(self.job.submission.params, self.spec)

    @property
    def total(self) -> float:
        """What all steps cost."""
        return self.work * self.job.submission.params.num_inference_steps

    @property
    def prompt_key(self) -> _Key:
        """What decides the conditioning."""
        params = self.job.submission.params
        negative = None if params.guidance_scale == 1 else params.negative_prompt
        return self.model, params.prompt, negative, self.spec.defaults.max_text_tokens

    def note_stage(self, stage: str) -> None:
        """Note that an attempt is at a stage."""
        if self.since is None or self.since[0] != stage:
            self.since = stage, time.monotonic()

    def count_seconds(self) -> None:
        """Count the seconds of an attempt that ends within a stage."""
        if self.since:
            stage, since = self.since
            self.add_seconds(stage, time.monotonic() - since)

    def add_seconds(
        self, stage: str, seconds: float, load_s: Mapping[str, float] | None = None
    ) -> None:
        """Add to a stage's seconds those of an attempt, which leaves it, and those of parts."""
        total = dict(self.job.stage_seconds)
        for name, more_s in {stage: seconds, **(load_s or {})}.items():
            total[name] = total.get(name, 0.0) + more_s
        self.job, self.since = replace(self.job, stage_seconds=total), None

    def add_notices(self, *texts: str) -> None:
        """Keep notices, once each, though they be repeated by a retry."""
        notices = dict.fromkeys([*self.job.notices, *texts])
        self.job = replace(self.job, notices=tuple(notices))

    def read(self) -> asyncio.Queue[JobEvent | None]:
        """Return a queue of all events from now on, the status first; None is the end."""
        queue: asyncio.Queue[JobEvent | None] = asyncio.Queue(_READER_EVENTS)
        queue.put_nowait(self._status())
        self.readers.append(queue)
        return queue

    def tell(self, kind: EventKind = "status", **values: Any) -> None:
        """Send an event, or the status, to all readers; a slow reader loses its oldest events."""
        self._put(self._status() if kind == "status" else JobEvent(self.id, kind, values))

    def close(self) -> None:
        """End what reads."""
        self._put(None)

    def _put(self, event: JobEvent | None) -> None:
        for queue in self.readers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    def _status(self) -> JobEvent:
        return JobEvent(self.id, "status", {"status": self.job.status})


class PromptCache:
    """States after `encode_text`, notices about their prompts, bytes; the last used are kept."""

    def __init__(self) -> None:
        self._entries: OrderedDict[_Key, tuple[Any, tuple[str, ...], int]] = OrderedDict()

    def get(self, key: _Key) -> tuple[Any, tuple[str, ...], int] | None:
        """Return the entry of a key, which is the last used from now on."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: _Key, state: Any, notices: tuple[str, ...], num_bytes: int) -> None:
        """Keep a state, and let the oldest go that are too much."""
        self._entries[key] = state, notices, num_bytes
        while (
            len(self._entries) > _CACHE_ENTRIES
            or sum(size for _, _, size in self._entries.values()) > _CACHE_BYTES
        ):
            self._entries.popitem(last=False)


@dataclass
class Counts:
    """Counters since the start; pairs are [count, sum]."""

    admitted: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    attempts: int = 0
    worker_deaths: int = 0
    transfer_bytes: int = 0
    queue_s: list[float] = field(default_factory=lambda: [0, 0.0])
    transfer_s: list[float] = field(default_factory=lambda: [0, 0.0])
    stage_s: dict[str, list[float]] = field(default_factory=dict)

    def end(self, job: Job) -> None:
        """Count a job that ended."""
        if job.failure:
            self.failed[job.failure.code] = self.failed.get(job.failure.code, 0) + 1
        elif job.status == "completed":
            self.completed += 1
        else:
            self.cancelled += 1


def add(pair: list[float], seconds: float) -> None:
    """Count an interval."""
    pair[0] += 1
    pair[1] += seconds
