"""Noise to latents: one event a step, each with the state from which the stage could go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fastvideo import hub, render
from fastvideo.lora import Use
from fastvideo_inference.events import Done, Event, Progress

if TYPE_CHECKING:
    from fastvideo.model import Model
    from fastvideo_inference.request import LoraUse
    from fastvideo_inference.state import State

NAME = "denoise"
NEEDS = ("plan", "cond", "uncond", "noise")
GIVES = ("latents",)


def run(model: Model, state: State) -> Iterator[Event]:
    """Run the steps that are left: all of them, or those after `state.step` of a stored state."""
    plan = state.plan
    start = state.noise if state.latents is None else state.latents
    assert start is not None, "prepare_latents runs before denoise"
    yield Progress(NAME, state.step, plan.num_inference_steps)
    if state.step < plan.num_inference_steps:
        steps = render.denoise(
            model,
            state.cond,
            latents=start,
            num_steps=plan.num_inference_steps,
            guidance_scale=plan.guidance_scale,
            uncond=state.uncond,
            **plan.to_attend(),
            seed=plan.seed,
            start=state.step,
            state=state.solver,
        )
        uses = uses_of(plan.lora)
        while True:
            # Where no pipeline holds them, other clips may bring theirs between two steps.
            model.loras.use(model.dit, uses)
            step = next(steps, None)
            if step is None:
                break
            done = step.index + 1
            state = dataclasses.replace(state, latents=step.x, step=done, solver=step.state)
            yield Progress(NAME, done, step.total, state)
    yield Done(NAME, dataclasses.replace(state, solver=None))


def uses_of(loras: Iterable[LoraUse]) -> list[Use]:
    """Find the files of a plan's LoRAs, in the form that the model's `loras` takes."""
    return [Use(hub.find_lora(one.path), one.strength, one.hash) for one in loras]
