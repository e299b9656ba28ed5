"""Sizes and lengths that videos are brought to: every rule of it as one value.

rules = Rules(width=832, height=480, frames=(17, 81), fps=16, multiple=(16, 16), temporal=4)
fit = rules.fit(footage)     # Fit, or `UnfitError` with the reason why a video is left out
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from fastvideo import sampling
from fastvideo.config import Strict
from fastvideo.footage import Footage, View, num_frames_at
from fastvideo.registry import did_you_mean
from fastvideo.shapes import Compression, PixelShape

ASPECTS = ("16:9", "3:2", "4:3", "1:1", "3:4", "2:3", "9:16")
FULL = 0.95  # a size with this share of the budget's area fills it
ALIKE = 0.05  # aspect ratios whose logarithms are nearer than this share a size


class UnfitError(ValueError):
    """Why a sound video is left out; the text does not name the file."""


@dataclass(frozen=True, order=True)
class Bucket:
    """A size and length that clips share; its name is that of its shards."""

    width: int
    height: int
    frames: int

    @property
    def name(self) -> str:
        """Return `832x480x81`."""
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class Fit:
    """A video in its bucket: how it is scaled and cut, and the share of the picture that stays."""

    bucket: Bucket
    view: View
    kept: float


class Rules(Strict):
    """What decides a video's bucket and its pixels there.

    A video goes to the size whose aspect ratio is nearest (in its logarithm), is scaled to cover
    it, and is cut around its centre. Its clip starts with the video, at `fps` frames per second by
    the frames' times, and has the largest of `frames` that fits.

    Sizes: `width` x `height`, the same turned, and for each of `aspects` that is not like these the
    nearest of the legal sizes that fill the budget of width x height pixels. Legal sides are
    multiples of `multiple` (the VAE's compression times the denoiser's patch), legal lengths
    `temporal` k + 1.
    """

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    frames: tuple[int, ...] = Field(min_length=1)
    fps: Annotated[float, BeforeValidator(sampling.read_fps), Field(gt=0)]
    multiple: tuple[int, int] = Field(description="of height and width")
    temporal: int = Field(ge=1)
    aspects: tuple[str, ...] = ASPECTS
    max_upscale: float = Field(default=1.25, ge=1, description="a smaller video is left out")
    min_kept: float = Field(default=0.6, gt=0, le=1, description="share that the cut must leave")

    @model_validator(mode="after")
    def _are_legal(self) -> Rules:
        whole = Compression(self.temporal, 1, (1, *self.multiple))
        for frames in self.frames:
            PixelShape(frames, self.height, self.width).latent(whole)
        for text in self.aspects:
            _aspect(text)
        return self

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the sizes (width, height), widest first."""
        own = (self.width, self.height)
        found = {own} | ({own[::-1]} & {_snapped(own[::-1], self.multiple)})
        budget = sizes_of_budget(self.width * self.height, self.multiple)
        for aspect in map(_aspect, self.aspects):
            if all(_apart(size, aspect) > ALIKE for size in found):
                found.add(_nearest(budget, aspect))
        return tuple(sorted(found, key=lambda size: (-size[0] / size[1], size)))

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Return every bucket that a video may go to."""
        return tuple(Bucket(w, h, n) for w, h in self.sizes for n in sorted(set(self.frames)))

    def fit(self, footage: Footage) -> Fit:
        """Return a video's place; `UnfitError` if it is too short, too small or too long-drawn."""
        width, height = _nearest(self.sizes, footage.width / footage.height)
        view, scale = cover(footage.width, footage.height, width, height)
        kept = width * height / (view.scaled[0] * view.scaled[1])
        size = f"{footage.width}x{footage.height}"
        if scale > self.max_upscale:
            raise UnfitError(
                f"too small: {size} would be enlarged {scale:.2f} times to {width}x{height}"
                f" (at most {self.max_upscale:g})"
            )
        if kept < self.min_kept:
            raise UnfitError(
                f"too far from every shape: {width}x{height} keeps {kept:.0%} of {size}"
                f" (at least {self.min_kept:.0%})"
            )
        return Fit(Bucket(width, height, self._length(footage.duration_s)), view, kept)

    def _length(self, duration_s: float) -> int:
        have = num_frames_at(duration_s, self.fps)
        legal = [frames for frames in self.frames if frames <= have]
        if not legal:
            raise UnfitError(
                f"too short: {duration_s:.2f} s are {have} frames at {self.fps:g} fps"
                f" (at least {min(self.frames)})"
            )
        return max(legal)


def sizes_of_budget(area: int, multiple: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the sizes (width, height) of these multiples that fill an area without exceeding it.

    They have 95 % of it, or no row or column can be added. `multiple` is that of height and width.
    """
    down, across = multiple
    blocks = area // (down * across)
    most = {(blocks // i, i) for i in range(1, blocks + 1)}
    found = most & {(h, w) for w, h in most}
    for h in range(1, blocks + 1):
        least = math.ceil(FULL * area / (down * across) / h)
        found |= {(w, h) for w in range(least, blocks // h + 1)}
    return sorted((w * across, h * down) for w, h in found)


def cover(width: int, height: int, to_width: int, to_height: int) -> tuple[View, float]:
    """Return the view that fills a size with a picture and cuts around its centre, and its scale.

    The scaled picture is rounded to whole pixels, never below the size.
    """
    scale = max(to_width / width, to_height / height)
    scaled = max(to_width, round(width * scale)), max(to_height, round(height * scale))
    left, top = (scaled[0] - to_width) // 2, (scaled[1] - to_height) // 2
    return View(scaled, left, top, to_width, to_height), scale


def _nearest(sizes: Iterable[tuple[int, int]], aspect: float) -> tuple[int, int]:
    """Return the size of the nearest aspect ratio; of equals the larger, then the wider."""

    def distance(size: tuple[int, int]) -> tuple[float, int, int]:
        return round(_apart(size, aspect), 9), -size[0] * size[1], -size[0]

    return min(sizes, key=distance)


def _apart(size: tuple[int, int], aspect: float) -> float:
    return abs(math.log(size[0] / size[1] / aspect))


def _snapped(size: tuple[int, int], multiple: tuple[int, int]) -> tuple[int, int]:
    """Return a size with its sides cut down to their multiples."""
    return size[0] - size[0] % multiple[1], size[1] - size[1] % multiple[0]


def _aspect(text: str) -> float:
    width, colon, height = text.partition(":")
    if not colon or not (width.isdecimal() and height.isdecimal()) or not int(width) * int(height):
        hint = did_you_mean(text, ASPECTS)
        raise ValueError(f"aspect {text!r} must look like WIDTH:HEIGHT{hint}")
    return int(width) / int(height)
