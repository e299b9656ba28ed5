"""Batches of captioned clips rendered from a world, each a pure function of (seed, step).

clips = ClipBatches("shapes", seed=0, batch=8, num_frames=17, height=128, width=128, crop=(96, 96))
for batch in clips.prefetch(1000): ...   # batch["pixels"] uint8 (B, 3, T, H, W)

torch is imported by `batch` alone, so that worker processes start in the time that NumPy takes.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from fastvideo import rng
from fastvideo.worlds import Clip, World, open_world
from fastvideo_train.data import WHOLE, Part, items
from fastvideo_train.data._workers import in_order

if TYPE_CHECKING:
    import torch

Crop = tuple[int, int]
Array = np.ndarray[Any, np.dtype[np.uint8]]


class ClipBatch(TypedDict):
    """One batch: pixels uint8 (B, 3, T, H, W), contiguous; one caption, id and truth per clip."""

    pixels: torch.Tensor
    captions: list[str]
    ids: list[str]
    truths: list[dict[str, str]]


@dataclass(frozen=True)
class _Rendered:
    pixels: Array
    captions: list[str]
    ids: list[str]
    truths: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class _Renderer:
    """Everything a worker process needs to render the batch of any step."""

    world: str
    seed: int
    batch: int
    num_frames: int
    height: int
    width: int
    fps: int
    crop: Crop
    split: str
    render_frames: int
    crops_per_clip: int
    part: Part

    @cached_property
    def _opened(self) -> World:
        return open_world(
            self.world,
            height=self.height,
            width=self.width,
            num_frames=self.render_frames,
            fps=self.fps,
        )

    def __call__(self, step: int) -> _Rendered:
        h, w = self.crop
        own = items(self.batch, self.part)
        pixels = np.empty((len(own), 3, self.num_frames, h, w), np.uint8)
        captions, ids, truths = [], [], []
        clip: Clip | None = None
        for place, item in enumerate(own):
            sample = step * self.batch + item
            index, crop = divmod(sample, self.crops_per_clip)
            if clip is None or crop == 0:
                clip = self._opened.clip(self.seed, index, self.split)
            pixels[place] = self._cut(clip.frames_THWC, sample).transpose(3, 0, 1, 2)
            captions.append(clip.caption)
            truths.append(clip.truth)
            ids.append(f"{self.split}/{self.seed}/{index}" + (f"/{crop}" if crop else ""))
        return _Rendered(pixels, captions, ids, truths)

    def _cut(self, frames_THWC: Array, sample: int) -> Array:
        draw = rng.numpy_generator(self.seed, "crop", sample)
        sizes = (self.num_frames, *self.crop)
        starts = [
            int(draw.integers(0, have - want + 1))
            for have, want in zip(frames_THWC.shape, sizes, strict=False)
        ]
        t, y, x = (slice(s, s + n) for s, n in zip(starts, sizes, strict=True))
        return frames_THWC[t, y, x]


class ClipBatches:
    """Clips of a world, rendered at (height, width) and cropped at random places.

    `world` is the name of a file under `fastvideo/worlds/`, or `some.module:World`.

    Sample number `step * batch + item` decides clip and crop, so that a step gives the same batch
    in any process and after any restart. `window=True` renders `render_frames` frames and cuts a
    random window of `num_frames`; without it a clip is the world's first `num_frames`.
    `crops_per_clip` cuts that many samples from each render, for when rendering is the bottleneck.
    A process that holds a `part` of every batch renders only the clips of that part.
    With `workers`, `prefetch` renders in that many processes, one finished batch waiting in each.

    Raises `ValueError` if the crop or the window is larger than the render, or the batch is not a
    multiple of `crops_per_clip`.
    """

    def __init__(
        self,
        world: str,
        *,
        seed: int,
        batch: int,
        num_frames: int,
        height: int,
        width: int,
        fps: int = 16,
        crop: Crop | None = None,
        window: bool = False,
        render_frames: int = 81,
        crops_per_clip: int = 1,
        workers: int = 0,
        split: str = "train",
        start_step: int = 0,
        part: Part = WHOLE,
    ) -> None:
        self.size, self.workers, self.start_step = batch, workers, start_step
        self._render = _Renderer(
            world=world,
            seed=seed,
            batch=batch,
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            crop=crop or (height, width),
            split=split,
            render_frames=render_frames if window else num_frames,
            crops_per_clip=crops_per_clip,
            part=part,
        )
        _check(self._render)

    def batch(self, step: int) -> ClipBatch:
        """Render the batch of one step in this process."""
        return _batch(self._render(step))

    def starting_at(self, step: int) -> ClipBatches:
        """Return the same batches, prefetched from another step on."""
        other = copy.copy(self)
        other.start_step = step
        return other

    def prefetch(self, steps: int | None = None) -> Generator[ClipBatch, None, None]:
        """Yield the batches of `start_step`, `start_step + 1`, ...: `steps` of them, or for ever.

        Worker processes start at the first batch and end with the iterator, however it ends.
        """
        last = None if steps is None else self.start_step + steps
        with closing(
            in_order(self._render, start=self.start_step, stop=last, workers=self.workers)
        ) as rendered:
            for one in rendered:
                yield _batch(one)

    __iter__ = prefetch


def _check(r: _Renderer) -> None:
    for name, value, limit in (
        ("crop height", r.crop[0], r.height),
        ("crop width", r.crop[1], r.width),
        ("num_frames", r.num_frames, r.render_frames),
    ):
        if not 1 <= value <= limit:
            raise ValueError(f"{name} {value} must be from 1 to {limit}, the size of the render")
    if r.batch < 1 or r.crops_per_clip < 1 or r.batch % r.crops_per_clip:
        raise ValueError(
            f"batch {r.batch} must be a positive multiple of crops_per_clip {r.crops_per_clip}"
        )


def _batch(one: _Rendered) -> ClipBatch:
    import torch

    return ClipBatch(
        pixels=torch.from_numpy(one.pixels),
        captions=one.captions,
        ids=one.ids,
        truths=one.truths,
    )
