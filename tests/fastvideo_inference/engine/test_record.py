"""What the engine holds of a job, and for how long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastvideo_inference.engine import record
from fastvideo_inference.engine.job import Job
from fastvideo_inference.engine.record import PromptCache, Record

from fastvideo import hub
from tests.fastvideo_inference.engine.conftest import submission


def test_a_slow_reader_keeps_the_newest_events(tiny_folder: Path):
    held = Record(Job("a", submission(tiny_folder)))
    slow = held.read()
    for index in range(record._READER_EVENTS + 10):
        held.tell("progress", index=index)
    read = [slow.get_nowait() for _ in range(slow.qsize())]
    newest = range(10, record._READER_EVENTS + 10)
    assert [event.values["index"] for event in read] == [*newest]


def test_a_prompt_of_another_model_is_another_prompt(tiny_folder: Path):
    asked = submission(tiny_folder)
    spec = hub.open_model(tiny_folder).spec
    keys = {Record(Job("a", replace(asked, model=m)), spec).prompt_key for m in ("a", "b", "a")}
    assert len(keys) == 2


def test_cached_prompts_are_few_and_of_few_bytes_and_the_last_used_stay():
    cache, half = PromptCache(), record._CACHE_BYTES // 2
    for name in ("a", "b"):
        cache.put((name,), name, (), half)
    assert cache.get(("a",))
    cache.put(("c",), "c", (), half)
    assert [cache.get((name,)) is not None for name in "abc"] == [True, False, True]
    for number in range(record._CACHE_ENTRIES):
        cache.put((number,), number, (), 0)
    assert cache.get(("c",)) is None and cache.get((0,))
