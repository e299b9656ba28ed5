"""How well the object of a clip fits the shape that it should have, at full resolution.

The object's mask is held against the ideal outline of its truth, moved and scaled to fit best:
what is left is the shape's own error, whatever the motion and the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastvideo.scenery import draw
from fastvideo.scenery import shapes_read as reader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bool = NDArray[np.bool_]
    Float32 = NDArray[np.float32]

_NUM_FRAMES = 21  # frames looked at
_MARGIN_PX = 3  # about the mask, in which the outline may lie
_STEPS = (1.0, 0.5, 0.25)  # pixels of position, and of `_SIZE_STEP`, of each search
_SIZE_STEP = 0.03
_BAND_PX = 3.0  # about the outline, in which its edge is measured


@dataclass(frozen=True)
class Fit:
    """`overlap`: intersection over union of mask and outline, mean over frames; `deviation`: its
    standard deviation over frames; `edge_px`: pixels in which colour turns into backdrop.
    """

    overlap: float
    deviation: float
    edge_px: float


def fit(frames_THWC: NDArray[np.uint8], truth: Mapping[str, str]) -> Fit | None:
    """Return how well the object fits its true shape; None if no frame shows one that is whole."""
    count = len(frames_THWC)
    kept = np.unique(np.linspace(0, count - 1, min(count, _NUM_FRAMES)).round().astype(int))
    frames = frames_THWC[kept].astype(np.float32)
    share_THW = _share(frames, reader.backdrop(frames), truth["colour"])
    if share_THW is None:
        return None
    mask_THW = share_THW > 0.5
    seen = reader.track(mask_THW)
    if seen is None or not seen.whole_N.any():
        return None
    found = [
        _best(mask_THW[t], share_THW[t], truth["shape"], x=x, y=y, area=area)
        for t, x, y, area, whole in zip(
            seen.frame_N, seen.x_N, seen.y_N, seen.area_N, seen.whole_N, strict=True
        )
        if whole
    ]
    overlaps, edges = np.asarray(found).T
    return Fit(float(overlaps.mean()), float(overlaps.std()), float(np.median(edges)))


def _share(frames: Float32, backdrop_H3: Float32, colour: str) -> Float32 | None:
    """Return how much of each pixel is the object's colour and not its row's backdrop, 0 to 1."""
    a_H, b_H = reader.chroma(backdrop_H3)
    a, b = reader.chroma(frames)
    to_a, to_b = reader.chroma(np.asarray(draw.COLOURS[colour], np.float32))
    ea, eb = (to_a - a_H)[:, None], (to_b - b_H)[:, None]
    length = ea * ea + eb * eb
    if float(length.min()) <= 0:
        return None
    along = ((a - a_H[:, None]) * ea + (b - b_H[:, None]) * eb) / length
    sideways = np.abs((a - a_H[:, None]) * eb - (b - b_H[:, None]) * ea) / length
    share: Float32 = np.where(sideways < 0.45, along.clip(0, 1), 0).astype(np.float32)
    return share


def _best(
    mask_HW: Bool, share_HW: Float32, shape: str, *, x: float, y: float, area: float
) -> tuple[float, float]:
    """Return the overlap of a mask with the best outline, and the width of the edge there."""
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    top, left = max(0, rows[0] - _MARGIN_PX), max(0, columns[0] - _MARGIN_PX)
    window = (slice(top, rows[-1] + 1 + _MARGIN_PX), slice(left, columns[-1] + 1 + _MARGIN_PX))
    mask, share = mask_HW[window], share_HW[window]
    at_y = (np.arange(mask.shape[0]) + top + 0.5).astype(np.float32)[:, None]
    at_x = (np.arange(mask.shape[1]) + left + 0.5).astype(np.float32)[None]
    total = int(mask_HW.sum())

    def distance(cx: float, cy: float, diameter: float) -> Float32:
        return draw.signed_distance(shape, at_x - np.float32(cx), at_y - np.float32(cy), diameter)

    def overlap(cx: float, cy: float, diameter: float) -> float:
        inside = distance(cx, cy, diameter) < 0
        both = int((inside & mask).sum())
        return both / max(1, total + int(inside.sum()) - both)

    place = (x, y, (area / reader.unit_area(shape)) ** 0.5)
    best = overlap(*place)
    for step in _STEPS:
        is_better = True
        while is_better:
            is_better = False
            for axis, move in enumerate((step, step, place[2] * _SIZE_STEP * step)):
                for sign in (1, -1):
                    other = tuple(v + sign * move * (i == axis) for i, v in enumerate(place))
                    found = overlap(*other)
                    if found > best:
                        best, place, is_better = found, other, True
    away = distance(*place)
    near = np.abs(away) < _BAND_PX
    around = float((np.abs(away) < 0.5).sum())
    # a linear ramp of width w holds w / 6 of s (1 - s) per pixel of outline
    return best, 6 * float((share * (1 - share))[near].sum()) / max(1.0, around)
