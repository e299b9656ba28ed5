"""An engine over the tiny model, and what its clips must be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastvideo_inference.engine.config import ServeConfig
from fastvideo_inference.engine.engine import Engine
from fastvideo_inference.engine.job import Job, Submission

from fastvideo import VideoPipeline, hub, preview
from fastvideo.config import parse
from fastvideo.preview import PreviewMap
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest

MONOLITH = [{}]
PAIR = [{"stages": ["encode_text", "prepare_latents", "decode"]}, {"stages": ["denoise"]}]
SPLIT = [
    {"stages": ["encode_text", "prepare_latents"]},
    {"stages": ["denoise"]},
    {"stages": ["decode"]},
]


@asynccontextmanager
async def running(
    model: Path, folder: Path, worker: list[dict[str, Any]] = MONOLITH, **config: Any
) -> AsyncIterator[Engine]:
    """Start an engine whose workers are on one pinned core each unless said otherwise."""
    own = {"model": str(model), "devices": ["cpu"]}
    workers = [{**own, **one} for one in worker]
    tree = {"executor": "local", "folder": folder, "worker": workers, **config}
    engine = Engine(parse(ServeConfig, tree, source="test"))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def submission(model: Path, *, beside: Any = None, **fields: Any) -> Submission:
    """A request of fields of `GenerateRequest`, and `beside` it those of `Submission`."""
    request = GenerateRequest(**{"prompt": "a red ball", "seed": 0, **fields})
    return Submission(str(model), resolve(request, hub.open_model(model).spec), **(beside or {}))


async def ended(engine: Engine, job: Job) -> Job:
    async for _ in engine.events(job.id):
        pass
    found = engine.job(job.id)
    assert found is not None
    return found


async def until(engine: Engine, job: Job, *, step: int) -> None:
    """Wait until a job's denoising is at a step."""
    async for event in engine.events(job.id):
        values = event.values
        if event.kind == "progress" and values["stage"] == "denoise" and values["index"] >= step:
            return
    raise AssertionError(f"{job.id} ended before step {step}")


async def at(engine: Engine, job: Job, stage: str) -> None:
    """Wait until a worker says that it has begun a stage of a job."""
    async for event in engine.events(job.id):
        if event.kind == "progress" and event.values["stage"] == stage:
            return
    raise AssertionError(f"{job.id} ended before {stage}")


async def settled(engine: Engine) -> None:
    """Wait until workers have done what they may, and nothing moves."""
    before = None
    while before != (before := engine.stats()["attempts"]) or any(
        worker["state"] == "starting" for worker in engine.stats()["workers"]
    ):
        await asyncio.sleep(1)


@pytest.fixture
def preview_folder(tiny_copy: Path) -> Path:
    """The tiny model with a map for previews."""
    found = PreviewMap(weights=((0.1, 0.2, 0.3),) * 4, bias=(0.0, 0.0, 0.0))
    preview.write(found, tiny_copy)
    return tiny_copy


@pytest.fixture(scope="session")
def expected(tiny_folder: Path) -> Callable[..., str]:
    """The digest of a clip's frames by the pipeline itself."""
    pipe = VideoPipeline.from_pretrained(tiny_folder, device="cpu")

    def digest(seed: int = 0, prompt: str = "a red ball", **fields: Any) -> str:
        return str(pipe(prompt, seed=seed, **fields).frames_sha256)

    return digest
