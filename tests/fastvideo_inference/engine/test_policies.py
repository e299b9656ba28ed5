"""Who goes first."""

from __future__ import annotations

from typing import Any

from fastvideo_inference.engine.job import Job, Submission
from fastvideo_inference.engine.policies import deadline, fifo


def job(name: str, at: float, *, owner: str = "", slo_class: str = "", **fields: Any) -> Job:
    submission: Any = Submission("m", None, owner=owner)  # policies look at no parameters
    return Job(name, submission, accepted_at_s=at, slo_class=slo_class, **fields)


def test_owners_take_turns_and_what_was_begun_goes_on_first():
    flood = [job(f"a{n}", n, owner="a") for n in range(3)]
    waiting = [*flood, job("b0", 10, owner="b"), job("b1", 11, owner="b")]
    begun = job("old", 5, owner="a", started_at_s=6.0)
    running = [job("running", 0, owner="a")]
    ordered = [one.id for one in fifo.order([*waiting, begun], running, {})]
    assert ordered == ["old", "b0", "a0", "b1", "a1", "a2"]


def test_the_earliest_deadline_goes_first_and_ahead_of_what_runs():
    limits = {"fast": 5.0, "slow": 60.0}
    jobs = [job(name, at, slo_class=name) for name, at in (("none", 0), ("slow", 1), ("fast", 50))]
    assert [one.id for one in deadline.order(jobs, [], limits)] == ["fast", "slow", "none"]
    none, slow, fast = jobs
    assert deadline.preempts(fast, slow, limits) and deadline.preempts(slow, none, limits)
    assert not deadline.preempts(job("later", 2, slo_class="slow"), slow, limits)
