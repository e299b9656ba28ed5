"""The workers: started, watched and replaced. Liveness and progress are two timers.

A worker is dead if its process ended, sent no heartbeat for `heartbeat_s`, or if a step takes far
longer than usual. It is killed and replaced.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastvideo.log import logger
from fastvideo_inference.engine.book import Book, Key
from fastvideo_inference.engine.config import ServeConfig, WorkerConfig
from fastvideo_inference.engine.messages import LAST, Executor, Handle, Report, Setup, Stop, Task

START_LIMIT_S, LOAD_LIMIT_S = 120.0, 1800.0
_MOST_RESTART_DELAY_S = 30.0
_STALL_S = 1.0  # the loop itself was held up: no worker is blamed for it


@dataclass(eq=False)
class Slot:
    """A slot of a pool, and the state of the worker that fills it.

    `mark` is the last sign of progress of its task, at `since`; the next is due in `limit_s`.
    """

    name: str
    pool: int
    config: WorkerConfig
    state: Literal["starting", "idle", "loading", "busy", "dead"] = "dead"
    task: Task | None = None
    work: float = 1.0
    has_begun: bool = False
    handle: Handle | None = None
    epoch: int = 0
    beats: dict[int, float] = field(default_factory=dict)
    num_ready: int = 0
    mark: tuple[Key, int] | None = None
    since: float = 0.0
    limit_s: float | None = None
    ran: set[Key] = field(default_factory=set)
    crashes: int = 0
    failed_starts: int = 0


class Fleet:
    """Slots of all pools. `hear(slot, report)` and `lost(slot, task, reason)` are the engine's."""

    def __init__(
        self,
        config: ServeConfig,
        executor: Executor,
        book: Book,
        *,
        hear: Callable[[Slot, Report], None],
        lost: Callable[[Slot, Task | None, str], None],
    ) -> None:
        self._config, self._executor, self._book = config, executor, book
        self._hear, self._lost = hear, lost
        self._watch: asyncio.Task[None] | None = None
        self.slots = [
            Slot(f"{'+'.join(pool.stages)}-{index}.{number}", index, pool)
            for index, pool in enumerate(config.worker)
            for number in range(pool.count)
        ]

    def start(self, work_folder: Path) -> None:
        """Start all workers and the watch over them."""
        self._work_folder = work_folder
        for slot in self.slots:
            self._start(slot)
        self._watch = asyncio.create_task(self._watching())

    async def stop(self) -> None:
        """Kill all workers, and wait until they are gone."""
        if self._watch:
            self._watch.cancel()
        for slot in self.slots:
            slot.epoch += 1
            slot.state = "dead"
            if slot.handle:
                slot.handle.kill()
        handles = [slot.handle for slot in self.slots if slot.handle]
        await asyncio.gather(*(asyncio.to_thread(handle.wait) for handle in handles))

    def assign(self, slot: Slot, task: Task, *, work: float) -> None:
        """Give a task of so much work a step to an idle worker."""
        assert slot.handle is not None and slot.state == "idle", "an idle worker is alive"
        slot.task, slot.work, slot.state = task, work, "busy"
        slot.mark, slot.since, slot.limit_s = None, time.monotonic(), None
        slot.has_begun = False
        slot.handle.send(task)

    def stop_task(self, slot: Slot) -> None:
        """Ask a worker to give its task back at the next step boundary."""
        if slot.task and slot.handle:
            slot.handle.send(Stop(slot.task.job_id, slot.task.attempt))

    def lose(self, slot: Slot, reason: str) -> None:
        """Kill a worker, tell what it was at, and have it replaced."""
        assert slot.handle is not None, "a worker was started"
        slot.handle.kill()
        slot.failed_starts = slot.failed_starts + 1 if slot.state == "starting" else 0
        task, slot.task, slot.state = slot.task, None, "dead"
        slot.epoch += 1
        slot.crashes += 1
        at = task.job_id if task else "no job"
        logger.warning("worker %s, at %s, is replaced: %s", slot.name, at, reason)
        delay = min(_MOST_RESTART_DELAY_S, 2.0 ** min(slot.crashes - 2, 9)) * (slot.crashes > 1)
        asyncio.get_running_loop().call_later(delay, self._restart, slot, slot.epoch)
        self._lost(slot, task, reason)

    def _restart(self, slot: Slot, epoch: int) -> None:
        if slot.epoch != epoch:
            return
        try:
            self._start(slot)
        except (OSError, RuntimeError) as error:  # no memory, process or thread to be had
            logger.error("worker %s cannot be started: %s", slot.name, error)
            loop = asyncio.get_running_loop()
            loop.call_later(_MOST_RESTART_DELAY_S, self._restart, slot, slot.epoch)

    def _start(self, slot: Slot) -> None:
        config, devices = slot.config, slot.config.devices
        slot.epoch += 1
        epoch = slot.epoch
        setups = [
            Setup(
                device=device,
                memory=config.memory if config.model else config.memory or "half",
                heartbeat_s=self._config.heartbeat_s,
                parallel=config.parallel,
                rank=rank,
                size=len(devices),
                rendezvous=str(self._work_folder.absolute() / f"{slot.name}.{epoch}"),
            )
            for rank, device in enumerate(devices)
        ]
        slot.state, slot.since, slot.num_ready = "starting", time.monotonic(), 0
        slot.beats, slot.ran, slot.limit_s = {}, set(), START_LIMIT_S
        slot.handle = self._executor.start(setups, partial(self._receive, slot, epoch))

    def _receive(self, slot: Slot, epoch: int, report: Report) -> None:
        if epoch != slot.epoch:
            return  # of a worker that was replaced
        now = time.monotonic()
        if self._executor.beats:
            slot.beats[report.rank] = now
        if report.kind == "dead":
            self.lose(slot, report.values["reason"])
        elif report.kind == "ready":
            slot.num_ready += 1
            if slot.num_ready == len(slot.config.devices):
                slot.state = "idle"
                self._hear(slot, report)
        elif report.kind != "beat" and slot.task is not None and _is_about(report, slot.task):
            self._clock(slot, slot.task, report, now)
            if report.kind in LAST:
                slot.task, slot.state, slot.crashes = None, "idle", 0
            self._hear(slot, report)

    def _clock(self, slot: Slot, task: Task, report: Report, now: float) -> None:
        """Note how long the step took that ends here, and how long the next one may take."""
        slot.has_begun = True
        if report.kind == "loading":
            slot.state, slot.mark, slot.since, slot.limit_s = "loading", None, now, LOAD_LIMIT_S
        elif report.kind in ("progress", *LAST):
            stage, index = report.values.get("stage", ""), report.values.get("index", 0)
            key = Key(slot.pool, task.submission.model, stage)
            if slot.mark is not None:
                before, last = slot.mark
                if (key == before and index > last) or report.kind == "finished":
                    self._book.note(before, slot.work, now - slot.since)
                    slot.ran.add(before)
            slot.state, slot.since, slot.mark = "busy", now, (key, index)
            # the first step of a worker may compile
            slot.limit_s = self._book.limit_s(key, slot.work) if key in slot.ran else None

    async def _watching(self) -> None:
        pause = min(1.0, self._config.heartbeat_s / 4)
        last = time.monotonic()
        while True:
            await asyncio.sleep(pause)
            now = time.monotonic()
            stalled = now - last - pause
            last = now
            for slot in self.slots:
                if stalled > _STALL_S:
                    slot.since += stalled
                    slot.beats = {rank: beat + stalled for rank, beat in slot.beats.items()}
                reason = self._wrong(slot, now)
                if reason:
                    try:
                        self.lose(slot, reason)
                    except Exception as error:  # the watch over the others goes on
                        logger.error("engine: %s", error, exc_info=error)

    def _wrong(self, slot: Slot, now: float) -> str | None:
        """Return why a worker is to be given up, if it is."""
        if slot.state == "dead":
            return None
        limit_s = self._config.heartbeat_s
        is_starting = slot.state == "starting"  # imports may keep its threads from running
        if slot.beats and not is_starting and now - min(slot.beats.values()) > limit_s:
            return f"no heartbeat for {limit_s:g} s"
        if slot.state == "idle" or slot.limit_s is None or now - slot.since <= slot.limit_s:
            return None
        if slot.state == "busy":
            assert slot.mark is not None, "a limit is of a stage"
            return f"a step of {slot.mark[0].stage} took more than {slot.limit_s:.0f} s"
        return f"not done {slot.state} after {slot.limit_s:.0f} s"

    def stats(self) -> list[dict[str, Any]]:
        """Return what each worker is and does."""
        return [
            {
                "name": slot.name,
                "stages": slot.config.stages,
                "state": slot.state,
                "pids": slot.handle.pids if slot.handle else (),
                "job_id": slot.task.job_id if slot.task else None,
            }
            for slot in self.slots
        ]


def _is_about(report: Report, task: Task) -> bool:
    return (report.job_id, report.attempt) == (task.job_id, task.attempt)
