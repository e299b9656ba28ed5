"""Prompt to conditioning; the negative prompt too, if guidance will look at it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastvideo import render
from fastvideo_inference.events import Done, Event, Progress

if TYPE_CHECKING:
    from fastvideo.model import Model
    from fastvideo_inference.state import State

NAME = "encode_text"
NEEDS = ("plan",)
GIVES = ("cond", "uncond")


def run(model: Model, state: State) -> Iterator[Event]:
    """Encode each prompt on its own, so that neither depends on the length of the other."""
    plan = state.plan
    guided = plan.guidance_scale != 1
    total = 1 + guided
    yield Progress(NAME, 0, total)
    cond = render.encode_text(model, [plan.prompt])
    uncond = None
    if guided:
        yield Progress(NAME, 1, total)
        uncond = render.encode_text(model, [plan.negative_prompt])
    yield Progress(NAME, total, total)
    yield Done(NAME, dataclasses.replace(state, cond=cond, uncond=uncond))
