"""Whom the engine lets in: its forecast beside the simulator's events, and its promises."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastvideo_inference.engine.forecast import Demand, Lane, ends
from fastvideo_inference.engine.job import LateError, Submission
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput.profile import Cell, Device, Estimate, Profile, Setting
from fastvideo_inference.goodput.simulate import Costs, Pool, simulate

from fastvideo import hub
from fastvideo.sampling import SamplingParams
from tests.fastvideo_inference.engine.conftest import ended, running, submission, until

PROMISED = [{"name": "clip", "deadline_s": 10.0}, {"name": "batch"}]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("split", "counts"), [(["abc"], [2]), (["a", "bc"], [1, 2])])
def test_a_forecast_is_what_the_simulated_workers_do(
    seed: int, split: list[str], counts: list[int]
):
    pytest.importorskip("simpy")
    draw = random.Random(seed)
    seconds = {stage: draw.uniform(0.5, 3.0) for stage in "abc"}
    costs = Costs({stage: Estimate(s, s) for stage, s in seconds.items()})
    pools = [Pool(tuple(own), n, costs) for own, n in zip(split, counts, strict=True)]
    each = {i: {s: seconds[s] for s in pool.stages} for i, pool in enumerate(pools)}
    lanes = [Lane(i, pool.stages) for i, pool in enumerate(pools) for _ in range(pool.count)]
    done = simulate(pools, [0.0] * 8, in_flight=8)
    forecast = ends([Demand("abc", each)] * 8, lanes)
    assert sorted(forecast) == pytest.approx([one.end_s for one in done])


def profile_of(
    model: Path, path: Path, *, params: SamplingParams | None = None, **seconds: float
) -> Path:
    """Write a profile of the tiny model whose stages take these seconds for a clip."""
    found = hub.open_model(model)
    params = params or submission(model, guidance_scale=1).params
    cells = [
        Cell(
            stage=stage,
            work=profiles.work_of(stage, params, found.spec),
            attention=params.attention if stage == "denoise" else "",
            seconds=(seconds.get(stage, 0.001),),
        )
        for stage in (*found.spec.stages, "save")
    ]
    device = Device(name="", kind="cpu", threads=1, torch="", fastvideo="")
    facts = {"fingerprint": "", "spec": found.spec, "device": device}
    profiles.write(Profile(model=str(model), cells=tuple(cells), **facts), path)
    return path


@pytest.fixture
def asked(tiny_folder: Path) -> Any:
    def make(slo_class: str = "", *, steps: int = 1, **beside: Any) -> Submission:
        own = {"slo_class": slo_class, **beside}
        return submission(tiny_folder, beside=own, num_inference_steps=steps, guidance_scale=1)

    return make


def config(model: Path, tmp_path: Path, **seconds: float) -> dict[str, Any]:
    path = profile_of(model, tmp_path / "tiny.json", **seconds)
    return {"class": PROMISED, "profile": [path]}


def test_a_promise_that_could_not_be_kept_is_refused_with_the_time_at_which_it_could(
    tiny_folder: Path, tmp_path: Path, asked
):
    async def main() -> list[float]:
        own = config(tiny_folder, tmp_path, denoise=4.0)
        async with running(tiny_folder, tmp_path / "served", **own) as engine:
            await engine.ready()
            engine._pump = lambda: None  # nothing begins
            first, second = [await engine.submit(asked("clip")) for _ in range(2)]
            assert (first.predicted_s, second.predicted_s) == pytest.approx((4, 8), abs=0.1)
            with pytest.raises(LateError) as late:
                await engine.submit(asked("clip"))
            await engine.submit(asked("batch"))
            return [late.value.retry_after_s]

    (retry_s,) = asyncio.run(main())
    assert 1.5 < retry_s <= 2.1  # 12 s of work against 10


def test_what_idle_workers_could_not_do_in_time_is_refused_for_good(
    tiny_folder: Path, tmp_path: Path, asked
):
    async def main() -> None:
        own = config(tiny_folder, tmp_path, decode=11.0)
        async with running(tiny_folder, tmp_path / "served", **own) as engine:
            with pytest.raises(ValueError, match=r"promises 10 s.*11\.0 s on idle") as never:
                await engine.submit(asked("clip"))
            assert not isinstance(never.value, LateError)
            assert (await ended(engine, await engine.submit(asked("batch")))).failure is None

    asyncio.run(main())


@pytest.mark.parametrize("given", [True, None, False])
@pytest.mark.parametrize("adapts", [True, False])
def test_a_smaller_setting_is_taken_where_the_request_or_its_class_allows_it(
    tiny_folder: Path, tmp_path: Path, asked, given: bool | None, adapts: bool
):
    small = asked(steps=2).params.model_copy(update={"seed": 0})
    settings = tuple(Setting(small.model_copy(update={"num_inference_steps": n})) for n in (5, 2))

    async def main() -> Any:
        own = config(tiny_folder, tmp_path, denoise=3.0)
        own["class"] = [{**PROMISED[0], "allow_smaller": adapts}]
        async with running(tiny_folder, tmp_path / "served", **own) as engine:
            long = asked(steps=9, smaller=settings, allow_smaller=given)
            return await ended(engine, await engine.submit(long))

    if given is False or (given is None and not adapts):
        with pytest.raises(ValueError, match="promises 10 s"):
            asyncio.run(main())
        return
    job = asyncio.run(main())
    assert job.submission.params.num_inference_steps == 2
    assert job.recipe["request"]["num_inference_steps"] == 2
    assert any("2 steps" in line and "to be in time" in line for line in job.notices)


def test_a_setting_that_could_be_in_time_later_makes_a_refusal_for_now(
    tiny_folder: Path, tmp_path: Path, asked
):
    small = asked().params
    smaller = tuple(Setting(small.model_copy(update={"num_inference_steps": n})) for n in (2, 8))

    async def main() -> None:
        own = config(tiny_folder, tmp_path, denoise=3.0)
        async with running(tiny_folder, tmp_path / "served", **own) as engine:
            await engine.ready()
            engine._pump = lambda: None  # nothing begins
            await engine.submit(asked("clip", steps=2))
            with pytest.raises(LateError):
                await engine.submit(asked("clip", steps=9, smaller=smaller, allow_smaller=True))

    asyncio.run(main())


def test_nothing_is_promised_of_what_was_not_measured(tiny_folder: Path, tmp_path: Path, asked):
    other = replace(asked("clip"), params=asked().params.model_copy(update={"attention": "sta"}))

    async def main() -> None:
        own = config(tiny_folder, tmp_path)
        async with running(tiny_folder, tmp_path / "served", **own) as engine:
            with pytest.raises(ValueError, match=r"class clip promises nothing of .*, sta"):
                await engine.submit(other)

    asyncio.run(main())


def test_forecasts_count_their_past_errors_and_the_spread_of_seconds(
    tiny_folder: Path, tmp_path: Path, asked
):
    async def main() -> None:
        own = config(tiny_folder, tmp_path, decode=4.5)
        async with running(tiny_folder, tmp_path / "served", **own) as engine:
            await engine.ready()
            engine._pump = lambda: None  # nothing begins
            first = await engine.submit(asked("clip"))
            admission, record = engine._admission, engine._records[first.id]
            admission._errors_s.extend([2.0] * 10)  # the last ones ended so much later
            with pytest.raises(LateError):
                await engine.submit(asked("clip"))
            admission._errors_s.clear()
            await engine.submit(asked("clip"))
            profile = admission._profiles[str(tiny_folder)]
            cells = []
            for cell in profile.cells:
                usual, late = cell.seconds * 7, tuple(3 * s for s in cell.seconds) * 3
                cells.append(cell.model_copy(update={"seconds": (*usual, *late)}))
            wide = Profile(**{**dict(profile), "cells": cells})
            admission._profiles[str(tiny_folder)] = wide
            assert admission._spread_s(record) == pytest.approx(9.0, rel=0.01)

    asyncio.run(main())


def test_what_is_done_of_a_stage_does_not_wait_for_again(tiny_folder: Path, tmp_path: Path, asked):
    async def main() -> None:
        own = config(tiny_folder, tmp_path, denoise=4.0)
        async with running(tiny_folder, tmp_path / "served", **own) as engine:
            await engine.ready()
            engine._pump = lambda: None  # nothing begins
            job = await engine.submit(asked("clip"))
            record = engine._records[job.id]
            record.index = record.row.index("denoise")
            record.add_seconds("denoise", 3.0)
            (left,) = engine._admission._seconds(record).values()
            assert left["denoise"] == pytest.approx(1.0, abs=0.1)

    asyncio.run(main())


def test_an_unpromised_job_gives_its_worker_back_in_a_forecast(
    tiny_folder: Path, tmp_path: Path, asked
):
    async def main() -> None:
        own = config(tiny_folder, tmp_path, denoise=3.0)
        async with running(tiny_folder, tmp_path / "served", **own) as engine:
            await engine.ready()
            batch = await engine.submit(asked("batch", steps=900))
            await until(engine, batch, step=1)
            await engine.submit(asked("clip"))  # which would wait for 45 minutes

    asyncio.run(main())


def test_a_new_promise_makes_no_job_late_that_was_let_in_before(
    tiny_folder: Path, tmp_path: Path, asked
):
    classes = [{"name": "slow", "deadline_s": 11.0}, {"name": "fast", "deadline_s": 6.0}]

    async def main() -> None:
        own = config(tiny_folder, tmp_path, decode=5.0) | {"class": classes}
        async with running(tiny_folder, tmp_path / "served", **own) as engine:
            engine._pump = lambda: None  # nothing begins
            for _ in range(2):
                await engine.submit(asked("slow"))
            with pytest.raises(LateError):  # in time itself, before both
                await engine.submit(asked("fast"))

    asyncio.run(main())


def test_without_a_profile_and_before_any_clip_all_are_let_in(
    tiny_folder: Path, tmp_path: Path, asked
):
    async def main() -> None:
        classes = [{"name": "clip", "deadline_s": 0.001}]
        async with running(tiny_folder, tmp_path, **{"class": classes}) as engine:
            await ended(engine, await engine.submit(asked("clip")))
            with pytest.raises(ValueError, match="on idle workers"):
                await engine.submit(asked("clip"))

    asyncio.run(main())


def test_a_profile_learns_from_what_clips_take(tiny_folder: Path, tmp_path: Path, asked):
    async def main() -> float:
        own = config(tiny_folder, tmp_path, decode=5.0)
        async with running(tiny_folder, tmp_path / "served", **own) as engine:
            for _ in range(4):
                await ended(engine, await engine.submit(asked("batch")))
            profile = engine._admission._profiles[str(tiny_folder)]
            return profile.stage_s("decode", asked().params).median

    learnt_s = asyncio.run(main())
    assert learnt_s == pytest.approx(5.0 * (0.7**4 + 0.25 * (1 - 0.7**4)), rel=0.1)
