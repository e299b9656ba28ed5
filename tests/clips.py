"""Prompts made into clips by a model's own row of stages, for tests of other things."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvideo.model import Model
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest, SamplingParams
from fastvideo.stages import make


def params(
    model: Model, prompt: str = "a red ball", *, seed: int = 0, **fields: Any
) -> SamplingParams:
    """Resolve a request; what is not given is the model's default."""
    return resolve(GenerateRequest(prompt=prompt, seed=seed, **fields), model.spec)


def frames(
    model: Model, prompts: Sequence[str], *, seed: int = 0, **fields: Any
) -> npt.NDArray[np.uint8]:
    """Make the prompts as one batch, B T H W 3; clip b starts from seed + b."""
    requests = [params(model, text, seed=seed + b, **fields) for b, text in enumerate(prompts)]
    made = make(model, requests).frames
    assert made is not None
    return made
