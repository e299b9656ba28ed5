"""Latents to frames, handed on chunk by chunk as they are decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fastvideo import render
from fastvideo_inference.events import Chunk, Done, Event, Progress

if TYPE_CHECKING:
    from fastvideo.model import Model
    from fastvideo_inference.state import State

NAME = "decode"
NEEDS = ("plan", "latents")
GIVES = ("frames",)


def run(model: Model, state: State) -> Iterator[Event]:
    """Decode in streaming order; `Done` holds all frames together."""
    assert state.latents is not None, "denoise runs before decode"
    total, count = state.plan.num_frames, 0
    chunks = []
    yield Progress(NAME, 0, total)
    for frames in render.decode(model, state.latents):
        chunks.append(frames)
        yield Chunk(NAME, count, frames)
        count += len(frames)
        yield Progress(NAME, count, total)
    yield Done(NAME, dataclasses.replace(state, frames=np.concatenate(chunks)))
