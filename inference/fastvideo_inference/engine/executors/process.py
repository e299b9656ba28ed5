"""Workers as processes of this machine, of one rank or several; states go by shared memory.

Each ends with the engine that started it, however that one ended. A group of ranks is one worker:
when a rank ends, so do the others.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import gc
import itertools
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from fastvideo import log
from fastvideo.errors import one_line
from fastvideo.log import logger
from fastvideo_inference.engine import transport
from fastvideo_inference.engine.messages import PATIENCE_S, Report, Setup, Stop, Task
from fastvideo_inference.engine.transport import Segment

_BEATS = 4  # in the time after which a worker is dead
_PR_SET_PDEATHSIG = 1
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from fastvideo_inference.engine.executors.process import main; main(int(sys.argv[2]))"
)


class Executor:
    """Starts processes of this interpreter."""

    beats = True

    def start(self, setups: list[Setup], report: Callable[[Report], None]) -> _Group:
        """Start a process for each rank."""
        return _Group(setups, report)


class _Group:
    def __init__(self, setups: list[Setup], report: Callable[[Report], None]) -> None:
        self._report = report
        self._ranks: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        self._listeners: list[threading.Thread] = []
        loop = asyncio.get_running_loop()
        try:
            for setup in setups:
                self._ranks.append(_start(setup))
        except OSError:  # no memory or no process to be had: the others would wait for it
            self.kill()
            for process, _ in self._ranks:
                process.wait()
            raise
        for setup, (process, stream) in zip(setups, self._ranks, strict=True):
            args = (setup.rank, process, stream, loop)
            self._listeners.append(threading.Thread(target=self._listen, args=args, daemon=True))
            self._listeners[-1].start()
        self.pids = tuple(process.pid for process, _ in self._ranks)

    def send(self, command: Task | Stop) -> None:
        """Pass a command to all ranks."""
        segment = None
        if isinstance(command, Task):
            segment = command.state
            command = dataclasses.replace(command, state=None)
        for process, stream in self._ranks:
            try:
                transport.send(stream, command, segment, wait=False)
            except OSError:  # it is gone, or has been stopped for long: its listener will say so
                process.kill()

    def kill(self) -> None:
        """Kill all ranks; their listeners reap them."""
        for process, stream in self._ranks:
            process.kill()
            with suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        """Wait until all ranks are gone."""
        for listener in self._listeners:
            listener.join(PATIENCE_S)

    def _listen(
        self,
        rank: int,
        process: subprocess.Popen[bytes],
        stream: socket.socket,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        with suppress(EOFError, OSError, RuntimeError):  # the last: the loop is closed
            while True:
                report, segment = transport.receive(stream)
                heard = dataclasses.replace(report, state=segment, rank=rank)
                loop.call_soon_threadsafe(self._report, heard)
        process.kill()  # it closed the stream, and is to be gone as well
        dead = Report("dead", values={"reason": _ended(process.wait())})
        stream.close()
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._report, dead)


def _start(setup: Setup) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, its = socket.socketpair()
    with its:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path), str(its.fileno())],
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is the engine's to hear
        )
    transport.send(ours, (setup, os.getpid()))
    return process, ours


def _ended(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


# In the worker's process


def main(descriptor: int) -> None:
    """Run a worker until its engine is gone."""
    stream = socket.socket(fileno=descriptor)
    (setup, parent), _ = transport.receive(stream)
    _die_with(parent)
    log.configure()
    lock = threading.Lock()

    def send(report: Report) -> None:
        """Send a report, its state by shared memory; without an engine, end."""
        segment = None
        if report.state is not None:
            from fastvideo import packing  # torch is there by now

            started, segment = time.perf_counter(), Segment.new()
            num_bytes = packing.write(report.state, segment.descriptor)
            values = {"num_bytes": num_bytes, "transfer_s": time.perf_counter() - started}
            report = dataclasses.replace(report, state=None, values={**report.values, **values})
        try:
            with lock:
                transport.send(stream, report, segment)
        except OSError:
            os._exit(0)

    threading.Thread(target=_beat, args=(send, setup.heartbeat_s / _BEATS), daemon=True).start()
    try:
        _work(dataclasses.replace(setup, device=_pinned(setup.device)), stream, send)
    except Exception as error:
        logger.error("worker: %s", one_line(error), exc_info=error)
        send(Report("dead", values={"reason": one_line(error)}))
        os._exit(1)


def _work(setup: Setup, stream: socket.socket, send: Callable[[Report], None]) -> NoReturn:
    from fastvideo import packing  # torch comes in here
    from fastvideo_inference.engine.worker import Worker

    worker = Worker(setup, send)
    tasks: queue.SimpleQueue[tuple[Task, Segment | None]] = queue.SimpleQueue()
    threading.Thread(target=_obey, args=(stream, worker, tasks), daemon=True).start()
    send(Report("ready"))
    for number in itertools.count():
        task, segment = tasks.get()
        form = logging.Formatter(f"%(asctime)s %(levelname)s [{task.job_id}] %(message)s")
        for handler in logger.handlers:
            handler.setFormatter(form)
        send(Report("started", task.job_id, task.attempt))  # its state may be what kills
        if segment is not None:
            task = dataclasses.replace(task, state=packing.read(segment.descriptor))
        worker.run(task)
        if number == 0:
            gc.freeze()  # what is loaded stays; imageio collects garbage twice a clip
    raise AssertionError("numbers do not end")


def _beat(send: Callable[[Report], None], pause_s: float) -> None:
    while True:
        send(Report("beat"))
        time.sleep(pause_s)


def _obey(stream: socket.socket, worker: Any, tasks: Any) -> None:
    try:
        while True:
            command, segment = transport.receive(stream)
            if isinstance(command, Stop):
                worker.stop(command)
            else:
                tasks.put((command, segment))
    finally:  # the engine is gone
        os._exit(0)


def _die_with(parent: int) -> None:
    """Be killed when the engine dies, even while stopped; the stream's end tells it elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def _pinned(device: str) -> str:
    """Take "cpu:1" for the second core that this process may use, and one thread on it."""
    kind, _, number = device.partition(":")
    if kind != "cpu" or not number:
        return device
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        if int(number) >= len(cores):
            raise ValueError(f"device {device}: this machine has {len(cores)} cores")
        os.sched_setaffinity(0, {cores[int(number)]})
    import torch

    torch.set_num_threads(1)
    return kind
