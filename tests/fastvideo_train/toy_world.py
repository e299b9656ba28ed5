"""A world of two attributes for tests of the data path: a grey level and a moving bright row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ATTRIBUTES = {"level": ("dark", "bright"), "motion": ("up", "down")}
GENERATOR_VERSION = 1


@dataclass(frozen=True)
class Clip:
    frames_THWC: np.ndarray
    caption: str
    truth: dict[str, str]


def truth_of(caption: str) -> dict[str, str]:
    level, _, motion = caption.partition(" row moving ")
    return {"level": level, "motion": motion}


class World:
    ATTRIBUTES = ATTRIBUTES

    def __init__(self, *, height: int, width: int, num_frames: int, fps: int = 16) -> None:
        self.sizes = (num_frames, height, width, 3)

    def clip(self, seed: int, index: int, split: str = "train") -> Clip:
        draw = np.random.default_rng((seed, index, len(split)))
        level, motion = ("dark", "bright")[draw.integers(2)], ("up", "down")[draw.integers(2)]
        frames = np.full(self.sizes, 40 if level == "dark" else 160, np.uint8)
        frames[..., 2] += np.uint8(draw.integers(0, 20))
        start, sign = self.sizes[1] // 2, 1 if motion == "down" else -1
        for t in range(self.sizes[0]):
            frames[t, (start + sign * t) % self.sizes[1]] = 255
        return Clip(frames, f"{level} row moving {motion}", {"level": level, "motion": motion})

    def parse(self, frames: np.ndarray) -> dict[str, str]:
        level = "dark" if np.median(frames[..., 0]) < 100 else "bright"
        rows = frames[..., 0].astype(float).mean(2).argmax(1)
        return {"level": level, "motion": "down" if rows[1] > rows[0] else "up"}
