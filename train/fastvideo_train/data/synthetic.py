"""Random latents with captions of a world: no encoder needed, for smoke runs and timings only."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import TypedDict

import torch

from fastvideo import rng
from fastvideo.worlds import open_world
from fastvideo_train.data import WHOLE, Part, items


class SyntheticBatch(TypedDict):
    """Standard normal latents (B, C, T, H, W) and captions that have nothing to do with them."""

    latents: torch.Tensor
    frame_T: torch.Tensor
    captions: list[str]
    ids: list[str]


class SyntheticBatches:
    """Batches shaped like those of `LatentBatches`, each a function of (seed, step)."""

    def __init__(
        self,
        world: str,
        *,
        seed: int,
        batch: int,
        channels: int,
        frames: int,
        height: int,
        width: int,
        start_step: int = 0,
        part: Part = WHOLE,
    ) -> None:
        self.seed, self.start_step = seed, start_step
        self.own = items(batch, part)
        self.shape = (batch, channels, frames, height, width)
        # one small frame is enough: only the caption is used
        self._world = open_world(world, height=64, width=64, num_frames=1)

    def batch(self, step: int) -> SyntheticBatch:
        """Return the batch of one step, or this process's part of it."""
        indices = [step * self.shape[0] + i for i in self.own]
        whole = rng.noise(self.shape, seed=self.seed, purpose="data/synthetic", step=step)
        return SyntheticBatch(
            latents=whole[self.own.start : self.own.stop],
            frame_T=torch.arange(self.shape[2]),
            captions=[self._world.clip(self.seed, i).caption for i in indices],
            ids=[f"synthetic/{self.seed}/{i}" for i in indices],
        )

    def prefetch(self, steps: int | None = None) -> Generator[SyntheticBatch, None, None]:
        """Yield the batches of `start_step` and later: `steps` of them, or for ever."""
        first = self.start_step
        for step in itertools.count(first) if steps is None else range(first, first + steps):
            yield self.batch(step)
