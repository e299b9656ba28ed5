"""Structural similarity: agreement of local means, contrasts and structure (Wang et al. 2004).

The paper's constants: a Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, for
values of 0..255; windows lie wholly inside the frame, colour channels and frames are averaged.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Frames = npt.NDArray[np.uint8]

WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(frames_THWC: Frames, reference_THWC: Frames) -> float:
    """Return the mean similarity of a clip, 1 for equal clips.

    Raises `ValueError` if the clips differ in size or are smaller than the window.
    """
    if frames_THWC.shape != reference_THWC.shape:
        raise ValueError(
            f"clips to compare differ in size: {frames_THWC.shape}, {reference_THWC.shape}"
        )
    if min(frames_THWC.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs frames of at least {WINDOW}x{WINDOW}: {frames_THWC.shape}")
    pairs = zip(frames_THWC, reference_THWC, strict=True)  # a frame at a time stays in the cache
    return float(np.mean([_frame(_planes(a), _planes(b)) for a, b in pairs]))


def _frame(x: Tensor, y: Tensor) -> float:
    middle = x.mean((1, 2), keepdim=True)  # (3, 1, 1); squares of what is left keep their digits
    x, y = x - middle, y - middle  # (3, H, W)
    blurred = _blur(torch.cat([x, y, x * x, y * y, x * y]))  # (15, H', W')
    mean_x, mean_y, xx, yy, xy = blurred.chunk(5)
    var_x, var_y, both = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + middle, mean_y + middle
    top = (2 * mean_x * mean_y + C1) * (2 * both + C2)
    bottom = (mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2)
    return float((top / bottom).mean())


def _planes(frame_HWC: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(frame_HWC.transpose(2, 0, 1).astype(np.float32, order="C"))  # (3, H, W)


def _blur(x_NHW: Tensor) -> Tensor:
    rows, columns = (_window(size) for size in x_NHW.shape[1:])
    return rows @ x_NHW @ columns.T  # (N, H - 10, W - 10)


@functools.cache
def _window(size: int) -> Tensor:
    """Return the Gaussian at every place of a line of `size`: (size - 10, size)."""
    at = torch.arange(WINDOW, dtype=torch.float32) - WINDOW // 2
    weights = torch.exp(-(at**2) / (2 * SIGMA**2))
    out = torch.zeros(size - WINDOW + 1, size)
    for place, row in enumerate(out):
        row[place : place + WINDOW] = weights / weights.sum()
    return out
