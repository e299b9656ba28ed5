"""First come, first served, in turns between owners; nothing that runs is interrupted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fastvideo_inference.engine.job import Job

PREEMPTS = False


def order(
    waiting: Sequence[Job], running: Sequence[Job], deadlines_s: Mapping[str, float]
) -> list[Job]:
    """Sort jobs by who goes first: those begun before, then each owner's first, second, ..."""
    turns = Counter(job.submission.owner for job in running)

    def turn(job: Job) -> int:
        if job.started_at_s is not None:
            return -1
        turns[job.submission.owner] += 1
        return turns[job.submission.owner]

    arrived = sorted(waiting, key=lambda job: job.accepted_at_s)
    return [job for _, job in sorted(((turn(job), job) for job in arrived), key=lambda one: one[0])]
