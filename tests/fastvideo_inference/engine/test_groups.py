"""A worker of several ranks: one unit, whose frames are those of torchrun with the same degrees."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from fastvideo_inference.engine.executors import process
from fastvideo_inference.engine.messages import Setup

from fastvideo import VideoPipeline
from tests.fastvideo_inference.engine.conftest import ended, running, submission, until

REST = ("guidance=2", "ring=2")


def under_torchrun(rank: int, size: int, folder: Path, parallel: str) -> str:
    pipe = VideoPipeline.from_pretrained(folder, device="cpu", parallel=parallel)
    return pipe("a red ball", seed=3).frames_sha256


@pytest.mark.parametrize(
    "parallel", ["ulysses=2", *(pytest.param(p, marks=pytest.mark.full) for p in REST)]
)
def test_a_group_makes_the_frames_of_torchrun_with_its_degrees(
    ranks, tiny_folder: Path, tmp_path: Path, parallel: str
):
    worker = [{"devices": ["cpu:0", "cpu:1"], "parallel": parallel}]

    async def main():
        async with running(tiny_folder, tmp_path, worker, executor="process") as engine:
            await engine.ready()
            long = await engine.submit(submission(tiny_folder, num_inference_steps=500))
            await until(engine, long, step=2)
            assert (await engine.cancel(long.id)).status == "cancelled"  # at one step on all ranks
            return await ended(engine, await engine.submit(submission(tiny_folder, seed=3)))

    job = asyncio.run(main())
    assert job.failure is None and job.deaths == 0
    assert job.frames_sha256 == ranks(2, under_torchrun, tiny_folder, parallel)[0]


def test_a_group_of_which_a_rank_cannot_be_started_leaves_none(monkeypatch):
    start, started = process._start, []

    def limited(setup: Setup) -> Any:
        if started:
            raise BlockingIOError("no process to be had")
        started.append(start(setup))
        return started[0]

    async def main():
        setups = [Setup("cpu", None, 10.0, rank=rank, size=2) for rank in range(2)]
        with pytest.raises(BlockingIOError):
            process.Executor().start(setups, print)

    monkeypatch.setattr(process, "_start", limited)
    asyncio.run(main())
    assert started[0][0].returncode == -signal.SIGKILL
