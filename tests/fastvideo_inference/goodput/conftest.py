"""A profile by hand, of the bundled model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.goodput.profile import Cell, Device, Profile

from fastvideo import hub
from fastvideo.resolve import resolve
from fastvideo.sampling import GenerateRequest, SamplingParams
from fastvideo.spec import Spec

Make = Callable[..., Profile]
SECONDS = {"encode_text": 0.1, "prepare_latents": 0.01, "denoise": 0.2, "decode": 0.5, "save": 0.09}


@pytest.fixture(scope="session")
def spec() -> Spec:
    return hub.open_spec("fastwan-nano")[0]


@pytest.fixture(scope="session")
def params(spec: Spec) -> SamplingParams:
    return resolve(GenerateRequest(prompt="a ball", seed=1), spec)


@pytest.fixture
def make_profile(spec: Spec, params: SamplingParams) -> Make:
    """Seconds of stages of the default clip, of a step for denoise; `ulysses` of two ranks."""

    def make(
        *, ulysses: dict[str, float] | None = None, spread: float = 1.0, **changes: object
    ) -> Profile:
        cells = []
        for parallel, seconds in (("", SECONDS), ("ulysses=2", ulysses or {})):
            for stage, median in seconds.items():
                cell = Cell(
                    stage=stage,
                    work=profiles.work_of(stage, params, spec),
                    attention=params.attention if stage == "denoise" else "",
                    parallel=parallel,
                    seconds=(median / spread, median, median, median * spread),
                )
                cells.append(cell)
        cells += [
            Cell(stage=f"load.{part}", work=1.0, seconds=(s,))
            for part, s in (("text", 0.3), ("dit", 0.5), ("vae", 0.2))
        ]
        device = Device(name="cpu", kind="cpu", threads=1, torch="2.13.0", fastvideo="0")
        given = {
            "model": "fastwan-nano",
            "fingerprint": "f" * 64,
            "spec": spec,
            "device": device,
            "cells": tuple(cells),
            "gib": {"text": 1.0, "dit": 2.0, "vae": 1.0},
            **changes,
        }
        return Profile.model_validate(given)

    return make
