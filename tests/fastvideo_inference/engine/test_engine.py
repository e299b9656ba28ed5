"""Jobs in, files out: the frames of the pipeline, whoever makes them."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastvideo_inference.engine import ledger
from fastvideo_inference.engine.executors import local
from fastvideo_inference.engine.job import (
    ConflictError,
    EngineStoppingError,
    GoneError,
    Job,
    QueueFullError,
)
from fastvideo_inference.engine.journal import Journal
from fastvideo_inference.engine.ledger import WORK
from fastvideo_inference.engine.messages import Setup, Task
from fastvideo_inference.engine.worker import Worker
from fastvideo_inference.recipe import read_recipe
from fastvideo_inference.video import Video
from tiny_loras import pairs, write_as

from fastvideo import VideoPipeline, hub
from fastvideo.model import load
from fastvideo.stages import Progress, decode, denoise
from tests.fastvideo_inference.engine.conftest import (
    MONOLITH,
    PAIR,
    SPLIT,
    at,
    ended,
    running,
    settled,
    submission,
    until,
)
from tests.fastvideo_inference.test_decoder import random_decoder, write


@pytest.mark.parametrize(
    ("executor", "worker"),
    [
        ("local", MONOLITH),
        ("local", SPLIT),
        ("process", PAIR),
        pytest.param("process", SPLIT, marks=pytest.mark.full),
        pytest.param("process", MONOLITH, marks=pytest.mark.full),
    ],
)
def test_workers_make_the_pipeline_s_clip_with_its_recipe(
    tiny_folder: Path, tmp_path: Path, expected, worker, executor
):
    async def main():
        async with running(tiny_folder, tmp_path, worker, executor=executor) as engine:
            jobs = [await engine.submit(submission(tiny_folder, seed=seed)) for seed in (3, 4)]
            return [await ended(engine, job) for job in jobs]

    num_attempts = {len(MONOLITH): 1, len(PAIR): 3, len(SPLIT): 3}[len(worker)]
    for seed, job in zip((3, 4), asyncio.run(main()), strict=True):
        assert job.failure is None and job.status == "completed"
        assert job.frames_sha256 == expected(seed)
        assert job.path == tmp_path / f"{job.id}.mp4"
        recipe = read_recipe(job.path)
        assert recipe.model_dump(mode="json") == job.recipe
        stages = [name for name in job.stage_seconds if not name.startswith("load.")]
        assert stages == [*hub.open_model(tiny_folder).spec.stages, "save"]
        assert job.attempt == num_attempts or job.stage_seconds["encode_text"] == 0


def test_a_restart_keeps_finished_jobs_and_makes_those_that_waited(
    tiny_folder: Path, tmp_path: Path, expected
):
    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            first = await ended(engine, await engine.submit(submission(tiny_folder, seed=1)))
            waits = [await engine.submit(submission(tiny_folder, seed=s)) for s in (2, 3)]
            reader = asyncio.create_task(ended(engine, waits[1]))
            await asyncio.sleep(0)
        assert (await reader).status != "completed"  # streams end with the engine
        assert len([event async for event in engine.events(waits[1].id)]) == 1
        async with running(tiny_folder, tmp_path) as engine:
            assert engine.job(first.id) == first
            assert [job.id for job in engine.jobs()] == [waits[1].id, waits[0].id, first.id]
            return [await ended(engine, job) for job in waits]

    jobs = asyncio.run(main())
    assert [job.frames_sha256 for job in jobs] == [expected(2), expected(3)]


def test_a_restart_fails_interrupted_jobs_if_so_configured(tiny_folder: Path, tmp_path: Path):
    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            await engine.ready()
            long = submission(tiny_folder, num_inference_steps=300)
            jobs = [await engine.submit(long), await engine.submit(submission(tiny_folder))]
            await until(engine, jobs[0], step=2)
        named, part = tmp_path / f"{jobs[0].id}.mp4", tmp_path / WORK / "part.mp4"
        part.parent.mkdir()
        for path in (named, part):  # as after a power cut: one of them not committed
            path.write_bytes(b"half")
        async with running(tiny_folder, tmp_path, interrupted="fail") as engine:
            assert not named.exists() and not part.exists()
            return [await ended(engine, job) for job in jobs]

    interrupted, waited = asyncio.run(main())
    assert (interrupted.status, interrupted.failure.code) == ("failed", "interrupted")
    assert waited.status == "completed"


def test_a_folder_has_one_engine(tiny_folder: Path, tmp_path: Path):
    async def main():
        async with running(tiny_folder, tmp_path):
            with pytest.raises(ValueError, match="belongs to an engine"):
                async with running(tiny_folder, tmp_path):
                    pass
        async with running(tiny_folder, tmp_path):
            pass

    asyncio.run(main())


def test_an_idempotency_key_gives_its_first_job_again_for_a_day_also_after_a_restart(
    tiny_folder: Path, tmp_path: Path, monkeypatch
):
    def asked(seed: int, key: str = "k", owner: str = "me"):
        beside = {"idempotency_key": key, "body_sha256": str(seed), "owner": owner}
        return submission(tiny_folder, seed=seed, beside=beside)

    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            both = await asyncio.gather(engine.submit(asked(1)), engine.submit(asked(1)))
            others = [
                await engine.submit(asked(2, "l")),
                await engine.submit(asked(2, owner="you")),
            ]
            await engine.delete(others[0].id)
            with pytest.raises(GoneError):
                await engine.submit(asked(2, "l"))
        async with running(tiny_folder, tmp_path) as engine:
            assert len({both[0].id, both[1].id, *(job.id for job in others)}) == 3
            assert (await engine.submit(asked(1))).id == both[0].id
            with pytest.raises(ConflictError):
                await engine.submit(asked(2))
            assert others[0].id not in [job.id for job in engine.jobs()]
            with pytest.raises(GoneError, match=others[0].id):
                await engine.submit(asked(2, "l"))
            with pytest.raises(ConflictError, match="another request"):
                await engine.submit(asked(3, "l"))
            monkeypatch.setattr(ledger, "KEPT_S", 0.0)  # a day later
            new = [await engine.submit(asked(2)), await engine.submit(asked(2, "l"))]
            assert not {job.id for job in new} & {job.id for job in (both[0], *others)}
            await engine.delete(both[0].id)
            assert not {both[0].id, others[0].id} & {*engine._records}
            assert engine.job(others[1].id)

    asyncio.run(main())


def test_a_full_queue_says_when_to_come_again_and_a_cancelled_job_makes_room(
    tiny_folder: Path, tmp_path: Path
):
    classes = [{"name": "default", "queue": 2}, {"name": "other", "queue": 1}]

    async def main():
        async with running(tiny_folder, tmp_path, **{"class": classes}) as engine:
            await engine.ready()
            running_ = await engine.submit(submission(tiny_folder, num_inference_steps=300))
            waiting = [await engine.submit(submission(tiny_folder)) for _ in range(2)]
            assert [engine.queue_position(job.id) for job in (running_, *waiting)] == [None, 0, 1]
            with pytest.raises(QueueFullError) as full:
                await engine.submit(submission(tiny_folder))
            assert full.value.retry_after_s >= 1
            await engine.submit(submission(tiny_folder, beside={"slo_class": "other"}))
            with pytest.raises(ValueError, match="slo_class 'othr' is unknown"):
                await engine.submit(submission(tiny_folder, beside={"slo_class": "othr"}))
            assert engine.stats()["queued"] == {"default": 2, "other": 1}
            cancelled = await asyncio.gather(*(engine.cancel(j.id) for j in (waiting[0], running_)))
            assert [job.status for job in cancelled] == ["cancelled"] * 2
            last = await ended(engine, await engine.submit(submission(tiny_folder)))
            assert last.status == "completed"
            assert engine.stats()["cancelled"] == 2
            assert not list(tmp_path.glob(f"*{running_.id}*"))
            assert engine.stats()["stage_s"]["denoise"][0] == engine.stats()["completed"] + 1

    asyncio.run(main())


def test_events_tell_the_way_of_a_job_with_previews_if_asked(preview_folder: Path, tmp_path: Path):
    async def main():
        async with running(preview_folder, tmp_path, SPLIT) as engine:
            beside = {"previews": True}
            job = await engine.submit(submission(preview_folder, seed=2, beside=beside))
            return [event async for event in engine.events(job.id)]

    events = asyncio.run(main())
    statuses = [e.values["status"] for e in events if e.kind == "status"]
    assert statuses[-2:] == ["in_progress", "completed"]
    assert statuses[:-2] in ([], ["queued"])
    steps = [e.values for e in events if e.kind == "progress"]
    assert [s["index"] for s in steps if s["stage"] == "denoise"] == [0, 1, 2]
    assert [s["progress"] for s in steps] == sorted(s["progress"] for s in steps)
    sheets = [e.values for e in events if e.kind == "preview"]
    shown = [(s["stage"], s["index"]) for s in sheets]
    assert shown[:2] == [("denoise", 1), ("denoise", 2)]
    assert shown[2:] and shown[-1] == ("decode", 9), "frames as they are decoded"
    assert all(sheet["png"].startswith(b"\x89PNG") for sheet in sheets)


@pytest.mark.full
@pytest.mark.parametrize(("policy", "count"), [("fifo", 2), ("deadline", 1), ("deadline", 2)])
def test_few_states_wait_between_two_stages(
    tiny_folder: Path, tmp_path: Path, monkeypatch, policy: str, count: int
):
    held = threading.Event()
    run = decode.run

    def slow(model, state):
        if state.params.seed > 1:  # no warm-up
            held.wait(30)
        yield from run(model, state)

    monkeypatch.setattr(decode, "run", slow)

    async def main():
        classes = [{"name": "batch"}, {"name": "clip", "deadline_s": 5}]
        config = {"class": classes, "policy": policy, "in_flight": 2}
        workers = [{**SPLIT[0], "count": count}, *SPLIT[1:]]
        async with running(tiny_folder, tmp_path, workers, **config) as engine:
            await engine.ready()
            jobs = []
            for name in ("batch", "clip"):  # the urgent ones come when the row is full
                beside = {"slo_class": name}
                asked = [submission(tiny_folder, seed=s, beside=beside) for s in range(2, 8)]
                jobs += [await engine.submit(one) for one in asked]
                await settled(engine)
            begun = [job for job in engine.jobs() if job.status == "in_progress"]
            held.set()
            made = [await ended(engine, job) for job in jobs]
            return len(begun), made

    num_begun, made = asyncio.run(main())
    # in decode, before it and before denoise; there both workers run, and the most urgent job has
    # a place more
    assert num_begun == 1 + 2 + max(2, count + (policy == "deadline"))
    assert {job.status for job in made} == {"completed"}


TWO = [SPLIT[0], {**SPLIT[1], "count": 2}, SPLIT[2]]


@pytest.mark.parametrize("worker", [MONOLITH, SPLIT, pytest.param(TWO, marks=pytest.mark.full)])
def test_an_urgent_job_stops_another_at_a_step_which_goes_on_to_the_same_frames(
    tiny_folder: Path, tmp_path: Path, expected, worker
):
    classes = [{"name": "batch"}, {"name": "clip", "deadline_s": 5}]

    async def main():
        config = {"class": classes, "policy": "deadline"}
        async with running(tiny_folder, tmp_path, worker, **config) as engine:
            await engine.ready()
            slow = submission(tiny_folder, num_inference_steps=60)
            jobs = [await engine.submit(slow) for _ in range(4)]
            await until(engine, jobs[0], step=2)
            own = {"beside": {"slo_class": "clip"}, "prompt": "a blue ball"}
            urgent = await ended(engine, await engine.submit(submission(tiny_folder, **own)))
            now = [engine.job(job.id) for job in jobs]
            assert {job.finished_at_s for job in now} == {None}
            (stopped,) = (job for job in now if "denoise" in job.stage_seconds)
            for job in now:
                if job is not stopped:
                    await engine.cancel(job.id)
            return stopped, await ended(engine, stopped), urgent

    stopped, long, urgent = asyncio.run(main())
    assert long.stage_seconds["denoise"] >= stopped.stage_seconds["denoise"] > 0
    assert long.attempt > urgent.attempt
    assert (urgent.status, long.deaths) == ("completed", 0)
    assert long.frames_sha256 == expected(num_inference_steps=60)


def test_a_job_that_is_cancelled_while_it_is_dispatched_stays_cancelled(
    tiny_folder: Path, tmp_path: Path
):
    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            await engine.ready()
            first = await engine.submit(submission(tiny_folder, num_inference_steps=5))
            other = await engine.submit(submission(tiny_folder, prompt="a blue ball"))
            hear, loop = engine._fleet._hear, asyncio.get_running_loop()
            cancelled: list[asyncio.Future[Job]] = []

            def heard(slot, report):  # in the turn of the loop in which the first one ends
                if report.kind == "finished" and report.job_id == first.id:
                    cancelled.append(asyncio.ensure_future(engine.cancel(other.id)))
                    loop.call_soon(hear, slot, report)
                else:
                    hear(slot, report)

            engine._fleet._hear = heard
            await ended(engine, first)
            assert (await cancelled[0]).status == "cancelled"
            return other

    other = asyncio.run(main())
    journal = Journal(tmp_path)
    found = {job.id: job.status for job, _ in journal.jobs()}
    journal.close()
    assert found[other.id] == "cancelled"


def test_deaths_are_written_down_and_a_restart_gives_up_what_has_two(
    tiny_folder: Path, tmp_path: Path
):
    async def die() -> Job:
        async with running(tiny_folder, tmp_path) as engine:
            await engine.ready()
            job = await engine.submit(submission(tiny_folder, num_inference_steps=60))
            await until(engine, job, step=1)
            engine._fleet.lose(engine._fleet.slots[0], "test")
            found = engine.job(job.id)
            assert found is not None and found.deaths == 1
            return found

    job = asyncio.run(die())
    journal = Journal(tmp_path)
    (kept,) = (one for one, _ in journal.jobs() if one.id == job.id)
    assert kept.deaths == 1
    journal.put(replace(kept, deaths=2))
    journal.close()

    async def again() -> Job:
        async with running(tiny_folder, tmp_path) as engine:
            return await ended(engine, job)

    found = asyncio.run(again())
    assert found.failure is not None and found.failure.code == "worker_died"


def test_an_urgent_job_waits_for_a_decode_which_could_not_go_on_from_its_middle(
    tiny_folder: Path, tmp_path: Path, monkeypatch
):
    classes = [{"name": "batch"}, {"name": "clip", "deadline_s": 5}]
    run, held = decode.run, threading.Event()

    def slow(model, state):
        events = run(model, state)
        yield next(events)
        if state.params.seed:
            held.wait(30)
        yield Progress("decode", 1, 2)  # a boundary
        yield from events

    monkeypatch.setattr(decode, "run", slow)

    async def main():
        config = {"class": classes, "policy": "deadline"}
        async with running(tiny_folder, tmp_path, **config) as engine:
            await engine.ready()
            first = await engine.submit(submission(tiny_folder, seed=1))
            await at(engine, first, "decode")
            urgent = submission(tiny_folder, beside={"slo_class": "clip"})
            jobs = [first, await engine.submit(urgent)]
            held.set()
            return [await ended(engine, job) for job in jobs]

    assert [job.attempt for job in asyncio.run(main())] == [1, 1]


def test_a_job_that_is_cancelled_while_its_file_is_written_leaves_none(
    tiny_folder: Path, tmp_path: Path, monkeypatch
):
    save, began, held = Video.save, threading.Event(), threading.Event()

    def slow(self: Video, path: Path, **words: Any) -> Path:
        began.set()
        held.wait(30)
        return save(self, path, **words)

    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            await engine.ready()
            monkeypatch.setattr(Video, "save", slow)
            first = await engine.submit(submission(tiny_folder))
            await asyncio.to_thread(began.wait, 30)
            await engine.cancel(first.id)
            held.set()
            last = await ended(engine, await engine.submit(submission(tiny_folder)))
            assert engine.job(first.id).status == "cancelled"
            assert not [*(tmp_path / WORK).glob("*.mp4")]
            assert [*tmp_path.glob("*.mp4")] == [last.path]

    asyncio.run(main())


def test_a_cancel_that_comes_with_the_end_changes_nothing(tiny_folder: Path, tmp_path: Path):
    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            await engine.ready()
            cancels, hear = [], engine._fleet._hear

            def cancel_late(slot, report):
                hear(slot, report)
                if report.kind == "finished":
                    cancels.append(asyncio.ensure_future(engine.cancel(report.job_id)))

            engine._fleet._hear = cancel_late
            job = await ended(engine, await engine.submit(submission(tiny_folder)))
            assert (await cancels[0]).status == job.status == "completed"
            counts = engine.stats()
            assert (counts["completed"], counts["cancelled"]) == (1, 0)
            assert [*tmp_path.glob("*.mp4")] == [job.path]

    asyncio.run(main())


def test_a_file_has_its_name_on_the_disk_before_the_journal_says_so(
    tiny_folder: Path, tmp_path: Path, monkeypatch
):
    sync, put, order = os.fsync, Journal.put, []

    def noting_sync(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            order.append([path.name for path in tmp_path.glob("*.mp4")])
        sync(descriptor)

    def noting_put(self: Journal, job: Job) -> None:
        order.append(job.status)
        put(self, job)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(Journal, "put", noting_put)

    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            return await ended(engine, await engine.submit(submission(tiny_folder)))

    job = asyncio.run(main())
    assert order == ["queued", "in_progress", [job.path.name], "completed"]


def test_a_clip_stands_in_for_the_warm_up_which_comes_behind_all_others(
    tiny_folder: Path, tmp_path: Path, monkeypatch
):
    run, held = local._Thread._run, threading.Event()
    monkeypatch.setattr(local._Thread, "_run", lambda self: (held.wait(30), run(self)))

    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            first = await engine.submit(submission(tiny_folder))
            long = await engine.submit(submission(tiny_folder, num_inference_steps=999))
            while len(engine._waiting) < 3:
                await asyncio.sleep(0.01)
            held.set()
            await engine.ready()
            assert engine._records[first.id].is_over
            assert engine.job(long.id).status in ("queued", "in_progress")

    asyncio.run(main())


def test_a_drain_ends_what_was_begun_and_leaves_the_rest_to_the_next_start(
    tiny_folder: Path, tmp_path: Path, monkeypatch
):
    run, held = denoise.run, threading.Event()

    def slow(model, state):
        held.wait(30)
        yield from run(model, state)

    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            await engine.ready()
            monkeypatch.setattr(denoise, "run", slow)
            jobs = [await engine.submit(submission(tiny_folder)) for _ in range(3)]
            drain = asyncio.create_task(engine.drain())
            await asyncio.sleep(0)  # it has begun, and the first job is not at its end
            held.set()
            await drain
            with pytest.raises(EngineStoppingError):
                await engine.submit(submission(tiny_folder))
        # a decided end is committed by the stop at the latest: a full disk holds up no drain
        assert [engine.job(job.id).status for job in jobs] == ["completed", "queued", "queued"]
        async with running(tiny_folder, tmp_path) as engine:
            assert [(await ended(engine, job)).status for job in jobs] == ["completed"] * 3

    asyncio.run(main())


def test_a_drain_takes_no_worker_from_what_was_begun(tiny_folder: Path, tmp_path: Path):
    classes = [{"name": "batch"}, {"name": "clip", "deadline_s": 5}]

    async def main():
        config = {"class": classes, "policy": "deadline"}
        async with running(tiny_folder, tmp_path, **config) as engine:
            await engine.ready()
            begun = await engine.submit(submission(tiny_folder, num_inference_steps=40))
            await until(engine, begun, step=1)
            own = {"beside": {"slo_class": "clip"}, "prompt": "a blue ball"}
            await engine.submit(submission(tiny_folder, **own))  # which asks the worker back
            await asyncio.wait_for(engine.drain(), 60)
            return engine.job(begun.id)

    assert asyncio.run(main()).attempt <= 2


def test_a_job_whose_class_is_gone_is_made_in_the_first_one(tiny_folder: Path, tmp_path: Path):
    async def main():
        both = [{"name": "batch"}, {"name": "clip"}]
        async with running(tiny_folder, tmp_path, **{"class": both}) as engine:
            long = submission(tiny_folder, num_inference_steps=300)
            await engine.submit(long)
            beside = {"slo_class": "clip"}
            job = await engine.submit(submission(tiny_folder, beside=beside))
            await engine.cancel(engine.jobs()[-1].id)
        async with running(tiny_folder, tmp_path, **{"class": both[:1]}) as engine:
            assert engine.stats()["queued"].keys() == {"batch"}
            return await ended(engine, job)

    job = asyncio.run(main())
    assert (job.status, job.slo_class) == ("completed", "batch")


def test_the_clips_of_one_request_are_let_in_and_remembered_together(
    tiny_folder: Path, tmp_path: Path, expected
):
    async def main():
        queue = {"class": [{"name": "only", "queue": 3}]}
        async with running(tiny_folder, tmp_path, **queue) as engine:
            engine._pump = lambda: None  # nothing begins
            beside = {"count": 4, "idempotency_key": "k"}
            with pytest.raises(QueueFullError):
                await engine.submit(submission(tiny_folder, seed=7, beside=beside))
            assert not engine.jobs()
            asked = submission(tiny_folder, seed=7, beside={**beside, "count": 3})
            first = await engine.submit(asked)
        async with running(tiny_folder, tmp_path, **queue) as engine:
            assert (await engine.submit(asked)).id == first.id
            assert first.clips == tuple(job.id for job in engine.jobs()[::-1])
            return [await ended(engine, engine.job(one)) for one in first.clips]

    jobs = asyncio.run(main())
    assert [job.frames_sha256 for job in jobs] == [expected(seed) for seed in (7, 8, 9)]


def test_a_drain_does_not_wait_for_the_warm_up(tiny_folder: Path, tmp_path: Path, monkeypatch):
    run, begun, held = denoise.run, threading.Event(), threading.Event()

    def slow(model, state):
        begun.set()
        held.wait(30)
        yield from run(model, state)

    monkeypatch.setattr(denoise, "run", slow)

    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            await asyncio.to_thread(begun.wait, 30)
            drain = asyncio.create_task(engine.drain())
            done, _ = await asyncio.wait([drain], timeout=20)
            held.set()
            return done == {drain}

    assert asyncio.run(main())


def test_a_cached_prompt_is_not_encoded_again_and_its_notices_stay(
    tiny_folder: Path, tmp_path: Path, expected
):
    prompt = "a red ball " * 20

    async def main():
        async with running(tiny_folder, tmp_path, SPLIT) as engine:
            await engine.ready()
            jobs = []
            for seed in (1, 2):
                asked = submission(tiny_folder, seed=seed, prompt=prompt)
                jobs.append(await ended(engine, await engine.submit(asked)))
            assert engine.stats()["stage_s"]["encode_text"][0] == 2  # with the warm-up
            return jobs

    first, second = asyncio.run(main())
    assert first.notices == second.notices and len(first.notices) == 1
    assert (second.attempt, second.stage_seconds["encode_text"]) == (3, 0)
    assert second.frames_sha256 == expected(seed=2, prompt=prompt)


def test_equal_prompts_of_other_negative_prompts_are_encoded_apart(
    tiny_folder: Path, tmp_path: Path, expected
):
    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            words = [{"guidance_scale": 3.0, "negative_prompt": one} for one in ("night", "blue")]
            jobs = [await engine.submit(submission(tiny_folder, **one)) for one in words]
            return [(one, await ended(engine, job)) for one, job in zip(words, jobs, strict=True)]

    for fields, job in asyncio.run(main()):
        assert job.frames_sha256 == expected(prompt="a red ball", seed=0, **fields)


def test_parts_that_do_not_fit_together_are_freed_for_each_other(
    tiny_folder: Path, tmp_path: Path, expected, caplog
):
    async def main():
        async with running(tiny_folder, tmp_path, [{"memory": 1e-9}]) as engine:
            asked = [submission(tiny_folder, seed=s, prompt=f"a ball {s}") for s in (5, 6)]
            jobs = [await engine.submit(one) for one in asked]
            return [await ended(engine, job) for job in jobs]

    with caplog.at_level("INFO", logger="fastvideo"):
        jobs = asyncio.run(main())
    assert [job.frames_sha256 for job in jobs] == [expected(s, f"a ball {s}") for s in (5, 6)]
    assert {"load.text", "load.dit", "load.vae"} <= jobs[1].stage_seconds.keys()
    assert "dit of" in caplog.text and "is freed" in caplog.text


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_part_that_is_freed_is_gone_without_a_collection_of_garbage(
    tiny_copy: Path, tmp_path: Path, with_lora: bool
):
    net = load(tiny_copy, device="cpu", parts=("dit",)).dit
    lora = {"lora": [f"{write_as('comfy', tmp_path, pairs(net))}:0.5"]} if with_lora else {}
    worker = Worker(Setup("cpu", memory=1e-9, heartbeat_s=1.0), lambda _: None)
    asked, row = submission(tiny_copy, **lora), hub.open_model(tiny_copy).spec.stages
    task = Task("a", 1, asked, (), row[:-1], row[-1:], tmp_path / "a.mp4", 1)
    gc.disable()
    try:
        worker.run(task)
        (held,) = worker._parts._parts.values()
        weights = [weakref.ref(one) for one in held.dit.parameters()]
        del held
        worker._parts.model(str(tiny_copy), ("vae",))
        assert weights and not any(one() is not None for one in weights)
    finally:
        gc.enable()


def test_a_request_that_no_worker_can_make_is_refused(tiny_folder: Path, tmp_path: Path):
    async def main():
        async with running(tiny_folder, tmp_path, SPLIT) as engine:
            with pytest.raises(ValueError, match="no worker has stage encode_text of model"):
                await engine.submit(replace(submission(tiny_folder), model="fastwan-nano"))

    asyncio.run(main())


def test_loras_and_small_decoders_are_the_pipeline_s_also_in_split_stages(
    tiny_copy: Path, tmp_path: Path
):
    small = write(random_decoder(), tmp_path / "small")
    net = load(tiny_copy, device="cpu", parts=("dit",)).dit
    lora = [f"{write_as('comfy', tmp_path, pairs(net))}:0.5"]

    async def main():
        async with running(tiny_copy, tmp_path / "out", SPLIT) as engine:
            asked = [
                submission(tiny_copy, seed=1),
                submission(tiny_copy, seed=1, lora=lora, beside={"decoder": str(small)}),
                submission(tiny_copy, seed=1),
            ]
            return [await ended(engine, await engine.submit(one)) for one in asked]

    plain, other, again = asyncio.run(main())
    pipe = VideoPipeline.from_pretrained(tiny_copy, device="cpu", decoder=str(small))
    video = pipe("a red ball", seed=1, lora=lora)
    assert other.frames_sha256 == video.frames_sha256 != plain.frames_sha256
    assert other.recipe == video.recipe
    assert again.frames_sha256 == plain.frames_sha256


def test_what_was_asked_is_done_though_nobody_waits_for_the_answer(
    tiny_folder: Path, tmp_path: Path
):
    async def abandon(call):
        task = asyncio.create_task(call)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            await engine.ready()
            await abandon(engine.submit(submission(tiny_folder, num_inference_steps=500)))
            while not engine.jobs():
                await asyncio.sleep(0.01)
            (job,) = engine.jobs()
            await abandon(engine.cancel(job.id))
            assert (await ended(engine, job)).status == "cancelled"
            other = await engine.submit(submission(tiny_folder, num_inference_steps=500))
            await abandon(engine.delete(other.id))
        assert engine.job(other.id) is None
        for call in (engine.cancel, engine.delete):
            with pytest.raises(EngineStoppingError):
                await call(job.id)

    asyncio.run(main())
