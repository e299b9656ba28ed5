"""Frames of the shapes worlds: a scene, and objects before it along their paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastvideo.scenery import draw, scenes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK_PIXELS = 1 << 17  # frames drawn at once: what stays in a core's cache


def film(
    scene: scenes.Scene, objects: Sequence[tuple[draw.Sprites, draw.Path]]
) -> NDArray[np.uint8]:
    """Return frames (T, H, W, 3); a later object is nearer."""
    height, width, _ = scene.still_HW3.shape
    count, terms = scene.rows_TKW3.shape[:2]
    frames = np.empty((count, height, width, 3), np.uint8)
    flat_TH3W = frames.reshape(count, height, 3 * width)
    rows_TK3W = scene.rows_TKW3.reshape(count, terms, 3 * width)
    still_H3W = scene.still_HW3.reshape(height, 3 * width) + np.float32(0.5)  # rounds, not floors
    chunk = max(1, _CHUNK_PIXELS // (height * width))
    for first in range(0, count, chunk):
        picture = scene.columns_HK @ rows_TK3W[first : first + chunk]
        picture += still_H3W
        for drawn, where in objects:
            draw.stamp(picture, drawn, where, first)
        np.clip(picture, 0, 255, out=picture)
        np.copyto(flat_TH3W[first : first + chunk], picture, casting="unsafe")
    return frames
