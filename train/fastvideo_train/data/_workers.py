"""Run a function of the step in other processes and hand its results over in order."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

T = TypeVar("T")


def in_order(
    make: Callable[[int], T], *, start: int, stop: int | None, workers: int
) -> Generator[T, None, None]:
    """Yield `make(start)`, `make(start + 1)`, ... up to `stop`; `workers` processes compute ahead.

    Worker k makes the steps start + k, start + k + workers, ... and waits in a full pipe until its
    result is wanted, so that at most one result per worker is ever ahead; 0 workers computes here.
    `make` is pickled into fresh interpreters, never forked: torch's threads do not survive a fork.
    An exception in a worker is raised here as `RuntimeError` with its traceback.
    """
    steps = itertools.count(start) if stop is None else range(start, stop)
    if workers == 0:
        yield from map(make, steps)
        return
    pipes: list[Connection] = []
    running: list[BaseProcess] = []
    try:
        for k in range(workers):
            pipe, process = _start(make, start + k, stop, workers)
            pipes.append(pipe)
            running.append(process)
        for step in steps:
            yield _receive(pipes[(step - start) % workers])
    finally:
        for pipe in pipes:
            pipe.close()
        for process in running:
            process.kill()
            process.join()


def _start(
    make: Callable[[int], object], first: int, stop: int | None, stride: int
) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, make, first, stop, stride), daemon=True)
    resource_tracker.ensure_running()  # now, because its start would unblock both signals
    # a worker inherits the mask: a signal to the group ends the parent, which ends its workers
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # only the worker holds this end, so that its death reads as an end of file
    return ours, process


def _receive(pipe: Connection) -> Any:
    try:
        ok, value = pipe.recv()
    except EOFError:
        raise RuntimeError("a clip worker died (killed, or out of memory)") from None
    if not ok:
        raise RuntimeError(f"a clip worker failed:\n{value}")
    return value


def _serve(
    pipe: Connection, make: Callable[[int], object], first: int, stop: int | None, stride: int
) -> None:
    step = first
    try:
        while stop is None or step < stop:
            pipe.send(_attempt(make, step))
            step += stride
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent is gone or has had enough


def _attempt(make: Callable[[int], object], step: int) -> tuple[bool, object]:
    try:
        return True, make(step)
    except Exception:
        return False, traceback.format_exc()
