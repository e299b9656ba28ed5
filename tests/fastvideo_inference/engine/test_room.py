"""Which jobs go on to the next stage, and which ones wait: the engine's choice, without workers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastvideo_inference.engine import pools
from fastvideo_inference.engine.config import ServeConfig
from fastvideo_inference.engine.engine import Engine
from fastvideo_inference.engine.job import Job, Submission
from fastvideo_inference.engine.messages import Task
from fastvideo_inference.engine.record import Record

from fastvideo import hub
from fastvideo.config import parse
from tests.fastvideo_inference.engine.conftest import SPLIT, submission

CLASSES = [{"name": "batch"}, {"name": "clip", "deadline_s": 5}]


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Engine]:
    def unstarted(worker: list[dict[str, Any]], **config: Any) -> Engine:
        tree = {"executor": "local", "folder": tmp_path, "worker": worker, "in_flight": 2}
        return Engine(parse(ServeConfig, {**tree, "class": CLASSES, **config}, source="test"))

    return unstarted


@pytest.fixture
def record(tiny_folder: Path) -> Callable[..., Record]:
    """A job of a model, of whose row so many stages are done."""

    def made(name: str, *, model: str = "a", index: int = 0, **fields: Any) -> Record:
        asked = replace(submission(tiny_folder), model=model, owner=fields.pop("owner", ""))
        job = Job(name, asked, **{"slo_class": "batch", **fields})
        return Record(job, hub.open_model(tiny_folder).spec, index=index, is_handed=index > 0)

    return made


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_that_is_stuck_holds_up_those_that_need_its_workers_alone(engine, record, shared):
    models = [{**one, "model": model} for model in "ab" for one in SPLIT]
    if shared:
        models = [{**one, "model": model} for model in "ab" for one in SPLIT[:2]] + SPLIT[2:]
    held = engine(models)
    row = record("row").row
    denoise, decode = row.index("denoise"), row.index("decode")
    slots = [slot for slot in held._fleet.slots if "denoise" in slot.config.stages]
    held._waiting = [record(f"stuck {n}", index=decode) for n in range(2)]
    rooms = [held._room(record("new", model=m, index=denoise), slots["ab".index(m)]) for m in "ab"]
    assert rooms == [False, not shared]


@pytest.mark.parametrize("count", [1, 2])
def test_all_workers_of_a_pool_run_and_a_place_more_is_kept_for_the_most_urgent_job(
    engine, record, count: int
):
    held = engine([{**SPLIT[0], "count": count}, *SPLIT[1:]], policy="deadline")
    slot = held._fleet.slots[0]
    denoise = record("row").row.index("denoise")
    asked = [record("late", accepted_at_s=1.0), record("urgent", slo_class="clip")]

    def rooms(waiting: int) -> list[bool]:
        held._waiting = [record(f"first {n}", index=denoise) for n in range(waiting)]
        return [held._room(one, slot) for one in asked]

    assert rooms(count - 1) == [True, True]
    assert rooms(count) == [False, True]
    assert rooms(count + 1) == [False, False]


@pytest.mark.parametrize("stuck", [1, 2])
def test_an_urgent_job_asks_no_worker_back_that_could_not_hand_on_its_state(
    engine, record, monkeypatch: pytest.MonkeyPatch, stuck: int
):
    held, asked_back = engine(SPLIT, policy="deadline"), []
    monkeypatch.setattr(held._fleet, "stop_task", asked_back.append)
    slot, row = held._fleet.slots[1], record("row").row
    denoise, decode = row.index("denoise"), row.index("decode")
    runs = record("runs", index=denoise, stage="denoise")
    runs.slot, held._records["runs"] = slot, runs
    rest = {"notices": (), "later": ("decode",), "output": Path(), "checkpoint_every": 1}
    slot.task = Task("runs", 1, runs.job.submission, stages=("denoise",), **rest)
    urgent = record("urgent", index=denoise, slo_class="clip")
    held._waiting = [urgent, *(record(f"stuck {n}", index=decode) for n in range(stuck))]
    held._preempt()
    assert asked_back == ([slot] if stuck < held.config.in_flight else [])


def test_a_warm_up_takes_any_place(engine, record):
    held = engine(SPLIT, policy="deadline")
    warmup = record("warm-up", accepted_at_s=math.inf)
    warmup.is_warmup = True
    held._waiting = [record("first", index=record("row").row.index("denoise"))]
    assert held._room(warmup, held._fleet.slots[0])


def test_a_warm_up_does_not_wait_for_ever(engine, record):
    late = record("warm-up", accepted_at_s=time.time() - 1)
    late.is_warmup = True
    assert engine([{}])._order([record("first", accepted_at_s=0.0), late])[0] is late


GROUP = {"devices": ["cpu"] * 3, "parallel": "ulysses=3"}


def test_a_group_gets_no_clip_that_it_could_not_share(record, tiny_folder: Path):
    """A clip of 6 tokens and 2 latent rows: three ranks denoise it, and cannot decode it."""
    own = [{"stages": ["encode_text", "prepare_latents"]}]
    both = {"stages": ["denoise", "decode"], **GROUP}
    config = parse(ServeConfig, {"worker": [*own, both, {"stages": ["decode"]}]}, source="test")
    small = submission(tiny_folder, num_frames=1, height=16, width=48)
    spec = hub.open_model(tiny_folder).spec
    config = config.model_copy(
        update={"worker": [w.model_copy(update={"model": small.model}) for w in config.worker]}
    )
    group = config.worker[1]
    shape = spec.latent_shape(frames=1, height=16, width=48)
    assert shape.tokens(spec.compression.patch).num_tokens >= 3 > shape.height
    pools.check(config.worker, small, spec)
    assert pools.run_on(group, small, spec, spec.stages.index("denoise")) == ("denoise",)
    tiny = submission(tiny_folder, num_frames=1, height=16, width=16)
    with pytest.raises(ValueError, match="cannot be spread over 3 processes"):
        pools.check(config.worker, tiny, spec)
    made = pools.tiny(small.model, spec, config.worker, seed=0)
    pools.check(config.worker, Submission(small.model, made), spec)


def test_warm_ups_come_behind_all_others_though_owners_take_turns(engine, record):
    warmup = record("warm-up", accepted_at_s=math.inf)
    warmup.is_warmup = True
    flood = [record(f"a{n}", owner="a", accepted_at_s=n) for n in range(3)]
    ordered = engine([{}], policy="fifo")._order([warmup, *flood])
    assert [one.id for one in ordered] == ["a0", "a1", "a2", "warm-up"]
