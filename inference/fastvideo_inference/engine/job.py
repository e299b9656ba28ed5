"""What the engine knows of a job, and what it says while it works; torch-free.

A job is one clip. It reaches exactly one terminal status and publishes exactly one file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fastvideo import sampling
from fastvideo.sampling import SamplingParams
from fastvideo_inference.goodput.profile import Setting
from fastvideo_inference.recipe import Names

Status: TypeAlias = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
EventKind: TypeAlias = Literal["status", "progress", "preview", "notice"]
TERMINAL: tuple[Status, ...] = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Submission:
    """A complete request for `count` clips, of seeds that follow each other.

    `owner` is the API key's name, "" without keys; `decoder` is the path of a small decoder, "" for
    the VAE's own.
    `smaller` are settings in place of one that would be late, best first; None of
    `allow_smaller` leaves it to the class whether they are taken.
    `names` stand in the recipe where paths of this machine would; None: the paths.
    `slo_class` "" is the owner's class, else the first of the config. `idempotency_key` counts for
    its owner, 24 hours, though its job be deleted; `body_sha256` tells repeats from other requests.
    """

    model: str
    params: SamplingParams
    notices: tuple[str, ...] = ()
    slo_class: str = ""
    owner: str = ""
    idempotency_key: str = ""
    body_sha256: str = ""
    previews: bool = False
    decoder: str = ""
    names: Names | None = None
    smaller: tuple[Setting, ...] = ()
    allow_smaller: bool | None = None
    count: int = 1

    def each(self) -> list[Submission]:
        """Return the requests for its clips one by one."""
        rows = [self.params, *(one.params for one in self.smaller)]
        seeded = zip(*(sampling.clips(params, self.count) for params in rows), strict=True)
        return [
            replace(
                self,
                params=own,
                smaller=tuple(
                    replace(one, params=p) for one, p in zip(self.smaller, smaller, strict=True)
                ),
                count=1,
            )
            for own, *smaller in seeded
        ]


@dataclass(frozen=True)
class Failure:
    """Why a job failed: a code for programs (such as "worker_died") and a line for people."""

    code: str
    message: str


@dataclass(frozen=True)
class Job:
    """A snapshot of a job; times are seconds since the epoch, None if not reached.

    `progress` is 0 to 1, `attempt` counts dispatches, `deaths` counts workers that died of it.
    `predicted_s` are the seconds to its end by which a promised job was let in. `path` is the
    published mp4, with `frames_sha256`, `recipe` and seconds by stage. `clips` are the ids of the
    clips that were asked for with it, its own among them.
    """

    id: str
    submission: Submission
    status: Status = "queued"
    slo_class: str = ""
    accepted_at_s: float = 0.0
    started_at_s: float | None = None
    finished_at_s: float | None = None
    stage: str = ""
    progress: float = 0.0
    attempt: int = 0
    deaths: int = 0
    predicted_s: float | None = None
    failure: Failure | None = None
    path: Path | None = None
    frames_sha256: str = ""
    recipe: dict[str, Any] | None = None
    stage_seconds: dict[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    clips: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobEvent:
    """`kind` is "status", "progress", "preview" or "notice"; `values` are JSON, but of a preview.

    A preview's values hold `png`: bytes of a contact sheet of its frames.
    """

    job_id: str
    kind: EventKind
    values: dict[str, Any]


class QueueFullError(ValueError):
    """The queue of a class is full; `retry_after_s` estimates when a place will be free."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LateError(QueueFullError):
    """A promise could not be kept; `retry_after_s` is when it could, if nothing else came."""


class EngineStoppingError(ValueError):
    """The engine drains and takes no new jobs, or has stopped and changes none."""


class ConflictError(ValueError):
    """An idempotency key was used for another request."""


class GoneError(ConflictError):
    """An idempotency key was used for a clip that was removed since; it makes no second clip."""
