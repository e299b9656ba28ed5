"""Workers as threads of this process: for tests, and for `serve --executor local`.

A thread cannot be killed: one that is given up goes on until its next step boundary, unheard.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastvideo.errors import one_line
from fastvideo_inference.engine.messages import PATIENCE_S, Report, Setup, Stop, Task

if TYPE_CHECKING:
    from fastvideo_inference.engine.worker import Worker


class Executor:
    """Starts threads, which live as long as this process."""

    beats = False

    def start(self, setups: list[Setup], report: Callable[[Report], None]) -> _Thread:
        """Start a worker; `ValueError` for a group of ranks, which are processes."""
        if len(setups) > 1:
            raise ValueError("executor 'local' has one process; parallel workers need 'process'")
        return _Thread(setups[0], report)


class _Thread:
    def __init__(self, setup: Setup, report: Callable[[Report], None]) -> None:
        self.pids: tuple[int, ...] = (os.getpid(),)
        self._setup, self._report = setup, report
        self._loop = asyncio.get_running_loop()
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._worker: Worker | None = None
        self._last: Task | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def send(self, command: Task | Stop) -> None:
        """Queue a task, or stop one."""
        if isinstance(command, Task):
            self._last = command
            self._tasks.put(command)
        elif self._worker is not None:
            self._worker.stop(command)

    def kill(self) -> None:
        """Let the thread end after its step."""
        if self._worker and self._last:
            self._worker.stop(Stop(self._last.job_id, self._last.attempt))
        self._tasks.put(None)

    def wait(self) -> None:
        """Wait for the thread to reach a step boundary."""
        self.thread.join(PATIENCE_S)

    def _run(self) -> None:
        from fastvideo_inference.engine.worker import Worker  # torch comes in here

        try:
            self._worker = Worker(self._setup, self._say)
            self._say(Report("ready"))
            while task := self._tasks.get():
                self._worker.run(task)
        except Exception as error:
            self._say(Report("dead", values={"reason": one_line(error)}))

    def _say(self, report: Report) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._report, report)
