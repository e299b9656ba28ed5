"""A worker of several ranks: one unit, whose frames are those of torchrun with the same degrees."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

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
