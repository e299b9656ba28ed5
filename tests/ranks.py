"""A pool of processes that tests use as ranks: started once a session, joined anew for each call.

They are forked off a process that imported torch and no more, so that a new one costs no second.

def work(rank: int, size: int) -> float: ...     # at the top of a test file, gloo is there
assert ranks(3, work) == [1.0, 1.0, 1.0]         # the fixture `ranks`; arguments follow
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120.0
IMPORTED = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
# Its defaults would keep the group that is there when it is imported, and threads of that one.
IMPORTED.append("torch.distributed.nn.functional")


class RankError(AssertionError):
    """What one or more ranks raised, with their tracebacks."""


class Ranks:
    """Processes that call one function together; those that fail or hang are replaced."""

    def __init__(self) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)
        self._workers: list[tuple[Any, Any]] = []

    def __call__(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what `function(rank, size, *args)` returns on each of `size` ranks."""
        while len(self._workers) < size:
            self._workers.append(self._start())
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(size):
                pipe = self._workers[rank][1]
                pipe.send((rank, size, str(Path(folder) / "store"), function, args))
            answers = [self._answer(rank) for rank in range(size)]
        wrong = [text for is_right, text in answers if not is_right]
        if wrong:
            self.close()  # the others may still wait for the rank that failed
            raise RankError("\n".join(wrong))
        return [value for _, value in answers]

    def close(self) -> None:
        """End every process."""
        for process, _ in self._workers:
            if process.is_alive():  # the number of one that died may be another process's by now
                process.kill()
            process.join()
        self._workers.clear()

    def _start(self) -> tuple[Any, Any]:
        ours, its = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(its,), daemon=True)
        process.start()
        its.close()
        return process, ours

    def _answer(self, rank: int) -> tuple[bool, Any]:
        pipe = self._workers[rank][1]
        if not pipe.poll(TIMEOUT_S):
            return False, f"rank {rank} did not answer within {TIMEOUT_S} s"
        try:
            return pipe.recv()
        except EOFError:
            return False, f"rank {rank} died"


def _serve(pipe: Any) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            rank, size, store, function, args = pipe.recv()
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=TIMEOUT_S / 2),
                )
                answer = (True, function(rank, size, *args))
                if dist.is_initialized():
                    dist.barrier()  # who leaves at once cuts off those that still connect to it
            except BaseException:
                answer = (False, f"rank {rank}:\n{traceback.format_exc()}")
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
            pipe.send(answer)
