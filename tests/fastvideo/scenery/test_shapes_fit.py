"""The overlap of an object with its ideal shape: near one for true clips, and lower for damage."""

from __future__ import annotations

import numpy as np
import pytest

from fastvideo.scenery.shapes_fit import fit
from fastvideo.worlds.shapes import ATTRIBUTES, World

TRUTH = {"colour": "red", "scene": "night", "motion": "left", "size": "big"}
WORLD = World(height=128, width=128, num_frames=21, fps=4)


def clip(shape: str = "star", **changes: str) -> np.ndarray:
    return WORLD.render({**TRUTH, "shape": shape, **changes}, np.random.default_rng(3))


def found(frames: np.ndarray, shape: str = "star", **changes: str):
    result = fit(frames, {**TRUTH, "shape": shape, **changes})
    assert result is not None
    return result


@pytest.mark.parametrize("shape", ATTRIBUTES["shape"])
@pytest.mark.parametrize(("size", "scene"), [("big", "night"), ("small", "day"), ("small", "sea")])
def test_true_clips_fit_and_keep_fitting(shape: str, size: str, scene: str):
    result = found(clip(shape, size=size, scene=scene), shape, size=size, scene=scene)
    assert result.overlap > 0.98
    assert result.deviation < 0.01


def test_another_shape_fits_much_worse():
    star = clip("star")
    others = [found(star, shape).overlap for shape in ATTRIBUTES["shape"] if shape != "star"]
    assert found(star).overlap > 0.98 > 0.75 > max(others)


def test_a_bite_costs_its_area_and_a_bite_in_every_other_frame_deviates():
    frames = clip("square")
    bitten = frames.copy()
    for frame in bitten:
        red = np.argwhere(frame[..., 0] > 150)
        if len(red):
            top, left = red.min(axis=0)
            bottom, right = red.max(axis=0)
            middle = (left + right) // 2
            frame[top : (top + bottom) // 2, left:middle] = frame[2, 2]
    whole, all_ = found(frames, "square"), found(bitten, "square")
    half = found(np.where(np.arange(21)[:, None, None, None] % 2, bitten, frames), "square")
    assert 0.65 < all_.overlap < 0.88
    assert all_.overlap < half.overlap < whole.overlap
    assert half.deviation > max(all_.deviation, 5 * whole.deviation)


def test_the_edge_widens_with_blur():
    frames = clip("ball").astype(np.float32)
    widths = [found(frames.astype(np.uint8), "ball").edge_px]
    for _ in range(3):
        for axis in (1, 2):
            frames = (np.roll(frames, 1, axis) + 2 * frames + np.roll(frames, -1, axis)) / 4
        widths.append(found(frames.astype(np.uint8), "ball").edge_px)
    assert widths == sorted(widths)
    assert widths[-1] > 1.3 * widths[0]


def test_noise_lowers_the_overlap_step_by_step():
    draw, frames = np.random.default_rng(0), clip("star").astype(np.float32)
    noise = draw.normal(size=frames.shape)
    overlaps = [
        found((frames + level * noise).clip(0, 255).astype(np.uint8)).overlap
        for level in (0, 12, 24)
    ]
    assert overlaps == sorted(overlaps, reverse=True)
    assert overlaps[0] > overlaps[-1] + 0.02


@pytest.mark.parametrize("frames", [np.zeros((5, 64, 64, 3), np.uint8), clip(motion="up")[:, :8]])
def test_frames_without_a_whole_object_have_no_fit(frames: np.ndarray):
    assert fit(frames, {**TRUTH, "shape": "star"}) is None
