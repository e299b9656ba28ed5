"""A worker: runs stages of one clip at a time, says how far it is, and writes the finished file.

worker = Worker(setup, send)     # send(report), from this thread
worker.run(task)                 # from here on reports; the last of them is one of `LAST`
worker.stop(Stop(...))           # from any thread

A group of ranks runs the same tasks together; the first of them speaks.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastvideo import capacity, media, preview, registry, stages
from fastvideo.errors import NotFiniteError, one_line
from fastvideo.log import logger
from fastvideo.model import Model, pick_device
from fastvideo.packing import pack, unpack
from fastvideo.parallel import agree, degrees, mesh
from fastvideo.parallel.mesh import Meshes
from fastvideo.stages import Chunk, Done, Notice, Preview, Progress, State
from fastvideo_inference import recipe
from fastvideo_inference.engine.messages import Kind, Report, Setup, Stop, Task
from fastvideo_inference.engine.parts import Parts
from fastvideo_inference.pipeline import VideoPipeline

if TYPE_CHECKING:
    from fastvideo.media import Frames

SAVE = "save"
_GIVEN = ("cond", "uncond", "noise", "latents", "frames")  # large fields of a state
_SHEET_COLUMNS = 12
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Stopped(Exception):  # noqa: N818 - no error
    pass


class Worker:
    """Runs tasks, one after the other, all in one thread."""

    def __init__(self, setup: Setup, send: Callable[[Report], None]) -> None:
        self._send = send
        self._meshes = _join(setup)
        memory = _half(self._meshes.device) if setup.memory == "half" else setup.memory
        self._parts = Parts(self._meshes, memory=memory, loading=lambda: self._say("loading"))
        self._task: Task | None = None
        self._stop: Stop | None = None

    def stop(self, stop: Stop) -> None:
        """Stop a task at its next step boundary, whether it runs or is still to come."""
        self._stop = stop

    def run(self, task: Task) -> None:
        """Run a task to its end, its failure or a stop.

        Errors that are not the request's, such as a GPU's, are raised: this process cannot be
        trusted with other clips. So is lack of memory in a group, whose other ranks wait.
        """
        self._task = task
        self._say("started")
        is_own = threading.current_thread() is threading.main_thread()  # not the server's process
        logger.disabled = task.is_quiet and is_own
        params = (task.submission.params,)
        state = task.state or State(params)
        if self._meshes.device.type != "cpu":
            state = unpack(*pack(state), device=self._meshes.device)
        previews = task.submission.previews
        state = replace(state, requests=params, previews=previews, notices=task.notices)
        try:
            self._run(task, state)
        except _Stopped:
            pass
        except Exception as error:
            code = _code(error)
            is_alone = self._meshes.axis("sample").size == 1
            if code is None or (code == "out_of_memory" and not is_alone):
                raise
            logger.warning("%s: %s", task.job_id, one_line(error))
            is_disk = isinstance(error, OSError) and error.strerror  # without the server's path
            self._say("failed", code=code, message=is_disk or one_line(error))
        finally:
            logger.disabled = False

    def _run(self, task: Task, state: State) -> None:
        model: Model | None
        for index, name in enumerate(task.stages):
            later = (*task.stages[index + 1 :], *task.later)
            needs = registry.module("fastvideo.stages", name).PARTS
            model = None  # else its parts stay in memory while others are loaded
            model = self._parts.model(task.submission.model, needs, decoder=task.submission.decoder)
            load_s = {f"load.{part}": s for part, s in self._parts.load_s.items()}
            if task.submission.params.lora:
                self._say("loading")  # merging may take as long
            state = self._stage(task, model, name, state)
            seconds = state.timings[name]
            if later:
                state = _slim(state, later)
                self._say("stage", state, stage=name, seconds=seconds, load_s=load_s)
            else:
                self._say("stage", stage=name, seconds=seconds, load_s=load_s)
                self._finish(task, model, state)
                return
        self._say("handed")

    def _stage(self, task: Task, model: Model, name: str, state: State) -> State:
        with closing(stages.run((name,), model, state)) as events:
            for event in events:
                if isinstance(event, Progress):
                    state = state if event.state is None else replace(event.state, noise=None)
                    self._step(task, event, state)
                elif isinstance(event, Notice) and event.stage == name:
                    self._say("notice", stage=name, text=event.text)
                elif isinstance(event, Preview):
                    self._say("preview", stage=name, index=event.index, png=_sheet(event.frames[0]))
                elif isinstance(event, Chunk) and task.submission.previews:
                    shown, end = _shrunk(event.frames), event.start + len(event.frames)
                    self._say("preview", stage=name, index=end, png=_sheet(shown))
                elif isinstance(event, Done):
                    return event.state
        raise AssertionError("stages end in Done")

    def _step(self, task: Task, event: Progress, state: State) -> None:
        """Report progress, with the state at checkpoints; the boundary at which a task stops."""
        is_over = event.index == event.total
        is_due = event.state is not None and event.index % task.checkpoint_every == 0
        kept = state if is_due and not is_over else None
        self._say("progress", kept, stage=event.stage, index=event.index, total=event.total)
        if not is_over and self._must_stop(task):
            self._say("stopped", state)
            raise _Stopped

    def _must_stop(self, task: Task) -> bool:
        is_asked = self._stop == Stop(task.job_id, task.attempt)
        return agree.broadcast_object(is_asked, self._meshes.axis("sample"), self._meshes.device)

    def _finish(self, task: Task, model: Model, state: State) -> None:
        self._say("progress", stage=SAVE, index=0, total=1)
        asked = task.submission
        model_id, decoder_id = self._parts.ids(asked.model, decoder=asked.decoder)
        pipe = VideoPipeline(model, model_id, decoder_id)
        video = pipe.video(state)
        if asked.names:
            known = recipe.renamed(pipe.recipe(state), asked.names)
            video = replace(video, recipe=known.model_dump(mode="json"))
        if video.writes:
            started = time.perf_counter()
            video.save(task.output)
            self._say(
                "finished",
                frames_sha256=video.frames_sha256,
                recipe=video.recipe,
                save_s=time.perf_counter() - started,
            )

    def _say(self, kind: Kind, state: State | None = None, **values: Any) -> None:
        if self._meshes.is_first:
            assert self._task is not None, "reports are about a task"
            self._send(Report(kind, self._task.job_id, self._task.attempt, values, state))


def _join(setup: Setup) -> Meshes:
    if setup.size == 1:
        return mesh.alone(pick_device(setup.device))
    device = mesh.join(
        pick_device(setup.device), rank=setup.rank, size=setup.size, file=setup.rendezvous
    )
    return mesh.build(degrees.parse(setup.parallel), device)


def _half(device: torch.device) -> float | None:
    """Return half of a device's memory in GiB; None if it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 2 / 2**30
    total = capacity.host_memory()
    return total and total / 2 / 2**30


def _slim(state: State, later: Sequence[str]) -> State:
    """Drop what no later stage needs, so that it is neither sent nor kept."""
    stages_ = [registry.module("fastvideo.stages", name) for name in later]
    needs = {field for stage in stages_ for field in stage.NEEDS}
    unneeded: dict[str, Any] = {field: None for field in _GIVEN if field not in needs}
    return replace(state, **unneeded)


def _shrunk(frames: Frames) -> Frames:
    """Return decoded frames of at most a preview's pixels a side."""
    stride = -(-max(frames.shape[1:3]) // preview.MAX_SIDE_PX)
    return frames[:, ::stride, ::stride]


def _sheet(frames: Frames) -> bytes:
    return media.png(media.contact_sheet([frames], num_columns=min(_SHEET_COLUMNS, len(frames))))


def _code(error: Exception) -> str | None:
    """Return the code of an error that is the request's or the disk's; None for all others."""
    if isinstance(error, NotFiniteError):
        return "not_finite"
    if isinstance(error, OSError):
        return "disk_full" if error.errno in _FULL else "io_error"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out_of_memory"
    return "invalid_request" if isinstance(error, ValueError) else None
