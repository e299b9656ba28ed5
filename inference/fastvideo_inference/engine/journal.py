"""The journal: a row per job, committed before the reply; sqlite (WAL), with one owner.

Its methods block on the disk; the engine calls them in a thread beside its event loop.
"""

from __future__ import annotations

import errno
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import TypeAdapter

from fastvideo import files
from fastvideo_inference.engine.job import Job

FILE = "journal.sqlite"
_VERSION = 1
KEPT_S = 24 * 3600.0  # idempotency keys, and the rows of deleted jobs
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, status TEXT NOT NULL, accepted_at_s REAL NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0, job TEXT NOT NULL
) STRICT
"""
_PUT = """
INSERT INTO jobs (id, status, accepted_at_s, job) VALUES (?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET status = excluded.status, job = excluded.job
"""
_PRUNE = "DELETE FROM jobs WHERE deleted AND json_extract(job, '$.finished_at_s') < ?"
_ALL = "SELECT job, deleted FROM jobs ORDER BY accepted_at_s, rowid"


class Journal:
    """The jobs of a folder; `ValueError` if another engine owns them."""

    def __init__(self, folder: Path) -> None:
        self._held = ExitStack()
        if not self._held.enter_context(files.claimed(folder / FILE)):
            raise ValueError(f"folder {folder} belongs to an engine that runs; choose another one")
        self._json = TypeAdapter(Job)
        self._path = folder / FILE
        try:
            # used by one thread at a time, though not always by the one that opens it
            self._rows = sqlite3.connect(self._path, check_same_thread=False)
            self._rows.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL")
            (version,) = self._rows.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise ValueError(f"{self._path} is of version {version}; this release reads 1")
            self._rows.executescript(f"{_SCHEMA}; PRAGMA user_version = {_VERSION}")
        except sqlite3.Error as error:
            self._held.close()
            raise ValueError(f"{self._path} cannot be read: {error}") from None
        except ValueError:
            self._held.close()
            raise

    def put(self, *jobs: Job) -> None:
        """Commit jobs as they are, all or none; `OSError` if the disk refuses."""
        rows = [
            (job.id, job.status, job.accepted_at_s, self._json.dump_json(job).decode())
            for job in jobs
        ]
        with self._committing():
            self._rows.executemany(_PUT, rows)

    def delete(self, job_id: str) -> None:
        """Mark a job as deleted; its row keeps for a day how it ended."""
        with self._committing():
            self._rows.execute("UPDATE jobs SET deleted = 1 WHERE id = ?", (job_id,))
            self._rows.execute(_PRUNE, (time.time() - KEPT_S,))

    def jobs(self) -> list[tuple[Job, bool]]:
        """Return all jobs, oldest first, and whether they were deleted within a day."""
        with self._committing():
            self._rows.execute(_PRUNE, (time.time() - KEPT_S,))
            rows = self._rows.execute(_ALL).fetchall()
        return [(self._json.validate_json(text), bool(deleted)) for text, deleted in rows]

    def close(self) -> None:
        """Let another engine own the folder."""
        self._rows.close()
        self._held.close()

    @contextmanager
    def _committing(self) -> Iterator[None]:
        try:
            with self._rows:
                yield
        except sqlite3.DatabaseError as error:
            raise OSError(errno.EIO, str(error), str(self._path)) from None
