"""Frames that show nothing, which no world's parser may stumble over."""

from __future__ import annotations

import numpy as np
import pytest

GARBAGE = {
    "noise": np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8),
    "white": np.full((9, 64, 64, 3), 255, np.uint8),
    "green": np.full((9, 64, 64, 3), (0, 255, 0), np.uint8),
    "nan": np.full((4, 20, 50, 3), np.nan, np.float32),
    "tiny": np.zeros((1, 16, 16, 3), np.uint8),
    "empty": np.zeros((0, 64, 64, 3), np.uint8),
    "rank 3": np.zeros((9, 64, 64), np.uint8),
    "too small": np.zeros((9, 4, 4, 3), np.uint8),
    "four channels": np.zeros((9, 64, 64, 4), np.uint8),
}


@pytest.fixture(params=GARBAGE.values(), ids=GARBAGE)
def garbage(request: pytest.FixtureRequest) -> np.ndarray:
    return request.param
