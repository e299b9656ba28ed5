"""Earliest deadline first, and a step boundary is enough to go ahead of a later one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastvideo_inference.engine.job import Job

PREEMPTS = True


def order(
    waiting: Sequence[Job], running: Sequence[Job], deadlines_s: Mapping[str, float]
) -> list[Job]:
    """Sort jobs by deadline; those of classes without one come last, in the order of arrival."""
    return sorted(waiting, key=lambda job: (_deadline(job, deadlines_s), job.accepted_at_s))


def preempts(waiting: Job, running: Job, deadlines_s: Mapping[str, float]) -> bool:
    """Tell whether `running` gives its worker to `waiting` at the next step boundary."""
    return _deadline(waiting, deadlines_s) < _deadline(running, deadlines_s)


def _deadline(job: Job, deadlines_s: Mapping[str, float]) -> float:
    return job.accepted_at_s + deadlines_s.get(job.slo_class, math.inf)
