"""Which rows the journal keeps."""

from __future__ import annotations

import time
from pathlib import Path

from fastvideo_inference.engine.job import Job
from fastvideo_inference.engine.journal import KEPT_S, Journal

from tests.fastvideo_inference.engine.conftest import submission


def test_rows_of_jobs_without_a_file_are_kept_for_a_day(tiny_folder: Path, tmp_path: Path):
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
    kept = [job.id for job in journal.jobs()]
    journal.close()
    assert count == 6
    assert kept == ["completed 23", "failed 23", "cancelled 23", "completed 25", "queued"]
