"""Latents to frames, clip by clip, in chunks as they are decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastvideo.errors import NotFiniteError
from fastvideo.parallel import decode as bands
from fastvideo.stages import Chunk, Done, Event, Progress, State

if TYPE_CHECKING:
    from fastvideo.model import Model

NAME = "decode"
NEEDS = ("requests", "latents")
GIVES = ("frames",)
PARTS = ("vae",)

Frames = npt.NDArray[np.uint8]


def run(model: Model, state: State) -> Iterator[Event]:
    """Decode in streaming order; `Done` holds all frames together."""
    assert state.latents is not None, "denoise runs before decode"
    total, done = state.params.num_frames * len(state.latents), 0
    clips = []
    yield Progress(NAME, 0, total)
    for clip, z_BCTHW in enumerate(state.latents[:, None]):
        chunks, start = [], 0
        for frames in decode(model, z_BCTHW):
            chunks.append(frames)
            yield Chunk(NAME, start, frames, clip)
            start += len(frames)
            done += len(frames)
            yield Progress(NAME, done, total)
        clips.append(np.concatenate(chunks))
    yield Done(NAME, dataclasses.replace(state, frames=np.stack(clips)))


@torch.no_grad()
def decode(model: Model, latents: Tensor, *, chunk: int | None = None) -> Iterator[Frames]:
    """Yield frames of one clip, uint8 (t, H, W, 3), as its normalised latents are decoded.

    `chunk` latent frames at a time: 1 shows the first frame soonest, None is fastest in all. A
    small decoder takes the latents normalised, the VAE's own takes them raw. Processes that work on
    one clip decode a band of rows each, and all get all frames; a small decoder runs on each.
    """
    assert len(latents) == 1, "frames of several clips cannot share one stream"
    if model.decoder is None:
        z = model.vae.denormalize(latents.float())
        parts = bands.stream(model.vae, z, model.meshes.axis("sample"), chunk=chunk)
    else:
        parts = model.decoder.stream(latents.float(), chunk)
    for pixels_BCTHW in parts:
        yield to_uint8(pixels_BCTHW[0])


def to_uint8(pixels_CTHW: Tensor) -> Frames:
    """Turn pixels in [-1, 1] into frames (T, H, W, C) of bytes, rounding to the nearest.

    Raises `NotFiniteError` for pixels that are not finite, which would be black.
    """
    if not bool(pixels_CTHW.isfinite().all()):
        raise NotFiniteError(
            f"decoded pixels are not finite in {pixels_CTHW.dtype}; try dtype float32"
        )
    levels = (pixels_CTHW.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
