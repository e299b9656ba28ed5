"""Seeds to noise, or the caller's own noise, checked against the request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvideo import rng
from fastvideo.stages import Done, Event, Progress, State

if TYPE_CHECKING:
    from fastvideo.model import Model
    from fastvideo.sampling import SamplingParams

NAME = "prepare_latents"
NEEDS = ("requests",)
GIVES = ("noise",)
PARTS: tuple[str, ...] = ()


def run(model: Model, state: State) -> Iterator[Event]:
    """Draw the noise of each clip from its own seed."""
    yield Progress(NAME, 0, 1)
    drawn = draw(model, state.params, seeds=state.seeds)
    noise = drawn if state.noise is None else _checked(state.noise, drawn)
    yield Progress(NAME, 1, 1)
    yield Done(NAME, dataclasses.replace(state, noise=noise))


def draw(model: Model, params: SamplingParams, *, seeds: Sequence[int]) -> Tensor:
    """Draw the starting noise, float32 (B, C, T, H, W), on the CPU so that every device agrees."""
    size = {"frames": params.num_frames, "height": params.height, "width": params.width}
    grid = model.spec.latent_shape(**size)
    shape = (model.vae.config.z_dim, grid.frames, grid.height, grid.width)
    return rng.clip_noise(shape, seeds=seeds, purpose="latents").to(model.device)


def _checked(given: Tensor, drawn: Tensor) -> Tensor:
    if given.shape != drawn.shape:
        raise ValueError(
            f"latents of shape {tuple(given.shape)} do not fit this request;"
            f" it needs {tuple(drawn.shape)} (B C T H W)"
        )
    if not torch.isfinite(given).all():
        raise ValueError("latents hold values that are not finite numbers")
    return given.to(drawn)
