"""Flicker: brightness that jumps from frame to frame where nothing moves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def flicker(frames_THWC: npt.NDArray[np.uint8]) -> float:
    """Return the typical pixel's mean second difference over time, in grey levels (0 for a still).

    Second differences forgive steady change, and the median over pixels forgives the few that a
    moving object passes; what is left is the background's unrest. Raises `ValueError` below three
    frames.
    """
    if len(frames_THWC) < 3:
        raise ValueError(f"flicker needs at least 3 frames, not {len(frames_THWC)}")
    grey_THW = frames_THWC.mean(axis=3, dtype=np.float32)
    return float(np.median(np.abs(np.diff(grey_THW, n=2, axis=0)).mean(axis=0)))
