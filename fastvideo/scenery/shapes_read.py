"""The parser of the shapes world: what is in these frames, by statistics and templates alone.

The background is measured at the sides of the frame, row by row; the object is what differs from it
in chroma (clouds, stars, foam and the moon are nearly grey, objects are saturated).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvideo.scenery import draw, scenes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bool = NDArray[np.bool_]
    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]

UNKNOWN = "unknown"
SCENES = ("day", "night", "meadow", "sea")

_NUM_FRAMES = 41  # frames looked at
_SIDE_PX = 64  # shorter side looked at
_SCENE_LIMIT = 60.0  # mean RGB distance beyond which a background is none of the four
_LEAST_AREA, _MOST_AREA = 0.012, 0.45  # of the shorter side squared; the world's are 0.03 to 0.22
_LOOSEST = 0.4  # variance of a mask's pixels per area: a ball's is 0.16, scattered pixels make 0.8
_SIZE_LIMIT = 0.39  # between small and big, in shorter sides
_FIT_LIMIT = 0.55  # overlap with the best template below which a mask is no shape
_SLOWEST, _FASTEST = 0.03, 0.22  # sides per second; movers make 0.11
_WOBBLE = 0.04  # vertical deviation from steady motion, in heights; bounces make 0.09
_BACKWARD = 0.15  # share of steps against the others; bounces make at least 0.35 in a second
_JUMP = 0.5  # sides between two frames
_TEMPLATE = 48  # pixels across a template


def parse(frames_THWC: NDArray[np.uint8], *, fps: int) -> dict[str, str]:
    """Return shape, colour, scene, motion and size, each a value of the world or "unknown".

    Never raises: frames of a wrong rank, empty or with other than three channels are unknown.
    """
    found = dict.fromkeys(("shape", "colour", "scene", "motion", "size"), UNKNOWN)
    frames = np.asarray(frames_THWC)
    if not is_readable(frames):
        return found
    seconds_T, small = reduced(frames, fps)
    backdrop_H3 = backdrop(small)
    found["scene"] = _scene(backdrop_H3)
    colour, mask_THW = _find(small, backdrop_H3)
    seen = track(mask_THW)
    if colour == UNKNOWN or seen is None:
        return found
    found["colour"] = colour
    found["motion"] = motion(seen, seconds_T)
    found["shape"], across = form(mask_THW, seen)
    found["size"] = "big" if across > _SIZE_LIMIT else "small"
    return found


def is_readable(frames: NDArray[Any]) -> bool:
    """Tell whether this is frames (T, H, W, 3), of at least 16 pixels a side."""
    if frames.ndim != 4 or frames.shape[-1] != 3:
        return False
    return len(frames) > 0 and min(frames.shape[1:3]) >= 16


def reduced(frames: NDArray[np.uint8], fps: int) -> tuple[Float64, Float32]:
    """Return the seconds of the frames kept and those frames, averaged over small squares."""
    count, height, width, _ = frames.shape
    kept = np.unique(np.linspace(0, count - 1, min(count, _NUM_FRAMES)).round().astype(int))
    k = max(1, min(height, width) // _SIDE_PX)
    chosen = frames[kept, : height // k * k, : width // k * k]
    if not np.issubdtype(chosen.dtype, np.uint8):
        chosen = np.nan_to_num(chosen.astype(np.float32)).clip(0, 255)
    small = chosen[:, ::k, ::k].astype(np.float32)
    for i in range(k):
        for j in range(k):
            if i or j:
                small += chosen[:, i::k, j::k]
    return kept / fps, small / np.float32(k * k)


def backdrop(frames: Float32) -> Float32:
    """Return the colour of each row (H, 3): the median over time of both sides of the frame.

    A mover is at either side for less than half of the clip and at one side at a time.
    """
    edge = max(1, frames.shape[2] // 12)
    sides = np.concatenate([frames[:, :, :edge], frames[:, :, -edge:]], axis=2)
    colours: Float32 = np.median(sides, axis=(0, 2)).astype(np.float32)
    return colours


@functools.cache
def typical_backdrops() -> Float32:
    """Return the row colours of every scene, (scene, 64, 3), without its moving parts."""
    canvas = scenes.Canvas(_SIDE_PX, _SIDE_PX, np.zeros(1))
    stills = [scenes.paint(name, canvas, np.random.default_rng(0)).still_HW3 for name in SCENES]
    return np.stack([np.median(still, axis=1) for still in stills])


def _scene(backdrop_H3: Float32) -> str:
    rows = (np.arange(_SIDE_PX) * len(backdrop_H3)) // _SIDE_PX
    gap = np.linalg.norm(typical_backdrops() - backdrop_H3[rows], axis=-1).mean(axis=-1)
    best = int(gap.argmin())
    return SCENES[best] if gap[best] < _SCENE_LIMIT else UNKNOWN


def chroma(rgb: Float32) -> tuple[Float32, Float32]:
    """Return the two coordinates of a colour that grey does not have."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    across = (red - green) * np.float32(0.5**0.5)
    return across, (red + green - 2 * blue) * np.float32(6**-0.5)


def _find(frames: Float32, backdrop_H3: Float32) -> tuple[str, Bool]:
    """Return the object's colour and its mask (T, H, W).

    A pixel belongs to the colour whose chroma it is nearest to, or to the backdrop of its row; the
    colour with most pixels is the object's, and its edge lies half way to the backdrop.
    """
    a_H, b_H = chroma(backdrop_H3)
    a, b = chroma(frames)
    a -= a_H[:, None]
    b -= b_H[:, None]
    palette = np.asarray(list(draw.COLOURS.values()), np.float32)
    toward_a, toward_b = chroma(palette)
    near = a * a + b * b  # squared distance to the backdrop
    best = np.full(a.shape, -1, np.int8)
    for c, (pa, pb) in enumerate(zip(toward_a, toward_b, strict=True)):
        away = (a - (pa - a_H)[:, None]) ** 2 + (b - (pb - b_H)[:, None]) ** 2
        best[away < near] = c
        np.minimum(near, away, out=near)
    votes = np.bincount((best + 1).ravel(), minlength=len(palette) + 1)[1:]
    c = int(votes.argmax())
    if votes[c] == 0:
        return UNKNOWN, best == c
    ea, eb = (toward_a[c] - a_H)[:, None], (toward_b[c] - b_H)[:, None]
    length = ea * ea + eb * eb
    sideways = np.abs(a * eb - b * ea)
    mask = (a * ea + b * eb > 0.5 * length) & (sideways < 0.45 * length)
    return list(draw.COLOURS)[c], mask


@dataclass(frozen=True)
class Seen:
    """Per frame in which there is an object: index, centre in pixels, area in pixels, wholeness."""

    frame_N: NDArray[np.int64]
    x_N: Float64
    y_N: Float64
    area_N: Float64
    whole_N: Bool
    height: int
    width: int


def track(mask_THW: Bool) -> Seen | None:
    """Follow the object; None if fewer than half of the frames show one compact patch."""
    count, height, width = mask_THW.shape
    by_column = mask_THW.sum(axis=1).astype(np.float64)
    by_row = mask_THW.sum(axis=2).astype(np.float64)
    area = by_row.sum(axis=1)
    some = np.maximum(area, 1)
    x, wide = _moments(by_column / some[:, None])
    y, tall = _moments(by_row / some[:, None])
    share = area / min(height, width) ** 2
    believable = (share > _LEAST_AREA) & (share < _MOST_AREA) & (wide + tall < _LOOSEST * area)
    frame = np.flatnonzero(believable)
    if 2 * len(frame) < count:
        return None
    sides = by_column[:, 0] + by_column[:, -1] + by_row[:, 0] + by_row[:, -1]
    return Seen(frame, x[frame], y[frame], area[frame], sides[frame] == 0, height, width)


def _moments(weight_TN: Float64) -> tuple[Float64, Float64]:
    """Return mean and variance of the position along N, weighted; rows sum to one."""
    at = np.arange(weight_TN.shape[1]) + 0.5
    mean = weight_TN @ at
    return mean, weight_TN @ at**2 - mean**2


def motion(seen: Seen, seconds_T: Float64) -> str:
    """Tell a steady drift from a bounce, which strays from a straight line and turns back."""
    seconds = seconds_T[seen.frame_N]
    if len(seconds) < 3:
        return UNKNOWN
    design = np.stack([seconds - seconds.mean(), np.ones_like(seconds)], axis=1)
    places = np.stack([seen.x_N / seen.width, seen.y_N / seen.height], axis=1)
    steps = np.diff(places, axis=0)
    steps[np.abs(steps) > _JUMP] = 0  # it left the frame and came back on the other side
    places = np.concatenate([places[:1], places[:1] + steps.cumsum(axis=0)])
    fit, *_ = np.linalg.lstsq(design, places, rcond=None)
    speed_x, speed_y = fit[0]
    wobble = float((places - design @ fit)[:, 1].std())
    turns = min((steps[:, 1] > 0).mean(), (steps[:, 1] < 0).mean()) > _BACKWARD
    if (turns and wobble > _WOBBLE) or abs(speed_y) > _FASTEST:
        return "bouncing"
    if max(abs(speed_x), abs(speed_y)) < _SLOWEST:
        return UNKNOWN
    if abs(speed_x) > abs(speed_y):
        return "right" if speed_x > 0 else "left"
    return "down" if speed_y > 0 else "up"


@functools.cache
def _templates() -> tuple[tuple[str, ...], Float32, Float64]:
    """Return the shapes' names, masks of equal area (shape, side, side), and unit areas.

    A patch spans two square roots of the area; the unit area is that of diameter 1.
    """
    fine, at = _centres(400), _centres(_TEMPLATE)
    names = tuple(draw.OUTLINES)
    filled = [draw.signed_distance(n, fine[None], fine[:, None], 1.0) < 0 for n in names]
    areas = [4 * float(inside.mean()) for inside in filled]
    masks = [
        draw.coverage(draw.signed_distance(n, at[None], at[:, None], area**-0.5), 0.06)
        for n, area in zip(names, areas, strict=True)
    ]
    return names, np.stack(masks), np.asarray(areas)


def unit_area(shape: str) -> float:
    """Return the area of a shape of diameter 1."""
    names, _, areas = _templates()
    return float(areas[names.index(shape)])


def _centres(count: int) -> Float32:
    return ((np.arange(count) + 0.5) * (2 / count) - 1).astype(np.float32)


def form(mask_THW: Bool, seen: Seen) -> tuple[str, float]:
    """Return the shape, and the diameter in shorter sides.

    The average of the centred masks is compared with each shape's template.
    """
    use = seen.whole_N if seen.whole_N.sum() >= min(3, len(seen.frame_N)) else seen.area_N > 0
    frame, area = seen.frame_N[use], float(np.median(seen.area_N[use]))
    at = _centres(_TEMPLATE) * area**0.5
    column = np.floor(seen.x_N[use, None] + at).astype(int)
    row = np.floor(seen.y_N[use, None] + at).astype(int)
    inside_y = (row >= 0) & (row < seen.height)
    inside_x = (column >= 0) & (column < seen.width)
    row, column = row.clip(0, seen.height - 1), column.clip(0, seen.width - 1)
    patches = mask_THW[frame[:, None, None], row[:, :, None], column[:, None, :]]
    patches &= inside_y[:, :, None] & inside_x[:, None, :]
    mean = patches.mean(axis=0)
    names, templates, unit_areas = _templates()
    both = np.minimum(mean, templates).sum(axis=(1, 2))
    overlap = both / np.maximum(mean, templates).sum(axis=(1, 2))
    best = int(overlap.argmax())
    across = (area / unit_areas[best]) ** 0.5 / min(seen.height, seen.width)
    return (names[best] if overlap[best] > _FIT_LIMIT else UNKNOWN), across
