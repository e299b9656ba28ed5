"""Peak signal-to-noise ratio: how far pixels are from a reference, in decibels."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]


def psnr(frames_THWC: Frames, reference_THWC: Frames) -> float:
    """Return 10 log10(255^2 / mean squared error) over a whole clip; infinite for equal clips.

    Raises `ValueError` if the clips differ in size.
    """
    if frames_THWC.shape != reference_THWC.shape:
        raise ValueError(
            f"clips to compare differ in size: {frames_THWC.shape}, {reference_THWC.shape}"
        )
    error = frames_THWC.astype(np.float32) - reference_THWC.astype(np.float32)
    mse = float(np.square(error).mean(dtype=np.float64))
    return 10 * math.log10(255**2 / mse) if mse else math.inf
