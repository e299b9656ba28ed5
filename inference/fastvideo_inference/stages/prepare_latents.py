"""Seed to noise, or the caller's own noise, checked against the request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from fastvideo import render
from fastvideo_inference.events import Done, Event, Progress

if TYPE_CHECKING:
    from fastvideo.model import Model
    from fastvideo_inference.state import State

NAME = "prepare_latents"
NEEDS = ("plan",)
GIVES = ("noise",)


def run(model: Model, state: State) -> Iterator[Event]:
    """Draw the noise on the CPU, so that every device starts from the same values."""
    yield Progress(NAME, 0, 1)
    plan = state.plan
    drawn = render.initial_latents(
        model, num_frames=plan.num_frames, height=plan.height, width=plan.width, seed=plan.seed
    )
    noise = drawn if state.noise is None else _checked(state.noise, drawn)
    yield Progress(NAME, 1, 1)
    yield Done(NAME, dataclasses.replace(state, noise=noise))


def _checked(given: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    if given.shape != drawn.shape:
        raise ValueError(
            f"latents of shape {tuple(given.shape)} do not fit this request;"
            f" it needs {tuple(drawn.shape)} (B C T H W)"
        )
    if not torch.isfinite(given).all():
        raise ValueError("latents hold values that are not finite numbers")
    return given.to(drawn)
