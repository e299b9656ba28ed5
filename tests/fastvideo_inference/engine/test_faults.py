"""Workers and engines that die, stop or hang: no job is lost, none is published twice."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastvideo_inference.engine import book, record
from fastvideo_inference.engine.engine import Engine
from fastvideo_inference.engine.executors import local, process
from fastvideo_inference.engine.job import Job, QueueFullError, Submission
from fastvideo_inference.engine.ledger import WORK
from fastvideo_inference.video import Video

from fastvideo import hub
from fastvideo.stages import Progress, decode, denoise
from tests.fastvideo_inference.engine.conftest import (
    PAIR,
    SPLIT,
    at,
    ended,
    running,
    submission,
    until,
)
from tests.processes import has_ended

BIG = {"num_frames": 33, "height": 64, "width": 64}  # long enough to be hit in the middle
STAGES = ("encode_text", "denoise", "decode")
GROUP = [
    {"stages": ["encode_text", "prepare_latents"]},
    {"stages": ["denoise", "decode"], "devices": ["cpu:0", "cpu:1"], "parallel": "ulysses=2"},
]
EXECUTORS = pytest.mark.parametrize(
    "executor", ["local", pytest.param("process", marks=pytest.mark.full)]
)


def pids(engine: Engine, stage: str) -> tuple[int, ...]:
    (found,) = (w["pids"] for w in engine.stats()["workers"] if stage in w["stages"])
    return tuple(found)


async def replaced(engine: Engine, stage: str, old: tuple[int, ...]) -> None:
    while pids(engine, stage) == old:
        await asyncio.sleep(0.05)
    assert all(has_ended(pid) for pid in old), "all ranks live and die together"


async def fault(engine: Engine, model: Path, stage: str, number: int, rank: int = 0) -> list[Job]:
    """Send a signal to a worker that is idle, and one that is at a job; return two jobs."""
    idle = pids(engine, stage)
    os.kill(idle[rank], number)
    after_idle = await engine.submit(submission(model, seed=1, prompt=f"a red ball {stage}"))
    await replaced(engine, stage, idle)
    await ended(engine, after_idle)
    prompt = f"a big red ball {stage} {number}"  # not in the cache of prompts
    job = await engine.submit(submission(model, seed=2, prompt=prompt, **BIG))
    await at(engine, job, stage)
    busy = pids(engine, stage)
    os.kill(busy[rank], number)
    await replaced(engine, stage, busy)
    return [await ended(engine, after_idle), await ended(engine, job)]


def check(jobs: list[Job], folder: Path, expected: Any, *, others: Sequence[Job] = ()) -> None:
    for job in jobs:
        assert job.failure is None and job.status == "completed"
        params = job.submission.params
        fields = {name: getattr(params, name) for name in ("seed", "prompt", *BIG)}
        assert job.frames_sha256 == expected(**fields)
    published = sorted(path.name for path in folder.glob("*.mp4"))
    assert published == sorted(f"{job.id}.mp4" for job in (*jobs, *others))


def test_a_worker_that_is_killed_or_stopped_is_replaced_and_its_job_goes_on(
    tiny_folder: Path, tmp_path: Path, expected
):
    async def main():
        config = {"executor": "process", "heartbeat_s": 3}
        async with running(tiny_folder, tmp_path, PAIR, **config) as engine:
            await engine.ready()
            idle = pids(engine, "denoise")
            assert os.getsid(idle[0]) != os.getsid(0), (
                "a terminal's Ctrl-C reaches the engine alone"
            )
            os.kill(idle[0], signal.SIGSTOP)
            job = await engine.submit(submission(tiny_folder, seed=2, **BIG))
            await replaced(engine, "denoise", idle)
            await at(engine, job, "decode")
            busy = pids(engine, "decode")
            os.kill(busy[0], signal.SIGKILL)
            await replaced(engine, "decode", busy)
            return [await ended(engine, job)]

    check(asyncio.run(main()), tmp_path, expected)


def test_a_clip_whose_worker_is_lost_while_it_saves_is_decoded_again(
    tiny_folder: Path, tmp_path: Path, expected, monkeypatch
):
    save, faults = Video.save, [RuntimeError("the device fell off the bus")]

    def failing(self: Video, path: Path, **words: Any) -> Path:
        if faults:
            raise faults.pop()
        return save(self, path, **words)

    async def main():
        async with running(tiny_folder, tmp_path, SPLIT) as engine:
            await engine.ready()
            monkeypatch.setattr(Video, "save", failing)
            jobs = [await engine.submit(submission(tiny_folder, seed=s)) for s in (1, 2)]
            return [await ended(engine, job) for job in jobs]

    made = asyncio.run(main())
    assert sum(job.deaths for job in made) == 1 and not faults
    check(made, tmp_path, expected)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_of_every_stage_are_replaced(
    tiny_folder: Path, tmp_path: Path, expected, number: signal.Signals
):
    async def main():
        config = {"executor": "process", "heartbeat_s": 2}
        async with running(tiny_folder, tmp_path, SPLIT, **config) as engine:
            await engine.ready()
            made = [await fault(engine, tiny_folder, stage, number) for stage in STAGES]
            return [job for jobs in made for job in jobs]

    check(asyncio.run(main()), tmp_path, expected)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_is_replaced_whole_when_one_of_its_ranks_is_lost(
    tiny_folder: Path, tmp_path: Path, number: signal.Signals, rank: int
):
    async def main():
        config = {"executor": "process", "heartbeat_s": 2}
        async with running(tiny_folder, tmp_path, GROUP, **config) as engine:
            await engine.ready()
            stage = ("denoise", "decode")[rank]
            one, two = await fault(engine, tiny_folder, stage, number, rank)
            for job in (one, two):  # what it makes undisturbed
                same = engine.job((await engine.submit(job.submission)).id)
                assert (await ended(engine, same)).frames_sha256 == job.frames_sha256

    asyncio.run(main())


@pytest.mark.full
def test_a_request_that_kills_its_workers_fails_with_the_reason_and_others_are_made(
    tiny_folder: Path, tmp_path: Path, expected
):
    async def poison(engine: Engine, job: Job) -> None:
        async for event in engine.events(job.id):
            if event.kind == "progress" and event.values["stage"] == "denoise":
                os.kill(pids(engine, "denoise")[0], signal.SIGKILL)

    async def main():
        async with running(tiny_folder, tmp_path, executor="process") as engine:
            await engine.ready()
            bad = await engine.submit(submission(tiny_folder, num_inference_steps=999))
            good = await engine.submit(submission(tiny_folder, seed=1))
            await poison(engine, bad)
            return engine.job(bad.id), await ended(engine, good)

    bad, good = asyncio.run(main())
    assert (bad.status, bad.deaths, bad.failure.code) == ("failed", 2, "worker_died")
    assert "denoise: killed by SIGKILL" in bad.failure.message
    check([good], tmp_path, expected)


@pytest.mark.full
def test_a_worker_that_hangs_is_given_up_and_publishes_nothing_when_it_goes_on(
    tiny_folder: Path, tmp_path: Path, expected, monkeypatch
):
    monkeypatch.setattr(book, "STEP_LIMIT_S", 1.0)
    monkeypatch.setattr(local._Thread, "kill", lambda self: None)  # one that no kill reaches
    hangs, run, threads = threading.Event(), decode.run, []

    def hang_once(model, state):
        events = run(model, state)
        yield next(events)
        if state.params.seed == 7 and not threads:
            threads.append(threading.current_thread())
            hangs.wait(30)
        yield from events

    monkeypatch.setattr(decode, "run", hang_once)

    async def main():
        async with running(tiny_folder, tmp_path, SPLIT) as engine:
            await engine.ready()
            await ended(engine, await engine.submit(submission(tiny_folder)))
            job = await ended(engine, await engine.submit(submission(tiny_folder, seed=7)))
            written = job.path.stat()
            hangs.set()
            await asyncio.sleep(0.5)
            others = [await ended(engine, await engine.submit(submission(tiny_folder, seed=8)))]
            assert engine.job(job.id) == job
            assert job.path.stat() == written
            return [job, *others]

    job, other = asyncio.run(main())
    assert (job.attempt, job.deaths) == (4, 1)
    assert {job.frames_sha256, other.frames_sha256} == {expected(7), expected(8)}


def test_a_worker_s_states_are_dropped_if_they_are_of_an_older_attempt(
    tiny_folder: Path, tmp_path: Path
):
    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            await engine.ready()
            job = await engine.submit(submission(tiny_folder, num_inference_steps=100))
            await until(engine, job, step=1)
            (record,), (slot,) = engine._records.values(), engine._fleet.slots
            report = local.Report("finished", job.id, record.job.attempt - 1)
            engine._hear(slot, report)
            slot.handle._report(report)
            await asyncio.sleep(0.1)  # what either might have begun is done beside this
            assert record.slot is slot and not record.is_over
            assert slot.task.attempt == record.job.attempt
            assert engine.job(job.id).status == "in_progress"

    asyncio.run(main())


def test_a_worker_that_was_replaced_is_heard_no_more(tiny_folder: Path, tmp_path: Path):
    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            await engine.ready()
            old = engine._fleet.slots[0].handle
            for _ in range(2):
                old._report(local.Report("dead", values={"reason": "test"}))
            job = await ended(engine, await engine.submit(submission(tiny_folder)))
            assert job.status == "completed"
            assert engine.stats()["worker_deaths"] == 1

    asyncio.run(main())


def test_a_job_goes_on_from_its_last_checkpoint(
    tiny_folder: Path, tmp_path: Path, expected, monkeypatch
):
    run, faults = denoise.run, [RuntimeError("the device fell off the bus")]

    def failing(model, state):
        for event in run(model, state):
            yield event
            if isinstance(event, Progress) and event.index == 5 and faults:
                time.sleep(0.5)
                raise faults.pop()

    async def main():
        async with running(tiny_folder, tmp_path, SPLIT, checkpoint_every=3) as engine:
            await engine.ready()
            monkeypatch.setattr(denoise, "run", failing)
            asked = submission(tiny_folder, num_inference_steps=8)
            job = await engine.submit(asked)
            events = [event.values async for event in engine.events(job.id)]
            steps = [values["index"] for values in events if values.get("stage") == "denoise"]
            return steps, engine.job(job.id)

    steps, job = asyncio.run(main())
    assert steps == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8]
    assert (job.deaths, job.frames_sha256) == (1, expected(num_inference_steps=8))
    assert job.stage_seconds["denoise"] > 0.5, "of both attempts"


def test_a_worker_that_crashes_again_and_again_is_started_less_and_less_often(
    tiny_folder: Path, tmp_path: Path
):
    async def main():
        async with running(tiny_folder, tmp_path, [{"devices": ["no-device"]}]) as engine:
            started = time.monotonic()
            with pytest.raises(ValueError, match="does not start"):
                await engine.ready()  # at its third crash: at once, then a second later
            assert time.monotonic() - started >= 1
            assert engine.stats()["worker_deaths"] == 3
        epoch = engine._fleet.slots[0].epoch
        await asyncio.sleep(2.1)  # the next start would have been in two seconds
        assert engine._fleet.slots[0].epoch == epoch

    asyncio.run(main())


@pytest.mark.full
def test_workers_are_not_blamed_for_the_time_in_which_the_engine_stood_still(
    tiny_folder: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(book, "STEP_LIMIT_S", 2.0)

    async def main():
        config = {"executor": "process", "heartbeat_s": 2}
        async with running(tiny_folder, tmp_path, **config) as engine:
            await engine.ready()
            job = await engine.submit(submission(tiny_folder, num_inference_steps=500))
            await until(engine, job, step=2)
            (pid,) = pids(engine, "denoise")
            os.kill(pid, signal.SIGSTOP)  # as when the whole machine sleeps
            time.sleep(3)
            await asyncio.sleep(1)  # the watch is over them again
            os.kill(pid, signal.SIGCONT)
            assert (await engine.cancel(job.id)).deaths == 0
            assert pids(engine, "denoise") == (pid,)

    asyncio.run(main())


@pytest.mark.full
def test_a_worker_that_is_stopped_and_replaced_publishes_nothing_when_it_goes_on(
    tiny_folder: Path, tmp_path: Path, expected, monkeypatch
):
    kill = process._Group.kill

    async def main():
        config = {"executor": "process", "heartbeat_s": 2}
        async with running(tiny_folder, tmp_path, PAIR, **config) as engine:
            await engine.ready()
            job = await engine.submit(submission(tiny_folder, seed=2, **BIG))
            await at(engine, job, "decode")
            old, handle = pids(engine, "decode"), engine._fleet.slots[0].handle
            monkeypatch.setattr(process._Group, "kill", lambda self: None)  # no kill reaches it
            os.kill(old[0], signal.SIGSTOP)
            while pids(engine, "decode") == old:
                await asyncio.sleep(0.05)
            monkeypatch.setattr(process._Group, "kill", kill)
            job = await ended(engine, job)
            written = job.path.stat()
            os.kill(old[0], signal.SIGCONT)
            while not [*(tmp_path / WORK).glob(f"{job.id}-*.mp4")]:  # what it made meanwhile
                await asyncio.sleep(0.05)
            os.kill(old[0], signal.SIGKILL)
            await asyncio.to_thread(handle.wait)
            other = await ended(engine, await engine.submit(submission(tiny_folder, seed=3, **BIG)))
            assert engine.job(job.id) == job and job.path.stat() == written
            assert engine.stats()["worker_deaths"] == 1
            return [job, other]

    check(asyncio.run(main()), tmp_path, expected)


SCRIPT = """
import asyncio, json, sys
from pathlib import Path
from tests.fastvideo_inference.engine.conftest import running, submission, until
async def main(model, folder):
    async with running(model, folder, executor="process") as engine:
        await engine.ready()
        jobs = [await engine.submit(submission(model, seed=1, num_inference_steps=200))]
        jobs += [await engine.submit(submission(model, seed=seed)) for seed in (2, 3)]
        await until(engine, jobs[0], step=3)
        pids = [pid for worker in engine.stats()["workers"] for pid in worker["pids"]]
        print(json.dumps([pids, [job.id for job in jobs]]), flush=True)
        await asyncio.sleep(60)
asyncio.run(main(*map(Path, sys.argv[1:])))
"""


def test_an_engine_that_is_killed_takes_its_workers_along_and_loses_no_job(
    tiny_folder: Path, tmp_path: Path, expected
):
    script = f"import sys; sys.path[:] = {sys.path!r}\n{SCRIPT}"
    command = [sys.executable, "-c", script, str(tiny_folder), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
        workers, ids = json.loads(engine.stdout.readline())
        os.kill(workers[0], signal.SIGSTOP)  # one that cannot hear that its engine is gone
        engine.kill()
    assert all(has_ended(pid) for pid in workers)

    async def main():
        async with running(tiny_folder, tmp_path) as engine:
            return [await ended(engine, engine.job(job_id)) for job_id in ids]

    jobs = asyncio.run(main())
    assert jobs[0].frames_sha256 == expected(1, num_inference_steps=200)
    assert [job.frames_sha256 for job in jobs[1:]] == [expected(2), expected(3)]
    assert len([*tmp_path.glob("*.mp4")]) == 3


def all_pids(engine: Engine) -> list[int]:
    return [os.getpid(), *(pid for w in engine.stats()["workers"] for pid in w["pids"])]


@EXECUTORS
def test_a_full_disk_fails_clips_and_refuses_jobs_without_losing_the_accepted(
    tiny_folder: Path, tmp_path: Path, executor: str
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(engine: Engine, num_bytes: int) -> None:
        for pid in all_pids(engine):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, limits[1]))

    async def main():
        async with running(tiny_folder, tmp_path, executor=executor) as engine:
            await engine.ready()
            job = await engine.submit(submission(tiny_folder, num_inference_steps=20))
            await until(engine, job, step=1)
            limit(engine, 100)
            with pytest.raises(OSError, match="disk"):
                while True:  # as long as the journal's pages have room
                    await engine.submit(submission(tiny_folder))
            await asyncio.sleep(2)
            assert engine.job(job.id).status == "in_progress"
            limit(engine, limits[0])
            job = await ended(engine, job)
            assert (job.status, job.failure.code) == ("failed", "io_error")
            good = await ended(engine, await engine.submit(submission(tiny_folder)))
            assert good.status == "completed"

    try:
        asyncio.run(main())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_worker_that_cannot_start_is_the_reason_why_the_engine_is_not_ready(
    tiny_folder: Path, tmp_path: Path
):
    async def main():
        worker = [{"devices": ["cpu:999"]}]
        async with running(tiny_folder, tmp_path, worker, executor="process") as engine:
            with pytest.raises(ValueError, match="device cpu:999: this machine has"):
                await engine.ready()
            assert not engine.is_ready()

    asyncio.run(main())


@EXECUTORS
def test_many_cancels_at_once_leave_workers_free_and_no_file(
    tiny_folder: Path, tmp_path: Path, executor: str
):
    async def main():
        config = {"class": [{"queue": 200}], "executor": executor}
        async with running(tiny_folder, tmp_path, **config) as engine:
            await engine.ready()
            long = submission(tiny_folder, num_inference_steps=500)
            jobs = [await engine.submit(long) for _ in range(200)]
            await until(engine, jobs[0], step=1)
            ends = await asyncio.gather(*(engine.cancel(job.id) for job in jobs))
            assert {job.status for job in ends} == {"cancelled"}
            last = await ended(engine, await engine.submit(submission(tiny_folder)))
            assert [path.name for path in tmp_path.glob("*.mp4")] == [f"{last.id}.mp4"]
            assert engine.stats()["attempts"] == 3  # the warm-up, the first and the last

    asyncio.run(main())


@pytest.mark.full
def test_under_five_times_the_load_for_a_minute_what_is_accepted_is_made_and_the_rest_refused(
    tiny_folder: Path, tmp_path: Path, expected
):
    async def main():
        config = {"executor": "process", "class": [{"queue": 16}]}
        async with running(tiny_folder, tmp_path, SPLIT, **config) as engine:
            await engine.ready()
            started = time.monotonic()
            jobs = [await engine.submit(submission(tiny_folder, seed=s)) for s in range(16)]
            for job in jobs:
                await ended(engine, job)
            pause_s = (time.monotonic() - started) / len(jobs) / 5
            num_refused, end = 0, time.monotonic() + 60
            while time.monotonic() < end:
                try:
                    jobs.append(await engine.submit(submission(tiny_folder, seed=len(jobs))))
                except QueueFullError:
                    num_refused += 1
                assert engine.stats()["queued"]["default"] <= 16
                await asyncio.sleep(pause_s)
            made = [await ended(engine, job) for job in jobs]
            counts = engine.stats()
            assert counts["completed"] == counts["admitted"] == len(made)
            assert counts["worker_deaths"] == 0 and num_refused > len(made)
            return made

    made = asyncio.run(main())
    check(made[-20:], tmp_path, expected, others=made[:-20])


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_no_job_of_the_bundled_model_ends_a_minute_later_than_undisturbed(
    tmp_path: Path, number: signal.Signals
):
    folder = hub.open_model("fastwan-nano").folder

    def asked(stage: str) -> Submission:
        return submission(folder, prompt=f"a red ball {stage}", num_inference_steps=3)

    async def main():
        async with running(folder, tmp_path, SPLIT, executor="process") as engine:
            await engine.ready()
            for stage in STAGES:
                calm = await ended(engine, await engine.submit(asked(stage)))
                job = await engine.submit(asked(f"{stage} "))  # not in the cache of prompts
                if stage != "encode_text":  # which is over before a signal comes
                    await at(engine, job, stage)
                os.kill(pids(engine, stage)[0], number)
                job = await ended(engine, job)
                assert job.status == "completed"
                calm_s, late_s = (j.finished_at_s - j.accepted_at_s for j in (calm, job))
                assert late_s < calm_s + 60

    asyncio.run(main())


@pytest.mark.full
def test_soak_after_300_clips_workers_and_engine_hold_what_they_held_after_20(
    tiny_folder: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(record, "_CACHE_ENTRIES", 8)  # full at 20, and turned over by 300

    def held(engine: Engine) -> list[tuple[float, int]]:
        found = []
        for pid in all_pids(engine):
            rss = Path(f"/proc/{pid}/statm").read_text().split()[1]
            num_open = len([*Path(f"/proc/{pid}/fd").iterdir()])
            found.append((int(rss) * resource.getpagesize() / 2**20, num_open))
        return found

    async def main():
        async with running(tiny_folder, tmp_path, SPLIT, executor="process") as engine:
            await engine.ready()
            for number in range(1, 301):
                words = f"a red ball {number // 2}"  # each once encoded, once found
                asked = submission(tiny_folder, seed=number, prompt=words)
                await ended(engine, await engine.submit(asked))
                if number in (20, 300):
                    yield held(engine)

    async def collect():
        return [found async for found in main()]

    early, late = asyncio.run(collect())
    for (rss_before, open_before), (rss, num_open) in zip(early, late, strict=True):
        assert rss < rss_before + 20, "MiB"
        assert num_open <= open_before + 2
