"""A model held against a world's truth, clip by clip; evaluation and training's validation call it.

reconstructed(vae, world, clip)           how much of a true clip its VAE keeps
rendered(model, world, clips, requests)   how much of its prompt a made clip shows
Scorer(folder)(frames)                     features to compare clips by, and labels
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastvideo.metrics.faithfulness import Row, faithfulness
from fastvideo.metrics.flicker import flicker
from fastvideo.metrics.psnr import psnr
from fastvideo.metrics.ssim import ssim
from fastvideo.model import Model
from fastvideo.models import classifier
from fastvideo.sampling import SamplingParams
from fastvideo.stages import make
from fastvideo.stages.decode import to_uint8
from fastvideo.worlds import Clip, World

Frames = npt.NDArray[np.uint8]
Truth = dict[str, str]


@dataclass(frozen=True)
class Reconstructed:
    """A true clip after its VAE: `seen` was read out of the true frames, `parse` out of these."""

    truth: Truth
    seen: Truth
    parse: Truth
    psnr: float
    ssim: float
    frames: Frames


@dataclass(frozen=True)
class Rendered:
    """A clip made from a prompt, and what the parser read in it."""

    prompt: str
    truth: Truth
    parse: Truth
    flicker: float
    frames: Frames


class Scorer:
    """A world's classifier, loaded from its folder.

    It looks at one clip at a time, in float32 on the CPU, and its features are rounded to six
    decimals: the same clip has the same features wherever it was made, and after JSON.
    """

    def __init__(self, folder: str | Path) -> None:
        self.net: Any = classifier.read(folder)

    @torch.no_grad()
    def __call__(self, frames_THWC: Frames) -> tuple[list[float], Truth]:
        """Return features (F) and the likeliest value of each attribute."""
        pixels_CTHW = torch.from_numpy(frames_THWC).permute(3, 0, 1, 2)
        scored = self.net(pixels_CTHW[None])
        (labels,) = self.net.labels(scored)
        return [round(x, 6) for x in scored.features_BF[0].tolist()], labels


@torch.no_grad()
def reconstructed(vae: Any, world: World, clip: Clip, *, decoder: Any = None) -> Reconstructed:
    """Encode and decode one clip, by a small `decoder` if there is one, and compare with it."""
    true = clip.frames_THWC
    like = next(vae.parameters())
    pixels_THWC = torch.from_numpy(true).to(like.device, torch.float32) / 127.5 - 1
    z = vae.encode(pixels_THWC.permute(3, 0, 1, 2)[None].to(like.dtype))
    parts = vae.stream(z) if decoder is None else decoder.stream(vae.normalize(z))
    frames = np.concatenate([to_uint8(part[0]) for part in parts])
    return Reconstructed(
        truth=clip.truth,
        seen=world.parse(true),
        parse=world.parse(frames),
        psnr=psnr(frames, true),
        ssim=ssim(frames, true),
        frames=frames,
    )


def rendered(
    model: Model, world: World, clips: Sequence[Clip], requests: Sequence[SamplingParams]
) -> list[Rendered]:
    """Make a clip for each request as one batch, and read them against the true `clips`."""
    made = make(model, requests).frames
    assert made is not None, "the row ends in frames"
    return [
        Rendered(
            prompt=request.prompt,
            truth=clip.truth,
            parse=world.parse(frames),
            flicker=clip_flicker(frames),
            frames=frames,
        )
        for clip, request, frames in zip(clips, requests, made, strict=True)
    ]


def clip_flicker(frames_THWC: Frames) -> float:
    """Return the flicker of a clip; NaN for one or two frames, which have none."""
    return flicker(frames_THWC) if len(frames_THWC) > 2 else math.nan


def rows(
    measured: Sequence[Reconstructed | Rendered], legal: Mapping[str, Sequence[str]]
) -> list[Row]:
    """Return how often each attribute was right."""
    return faithfulness([m.truth for m in measured], [m.parse for m in measured], legal=legal)
