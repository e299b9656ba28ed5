"""How long a worker may be silent at its task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvideo_inference.engine.book import Book
from fastvideo_inference.engine.config import ServeConfig
from fastvideo_inference.engine.executors.local import Executor
from fastvideo_inference.engine.fleet import LOAD_LIMIT_S, Fleet
from fastvideo_inference.engine.messages import Report, Task

from tests.fastvideo_inference.engine.conftest import submission


def test_a_worker_s_first_step_of_a_stage_has_no_limit_and_the_next_five_times_the_usual(
    tiny_folder: Path,
):
    fleet = Fleet(ServeConfig(), Executor(), Book(), hear=print, lost=print)
    (slot,) = fleet.slots
    task = Task("a", 1, submission(tiny_folder), (), ("denoise",), (), Path("a"), 1)

    def limit_s(at_s: float, kind: Any, *values: Any) -> float | None:
        named = dict(zip(("stage", "index"), values, strict=False))
        fleet._clock(slot, task, Report(kind, "a", 1, named), at_s)
        return slot.limit_s

    assert limit_s(0, "loading") == LOAD_LIMIT_S
    assert limit_s(100, "progress", "denoise", 0) is None
    assert limit_s(120, "progress", "denoise", 1) == 100
    assert limit_s(121, "notice") == 100 and slot.since == 120
    assert limit_s(140, "progress", "denoise", 2) == 100
    assert limit_s(141, "progress", "decode", 0) is None
    assert limit_s(141, "stopped") is None
    assert limit_s(200, "progress", "denoise", 2) == 100  # what was between stages did not count
    slot.ran = set()  # another worker
    assert limit_s(201, "progress", "denoise", 0) is None
    assert limit_s(203, "progress", "denoise", 1) > 70
