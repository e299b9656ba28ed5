"""Scenes of the shapes world: soft backgrounds that cost one small matrix product per frame.

Everything that moves behind the object (clouds, waves, stars) is a sum of products of a column
profile and a row profile, so a frame is `still + columns @ rows[t]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """A background: one still picture and K separable terms that change with time."""

    still_HW3: Float32
    columns_HK: Float32
    rows_TKW3: Float32


@dataclass(frozen=True)
class Canvas:
    """Pixel centres in units of the shorter side, and the seconds at which frames are taken."""

    height: int
    width: int
    times_T: Float64

    @property
    def unit(self) -> int:
        """The shorter side in pixels."""
        return min(self.height, self.width)

    @property
    def x_W(self) -> Float64:
        """Column centres, from 0 to width / unit."""
        return (np.arange(self.width) + 0.5) / self.unit

    @property
    def y_H(self) -> Float64:
        """Row centres as a fraction of the height, so that a scene fills any frame."""
        return (np.arange(self.height) + 0.5) / self.height

    @property
    def right(self) -> float:
        """The right edge in units."""
        return self.width / self.unit


def paint(name: str, canvas: Canvas, generator: np.random.Generator) -> Scene:
    """Draw one scene; its layout varies with the generator, its colours do not."""
    return _SCENES[name](canvas, generator)


def _gradient(stops: list[tuple[float, RGB]], at: Float64) -> Float32:
    places = [place for place, _ in stops]
    channels = [np.interp(at, places, [rgb[c] for _, rgb in stops]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _step(distance: Float64, softness: float) -> Float64:
    """A soft edge: 0 far below zero, 1 far above."""
    return 0.5 + 0.5 * np.tanh(distance / softness)


def _bell(at: Float64, centre: Float64 | float, sigma: Float64 | float) -> Float64:
    bell: Float64 = np.exp(-0.5 * ((at - centre) / sigma) ** 2)
    return bell


def _scene(
    canvas: Canvas, still: Float32, columns_HK: Float64, rows_TKW: Float64, tint_K3: Float64
) -> Scene:
    rows = rows_TKW.astype(np.float32)[..., None] * tint_K3.astype(np.float32)[:, None, :]
    picture = np.broadcast_to(still, (canvas.height, canvas.width, 3))
    frames = len(canvas.times_T)
    return Scene(
        picture, columns_HK.astype(np.float32), np.broadcast_to(rows, (frames, *rows.shape[1:]))
    )


def _clouds(
    canvas: Canvas, generator: np.random.Generator, places: list[tuple[float, float]]
) -> tuple[Float64, Float64]:
    """Return columns (H, K) and rows (T, K, W) of drifting clouds around `places` (x, y)."""
    puffs = np.array(
        [(-0.12, 0.022, 0.07, 0.7), (-0.01, -0.018, 0.085, 0.85), (0.11, 0.016, 0.075, 0.7)]
    )
    centre = np.repeat(np.array(places), len(puffs), axis=0)
    shift = np.repeat(generator.uniform(-1, 1, (len(places), 3)), len(puffs), axis=0)
    puff = np.tile(puffs, (len(places), 1))
    x_K = centre[:, 0] * canvas.right + puff[:, 0] + 0.12 * shift[:, 0]
    y_K = centre[:, 1] + puff[:, 1] + 0.04 * shift[:, 1]
    drift_K = 0.025 + 0.008 * shift[:, 2]
    x_TK = x_K + drift_K * canvas.times_T[:, None]
    columns = _bell(canvas.y_H[:, None], y_K, puff[:, 2] * 0.58) * puff[:, 3]
    return columns, _bell(canvas.x_W, x_TK[..., None], puff[:, 2, None])


def _day(canvas: Canvas, generator: np.random.Generator) -> Scene:
    sky = _gradient(
        [(0, (158, 196, 230)), (0.7, (212, 229, 242)), (1, (236, 239, 240))], canvas.y_H
    )
    columns, rows = _clouds(canvas, generator, [(0.25, 0.2), (0.78, 0.42)])
    tint = np.tile([[62.0, 44.0, 24.0]], (columns.shape[1], 1))
    return _scene(canvas, sky[:, None], columns, rows, tint)


def _night(canvas: Canvas, generator: np.random.Generator) -> Scene:
    sky = _gradient([(0, (14, 18, 46)), (0.6, (27, 32, 68)), (1, (48, 50, 90))], canvas.y_H)
    x_W, y_H = canvas.x_W, canvas.y_H[:, None] * canvas.height / canvas.unit
    jitter = generator.uniform(-1, 1, 2)
    moon_x, moon_y = 0.8 * canvas.right + 0.08 * jitter[0], 0.17 + 0.03 * jitter[1]
    away = np.sqrt((x_W - moon_x) ** 2 + (y_H - moon_y) ** 2)
    disc = _step(0.085 - away, 0.012)[..., None].astype(np.float32)
    glow = (0.22 * np.exp(-away / 0.11))[..., None].astype(np.float32)
    moon = np.array((232, 230, 214), np.float32)
    still = sky[:, None] + (glow + disc * (0.92 - glow)) * (moon - sky[:, None])
    columns, rows = _stars(canvas, generator, moon_x, moon_y)
    tint = np.tile([[168.0, 168.0, 150.0]], (columns.shape[1], 1))
    return _scene(canvas, still, columns, rows, tint)


def _stars(
    canvas: Canvas, generator: np.random.Generator, moon_x: float, moon_y: float, count: int = 9
) -> tuple[Float64, Float64]:
    """Return columns (H, K) and rows (T, K, W) of slowly twinkling dots, none before the moon."""
    tall = canvas.height / canvas.unit
    x_K = (np.arange(count) * 0.382 + 0.05 + 0.05 * generator.uniform(-1, 1, count)) % 1
    x_K = x_K * canvas.right
    y_K = (0.06 + 0.62 * generator.permutation(count) / count) * tall
    rate, turn = generator.uniform(0.6, 1.4, count), generator.uniform(0, 2 * math.pi, count)
    glint_TK = 0.72 + 0.28 * np.sin(canvas.times_T[:, None] * rate + turn)
    glint_TK = glint_TK * (np.hypot(x_K - moon_x, y_K - moon_y) > 0.15)
    sigma = max(0.0115, 1.2 / canvas.unit) * np.where(np.arange(count) % 3 == 0, 1.3, 1.0)
    columns = _bell(canvas.y_H[:, None] * tall, y_K, sigma)
    return columns, _bell(canvas.x_W, x_K[:, None], sigma[:, None]) * glint_TK[..., None]


def _meadow(canvas: Canvas, generator: np.random.Generator) -> Scene:
    y_H, x_W = canvas.y_H[:, None], canvas.x_W
    still = _gradient([(0, (196, 220, 236)), (0.5, (240, 240, 226))], canvas.y_H)[:, None]
    hills: list[tuple[float, float, RGB, RGB]] = [
        (0.44, 5.0, (188, 212, 170), (172, 200, 150)),
        (0.58, 4.0, (172, 202, 142), (150, 184, 118)),
        (0.76, 3.2, (154, 188, 116), (132, 168, 96)),
    ]
    turns = generator.uniform(0, 2 * math.pi, len(hills))
    for (level, bend, top, bottom), turn in zip(hills, turns, strict=True):
        ridge = level + 0.055 * np.sin(bend * x_W + turn)
        cover = _step(y_H - ridge, 0.014)[..., None].astype(np.float32)
        grass = _gradient([(level - 0.05, top), (level + 0.25, bottom)], canvas.y_H)[:, None]
        still = still + cover * (grass - still)
    columns, rows = _clouds(canvas, generator, [(0.4, 0.17)])
    tint = np.tile([[40.0, 26.0, 16.0]], (columns.shape[1], 1))
    return _scene(canvas, still, columns, rows, tint)


def _sea(canvas: Canvas, generator: np.random.Generator) -> Scene:
    y_H = canvas.y_H
    stops: list[tuple[float, RGB]] = [
        (0, (244, 226, 206)),
        (0.24, (250, 238, 218)),
        (0.31, (176, 216, 212)),
        (0.55, (118, 182, 184)),
        (1, (74, 138, 150)),
    ]
    turns = generator.uniform(0, 2 * math.pi, (3, 2))
    depth = np.clip((y_H - 0.3) / 0.7, 0, 1)
    wide = np.sqrt(depth) * 0.9
    columns, rows = [], []
    for (across, down, rate, weight), turn in zip(_WAVES, turns, strict=True):
        along = down * (depth + 0.2) ** 0.6 + turn[0]
        slide = across * canvas.x_W - rate * canvas.times_T[:, None] + turn[1]
        columns += [weight * wide * np.sin(along), weight * wide * np.cos(along)]
        rows += [np.cos(slide), np.sin(slide)]
    tint = np.tile([[17.0, 15.0, 13.0]], (len(rows), 1))
    still = _gradient(stops, y_H)[:, None]
    return _scene(canvas, still, np.stack(columns, axis=1), np.stack(rows, axis=1), tint)


# waves: radians per unit across, radians down the frame, radians per second, weight
_WAVES = ((5.0, 26.0, 1.1, 0.75), (-8.0, 34.0, 1.4, 0.5), (12.0, 46.0, 1.9, 0.3))

_SCENES: dict[str, Callable[[Canvas, np.random.Generator], Scene]] = {
    "day": _day,
    "night": _night,
    "meadow": _meadow,
    "sea": _sea,
}
