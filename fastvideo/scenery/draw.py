"""Objects of the shapes world: signed distances, anti-aliased sprites and the paths they follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 38, 44),
    "orange": (246, 128, 18),
    "yellow": (250, 216, 24),
    "green": (24, 158, 56),
    "blue": (36, 82, 228),
    "purple": (150, 44, 190),
}
DIAMETER = {"small": 0.30, "big": 0.50}  # of the shorter side of the frame

SPEED = 0.11  # of the frame's side per second: 0.55 of it in five seconds
BOUNCE_PERIOD_S = 1.3
BOUNCE_HEIGHT = 0.30

_EDGE_PX = 1.5
_PHASES = 8  # sub-pixel positions for which a sprite is drawn


@dataclass(frozen=True)
class Outline:
    """A regular star polygon by its points, its two radii and its rounding, in object diameters.

    A triangle and a square are stars whose inner corners lie on the edges.
    """

    points: int
    radius: float
    inner: float
    rounding: float
    turn: float = 0.0


OUTLINES: dict[str, Outline | None] = {
    "ball": None,
    "square": Outline(4, 0.60, math.cos(math.pi / 4), 0.05, turn=math.pi / 4),
    "triangle": Outline(3, 0.60, math.cos(math.pi / 3), 0.05),
    "star": Outline(5, 0.54, 0.46, 0.03),
}


def signed_distance(shape: str, x: Float32, y: Float32, diameter: float) -> Float32:
    """Return the distance to the outline, negative inside; x and y broadcast, y points down.

    Every polygon is folded by its symmetry onto one edge (angle 0 is the outer corner).
    """
    radius = np.hypot(x, y)
    outline = OUTLINES[shape]
    if outline is None:
        return radius - np.float32(diameter / 2)
    outer, half = outline.radius * diameter, math.pi / outline.points
    angle = (np.arctan2(x, -y) + np.float32(outline.turn)) * np.float32(0.5 / half)
    angle = np.abs(angle - np.rint(angle)) * np.float32(2 * half)
    from_corner_x = radius * np.cos(angle) - np.float32(outer)
    from_corner_y = radius * np.sin(angle)
    inner = outer * outline.inner
    edge_x, edge_y = inner * math.cos(half) - outer, inner * math.sin(half)
    length = math.hypot(edge_x, edge_y)
    ux, uy = np.float32(edge_x / length), np.float32(edge_y / length)
    along = np.clip(from_corner_x * ux + from_corner_y * uy, 0, np.float32(length))
    away = np.hypot(from_corner_x - along * ux, from_corner_y - along * uy)
    inside = from_corner_y * ux - from_corner_x * uy
    distance: Float32 = np.copysign(away, -inside) - np.float32(outline.rounding * diameter)
    return distance


def coverage(distance: Float32, edge_px: float = _EDGE_PX) -> Float32:
    """Return how much of a pixel lies inside, a smooth step across `edge_px`."""
    ramp = np.clip(0.5 - distance / np.float32(edge_px), 0, 1)
    smooth: Float32 = ramp * ramp * (3 - 2 * ramp)
    return smooth


@dataclass(frozen=True)
class Path:
    """Where the object's centre is in each frame, in pixels; only one coordinate changes."""

    x_T: Float64
    y_T: Float64
    horizontal: bool


def path(
    motion: str,
    *,
    diameter: float,
    times_T: Float64,
    height: int,
    width: int,
    draws: Float64,
    wander: float = 1.0,
) -> Path:
    """Lay a path for one motion; `diameter` in shorter sides, `times_T` in seconds.

    Four `draws` from -1 to 1 say where it lies, where and how fast it begins, and the phase of a
    bounce; it lies up to `wander` times as far from the middle as where an object is alone. A mover
    that has left the frame after its five seconds returns on the side it came from.
    """
    spread, start, speed, phase = draws
    spread = wander * spread
    side = diameter * min(height, width)
    room_x, room_y = 1 - side / width, 1 - side / height
    if motion == "bouncing":
        lift = np.abs(np.sin(np.pi * (times_T / BOUNCE_PERIOD_S + phase)))
        ground = 0.93 - side / height / 2 + 0.02 * start
        x_T = np.full_like(times_T, 0.5 + 0.2 * room_x * spread)
        return Path(x_T * width, (ground - BOUNCE_HEIGHT * lift) * height, horizontal=False)
    sign = 1 if motion in ("right", "down") else -1
    horizontal = motion in ("left", "right")
    gap = side / (width if horizontal else height) / 2 + 0.05
    begin = 0.5 - sign * 2.5 * SPEED + 0.03 * start
    travel = begin + sign * SPEED * (1 + 0.05 * speed) * times_T
    moving = np.mod(travel + gap, 1 + 2 * gap) - gap
    still = np.full_like(times_T, 0.5 + 0.25 * (room_y if horizontal else room_x) * spread)
    x_T, y_T = (moving, still) if horizontal else (still, moving)
    return Path(x_T * width, y_T * height, horizontal)


@dataclass(frozen=True)
class Sprites:
    """An object at each sub-pixel position: new frame = frame * keep + paint."""

    keep_PHW3: Float32
    paint_PHW3: Float32
    half_px: int


def sprites(shape: str, colour: str, diameter_px: float, where: Path) -> Sprites:
    """Draw the object with a soft darker rim and a gentle light from the upper left."""
    half = math.ceil(0.65 * diameter_px) + 2
    grid = np.arange(2 * half, dtype=np.float32) + np.float32(0.5 - half)
    steps = (np.arange(_PHASES, dtype=np.float32) + np.float32(0.5)) / np.float32(_PHASES)
    fixed = float(where.y_T[0] if where.horizontal else where.x_T[0]) % 1
    moving, still = grid[None] - steps[:, None], grid[None] - np.float32(fixed)
    x, y = (moving, still) if where.horizontal else (still, moving)
    x, y = x[:, None, :], y[:, :, None]
    distance = signed_distance(shape, x, y, diameter_px)
    alpha = coverage(distance)
    rim = coverage(distance + np.float32(0.04 * diameter_px), max(_EDGE_PX, 0.07 * diameter_px))
    light = (1 - np.float32(0.16 / diameter_px) * (x + y)) * (np.float32(0.74) + 0.26 * rim)
    shade = (light * alpha)[..., None] * np.asarray(COLOURS[colour], np.float32)
    keep = np.repeat((1 - alpha)[..., None], 3, axis=-1)
    rows = (_PHASES, 2 * half, 6 * half)
    return Sprites(keep.reshape(rows), shade.reshape(rows), half)


def stamp(frames_TH3W: Float32, drawn: Sprites, where: Path, first: int) -> None:
    """Draw the object into consecutive frames, the first of which is frame `first` of the path."""
    height, width = frames_TH3W.shape[1], frames_TH3W.shape[2] // 3
    moving_T = where.x_T if where.horizontal else where.y_T
    phase_T = ((moving_T % 1) * _PHASES).astype(int).tolist()
    left_T = (np.floor(where.x_T).astype(int) - drawn.half_px).tolist()
    top_T = (np.floor(where.y_T).astype(int) - drawn.half_px).tolist()
    for i, frame in enumerate(frames_TH3W):
        t = first + i
        rows = _overlap(top_T[t], 2 * drawn.half_px, height)
        columns = _overlap(left_T[t], 2 * drawn.half_px, width, 3)
        if rows is None or columns is None:
            continue
        patch = frame[rows[0], columns[0]]
        patch *= drawn.keep_PHW3[phase_T[t], rows[1], columns[1]]
        patch += drawn.paint_PHW3[phase_T[t], rows[1], columns[1]]


def _overlap(start: int, size: int, limit: int, step: int = 1) -> tuple[Any, Any] | None:
    low, high = max(0, start), min(limit, start + size)
    if low >= high:
        return None
    return slice(low * step, high * step), slice((low - start) * step, (high - start) * step)
