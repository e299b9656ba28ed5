"""What engine and workers say to each other; plain values, whatever carries them. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from fastvideo_inference.engine.job import Submission

Kind: TypeAlias = Literal[
    # of a worker
    "beat",  # its process is scheduled: every quarter of `heartbeat_s`, from a thread of its own
    "ready",  # it can take tasks
    "dead",  # its process ended: `reason`
    # of the task that it runs
    "loading",  # parts of a model, before its next step
    "started",
    "progress",  # `stage`, `index`, `total`; with a state at checkpoints
    "notice",  # `stage`, `text`
    "preview",  # `stage`, `index`, `png`
    # `stage`, `seconds`, `load_s` ("load.PART": seconds), `num_bytes`; with the state, unless the
    # row ends here
    "stage",
    # the last of a task: the worker is idle again
    "handed",  # the stages are done and others follow elsewhere
    "stopped",  # at a step boundary, as asked; with the state
    "finished",  # `frames_sha256`, `recipe`, `save_s`; the file is where the task said
    "failed",  # `code`, `message`
]
PATIENCE_S = 5.0
LAST: tuple[Kind, ...] = ("handed", "stopped", "finished", "failed")


@dataclass(frozen=True)
class Report:
    """What a worker says. `state` is opaque to the engine: a `State`, or shared memory with it."""

    kind: Kind
    job_id: str = ""
    attempt: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    state: Any = None
    rank: int = 0


@dataclass(frozen=True)
class Task:
    """Stages of one clip to run, from `state` (None: from the request).

    `later` are the stages of the row that follow elsewhere; without any the clip is written to
    `output`. Quiet tasks (warm-ups) log nothing.
    """

    job_id: str
    attempt: int
    submission: Submission
    notices: tuple[str, ...]
    stages: tuple[str, ...]
    later: tuple[str, ...]
    output: Path
    checkpoint_every: int
    is_quiet: bool = False
    state: Any = None


@dataclass(frozen=True)
class Stop:
    """Give a task back at its next step boundary."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class Setup:
    """The settings of a worker, or of a rank of a group."""

    device: str
    memory: float | Literal["half"] | None
    heartbeat_s: float
    parallel: str = ""
    rank: int = 0
    size: int = 1
    rendezvous: str = ""


class Handle(Protocol):
    """A worker as the engine holds it."""

    pids: tuple[int, ...]

    def send(self, command: Task | Stop) -> None:
        """Pass a command on; to a worker that is gone, nothing happens."""

    def kill(self) -> None:
        """End it at once, stopped processes too; what it still says, its owner drops."""

    def wait(self) -> None:
        """Wait, `PATIENCE_S` at most, until what was killed is gone."""


class Executor(Protocol):
    """Starts workers; knows neither jobs nor policies. `beats`: they say that they live."""

    beats: bool

    def start(self, setups: list[Setup], report: Callable[[Report], None]) -> Handle:
        """Start one worker, of one rank or several; `report` is called on the event loop."""
