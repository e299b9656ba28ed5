"""Which workers can run which stages of which jobs; and the tiny clip that all of them can make."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fastvideo.parallel.degrees import parse
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest, SamplingParams
from fastvideo.spec import Spec
from fastvideo_inference import sharing
from fastvideo_inference.engine.config import WorkerConfig
from fastvideo_inference.engine.job import Submission

_PROMPT = "warm-up"
_MULTIPLES = (1, 2, 4, 8, 16)  # of the smallest side that a model may have


def unfit(pool: WorkerConfig, stage: str, submission: Submission, spec: Spec) -> str | None:
    """Return why a pool's workers cannot run a stage of a clip: "" if they are for others."""
    if stage not in pool.stages or pool.model not in ("", submission.model):
        return ""
    if len(pool.devices) == 1 or stage not in ("denoise", "decode"):
        return None
    try:
        has_small = bool(submission.decoder) or stage != "decode"
        sharing.check(parse(pool.parallel), submission.params, spec, has_small_decoder=has_small)
    except ValueError as error:
        return str(error)
    return None


def num_workers(pools: Sequence[WorkerConfig], model: str, stages: Sequence[str]) -> list[int]:
    """Return how many workers run each stage of a model."""
    own = [pool for pool in pools if pool.model in ("", model)]
    return [sum(pool.count for pool in own if stage in pool.stages) for stage in stages]


def check(pools: Sequence[WorkerConfig], submission: Submission, spec: Spec) -> None:
    """Raise `ValueError` if a stage has no worker that could run it."""
    for stage in spec.stages:
        reasons = [unfit(pool, stage, submission, spec) for pool in pools]
        if None not in reasons:
            own = next(filter(None, reasons), None)
            raise ValueError(own or f"no worker has stage {stage} of model {submission.model}")


def run_on(pool: WorkerConfig, submission: Submission, spec: Spec, index: int) -> tuple[str, ...]:
    """Return the stages from `index` on that a worker can run without another between them."""
    left = spec.stages[index:]
    return tuple(itertools.takewhile(lambda s: unfit(pool, s, submission, spec) is None, left))


def tiny(model: str, spec: Spec, pools: Sequence[WorkerConfig], *, seed: int) -> SamplingParams:
    """Return the smallest clip that the model may make and every stage has workers for."""
    side_h, side_w = spec.compression.pixel_multiple
    steps = None if spec.scheduler.name == "few_step" else 1
    for multiple in _MULTIPLES:
        request = GenerateRequest(
            prompt=_PROMPT,
            num_frames=1 + spec.compression.temporal,
            height=side_h * multiple,
            width=side_w * multiple,
            num_inference_steps=steps,
            seed=seed,
        )
        try:
            params = resolve(request, spec)
            check(pools, Submission(model, params), spec)
        except ValueError:
            continue
        return params
    return resolve(GenerateRequest(prompt=_PROMPT, seed=seed), spec)
