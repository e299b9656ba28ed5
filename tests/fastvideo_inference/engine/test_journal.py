"""What the journal keeps, and in which order things go."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from fastvideo_inference.engine.job import Job
from fastvideo_inference.engine.journal import KEPT_S, Journal
from fastvideo_inference.engine.ledger import WORK, Ledger
from fastvideo_inference.engine.record import Record

from tests.fastvideo_inference.engine.conftest import submission


def test_a_commit_is_on_the_disk(tmp_path: Path):
    journal = Journal(tmp_path)
    full = journal._rows.execute("PRAGMA synchronous").fetchone()
    journal.close()
    assert full == (2,)


def test_jobs_are_kept_until_they_are_deleted_and_then_for_a_day(tiny_folder: Path, tmp_path: Path):
    asked, now = submission(tiny_folder), time.time()

    def put(name: str, status: str, hours: float) -> None:
        journal.put(Job(name, asked, status, accepted_at_s=1.0, finished_at_s=now - hours * 3600))

    journal = Journal(tmp_path)
    assert KEPT_S == 24 * 3600
    for hours in (23, 25):
        for status in ("completed", "failed", "cancelled"):
            put(f"{status} {hours}", status, hours)
        put(f"deleted {hours}", "completed", hours)
    journal.put(Job("queued", asked, accepted_at_s=2.0))
    for hours in (23, 25):
        journal.delete(f"deleted {hours}")
    (count,) = journal._rows.execute("SELECT count(*) FROM jobs").fetchone()
    kept = [job.id for job, is_deleted in journal.jobs() if not is_deleted]
    deleted = [job.id for job, is_deleted in journal.jobs() if is_deleted]
    journal.close()
    statuses = ("completed", "failed", "cancelled")
    assert kept == [f"{status} {hours}" for hours in (23, 25) for status in statuses] + ["queued"]
    assert deleted == ["deleted 23"] and count == len(kept) + 1


def test_whatever_sqlite_refuses_is_an_error_of_the_disk(tiny_folder: Path, tmp_path: Path):
    journal = Journal(tmp_path)
    journal._rows.execute(
        "CREATE TRIGGER broken BEFORE INSERT ON jobs BEGIN SELECT RAISE(ABORT, 'malformed'); END"
    )  # not an OperationalError, as that of a damaged file is none
    with pytest.raises(OSError, match="malformed"):
        journal.put(Job("a", submission(tiny_folder)))
    journal.close()


def test_a_file_goes_before_its_row_and_the_work_before_the_claim(
    tiny_folder: Path, tmp_path: Path, monkeypatch
):
    async def main():
        ledger, job = Ledger(tmp_path), Job("a", submission(tiny_folder), "completed")
        await ledger.open()
        await ledger.add([record := Record(job)])
        ledger.path(record).write_bytes(b"clip")
        with monkeypatch.context() as full:
            full.setattr(Journal, "delete", refuse)
            with pytest.raises(OSError, match="full"):
                await ledger.delete(record)
        assert not ledger.path(record).exists() and "a" in ledger.records
        await ledger.delete(record)
        assert not ledger.records
        monkeypatch.setattr(Journal, "close", note)
        await ledger.close()
        assert seen == [False]

    close, seen = Journal.close, []

    def note(journal: Journal) -> None:
        seen.append((tmp_path / WORK).exists())
        close(journal)

    def refuse(journal: Journal, job_id: str) -> None:
        raise OSError("the disk is full")

    asyncio.run(main())
