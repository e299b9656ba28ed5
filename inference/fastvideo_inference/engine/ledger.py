"""The jobs of a folder, in memory and in its journal, and their files; a thread writes to disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

from fastvideo.log import logger
from fastvideo_inference.engine.job import (
    ConflictError,
    EngineStoppingError,
    GoneError,
    Job,
    Submission,
)
from fastvideo_inference.engine.journal import KEPT_S, Journal
from fastvideo_inference.engine.record import Record

WORK = ".work"  # of what is not published yet; emptied by every start and stop
_RETRY_S = 1.0


class Ledger:
    """Records by id; what it awaits is done once it is on disk."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.records: dict[str, Record] = {}
        # (id, body_sha256, accepted_at_s) of a day, of deleted jobs too, oldest first
        self._keys: dict[tuple[str, str], tuple[str, str, float]] = {}
        self.folder = folder.absolute()
        self.work = self.folder / WORK
        self._clock = clock
        self._journal: Journal | None = None
        self._disk = ThreadPoolExecutor(1, "journal")
        self._pending: set[asyncio.Future[Any]] = set()
        self.is_closing = False

    async def open(self) -> list[Job]:
        """Claim the folder, and return the jobs of its journal."""
        self._journal = await self._on_disk(Journal, self.folder)
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        jobs = await self._on_disk(self._journal.jobs)
        for job, _ in jobs:
            self._note_key(job)
        return [job for job, is_deleted in jobs if not is_deleted]

    async def close(self) -> None:
        """Finish what is begun, and let another engine own the folder."""
        if self.is_closing:
            return
        self.is_closing = True
        if self._pending:
            await asyncio.wait(self._pending)
        if self._journal:
            await self._on_disk(shutil.rmtree, self.work, True)  # while the folder is ours
            await self._on_disk(self._journal.close)
        self._disk.shutdown()

    def known(self, submission: Submission) -> Job | None:
        """Return the job that its owner asked for under the same idempotency key within a day.

        Raises `ConflictError` if that was another request, `GoneError` if the job was deleted.
        """
        first_id, body_sha256, accepted_at_s = self._keys.get(_key(submission), ("", "", 0.0))
        if self._is_old(accepted_at_s):
            return None
        if body_sha256 != submission.body_sha256:
            raise ConflictError("this idempotency key was used for another request")
        if first_id not in self.records:
            raise GoneError(f"this idempotency key's clip, {first_id}, was removed")
        return self.records[first_id].job

    async def add(self, records: list[Record]) -> None:
        """Commit the jobs of a request at once, and keep them and its idempotency key."""
        await self.commit(*(record.job for record in records))
        self.records |= {record.id: record for record in records}
        self._note_key(records[0].job)

    def open_record(self, job_id: str) -> Record:
        """Return a job that may be changed; `EngineStoppingError` once the journal closes."""
        if self.is_closing:
            raise EngineStoppingError("the server is shutting down")
        return self.records[job_id]

    def _note_key(self, job: Job) -> None:
        for key in [*takewhile(lambda key: self._is_old(self._keys[key][2]), self._keys)]:
            del self._keys[key]
        if job.submission.idempotency_key and job.id == (job.clips or (job.id,))[0]:
            self._keys[_key(job.submission)] = job.id, job.submission.body_sha256, job.accepted_at_s

    def _is_old(self, accepted_at_s: float) -> bool:
        return self._clock() - accepted_at_s > KEPT_S

    async def commit(self, *jobs: Job) -> None:
        """Write jobs as they are, all or none; `OSError` if the disk refuses."""
        assert self._journal is not None, "open() comes first"
        await self._on_disk(self._journal.put, *jobs)

    def note(self, record: Record) -> None:
        """Commit a job soon, unless its end, which has a commit of its own, comes first."""

        async def commit() -> None:
            if not record.is_over:
                await self.commit(record.job)

        self.later(commit())

    async def commit_end(self, job: Job) -> bool:
        """Write how a job ended, again and again while the disk refuses; False if that was vain."""
        while True:
            try:
                await self.commit(job)
                return True
            except OSError as error:
                logger.error("the end of %s waits for the journal: %s", job.id, error)
                if self.is_closing:
                    return False
                await asyncio.sleep(_RETRY_S)

    async def delete(self, record: Record) -> None:
        """Forget a job that has ended, and its file; the journal keeps its row for a day.

        The file goes first, which makes room on a full disk.
        """
        assert self._journal is not None, "open() comes first"
        await self._on_disk(self.path(record).unlink, True)
        await self._on_disk(self._journal.delete, record.id)
        self.records.pop(record.id, None)

    async def publish(self, record: Record) -> Path:
        """Give the file of the current attempt the job's name, which outlives a power cut."""
        path = self.path(record)
        await self._on_disk(_rename, self.part(record.id, record.job.attempt), path)
        return path

    def later(self, work: Awaitable[Any]) -> asyncio.Future[Any]:
        """Do work beside what goes on; `close` waits for it."""
        future = asyncio.ensure_future(work)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        future.add_done_callback(log_error)
        return future

    def part(self, job_id: str, attempt: int) -> Path:
        """Return where an attempt writes its file."""
        return self.work / f"{job_id}-{attempt}.mp4"

    def discard(self, job_id: str, attempt: int) -> None:
        """Remove the file of an attempt whose result is not wanted."""
        self.later(self._on_disk(self.part(job_id, attempt).unlink, True))

    def path(self, record: Record) -> Path:
        """Return the published file's place."""
        return self.folder / f"{record.id}.mp4"

    def _on_disk(self, function: Callable[..., Any], *args: Any) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self._disk, function, *args)


def _key(submission: Submission) -> tuple[str, str]:
    return submission.owner, submission.idempotency_key


def log_error(future: asyncio.Future[Any]) -> None:
    """Log what a future raised, since nobody waits for it."""
    if not future.cancelled() and (error := future.exception()):
        logger.error("engine: %s", error, exc_info=error)


def _rename(old: Path, new: Path) -> None:
    old.rename(new)
    folder = os.open(new.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
