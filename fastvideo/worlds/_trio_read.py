"""The parser of the trio world: which objects are in these frames, told apart by their colours."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fastvideo.worlds import _shapes_draw as draw
from fastvideo.worlds import _shapes_read as shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bool = NDArray[np.bool_]
    Float32 = NDArray[np.float32]

_SIZE_LIMIT = 0.33  # between small and big, in shorter sides
_SCENE_LIMIT = 60.0  # RGB distance beyond which a pixel is none of a scene's
_CORE = 21  # of 25 pixels: where so many of a colour lie together is no rim and no noise
_LEAST_CORE = 0.004  # of the shorter side squared; the smallest star has 0.01
_SIDEWAYS = 0.45  # chroma beside a colour's own, in its own squared


def parse(frames_THWC: NDArray[np.uint8], *, fps: int) -> tuple[str, list[dict[str, str]]]:
    """Return the scene and each object's colour, shape, motion and size, or "unknown".

    Never raises: frames of a wrong rank, empty or with other than three channels hold nothing.
    """
    frames = np.asarray(frames_THWC)
    if not shapes.is_readable(frames):
        return shapes.UNKNOWN, []
    seconds_T, small = shapes.reduced(frames, fps)
    scene, backdrop_H3 = _backdrop(small)
    things = []
    masks = _find(small, backdrop_H3)
    for colour, mask_THW in masks.items():
        seen = shapes.track(mask_THW)
        if seen is None:
            continue
        others = [other for name, other in masks.items() if name != colour]
        seen = _prefer_apart(seen, mask_THW, others)
        shape, across = shapes.form(mask_THW, seen)
        size = "big" if across > _SIZE_LIMIT else "small"
        motion = shapes.motion(seen, seconds_T)
        things.append({"colour": colour, "shape": shape, "motion": motion, "size": size})
    return scene, things


def _backdrop(frames: Float32) -> tuple[str, Float32]:
    """Return the scene that most pixels fit, and the median colour (H, 3) of those that fit it."""
    typical = shapes.typical_backdrops()  # (scene, 64, 3)
    rows = (np.arange(frames.shape[1]) * typical.shape[1]) // frames.shape[1]
    fits = [np.linalg.norm(frames - t[rows][:, None], axis=-1) < _SCENE_LIMIT for t in typical]
    shares = [float(fit.mean()) for fit in fits]
    best = int(np.argmax(shares))
    backdrop_H3 = typical[best][rows].copy()
    for y, fit_TW in enumerate(fits[best].swapaxes(0, 1)):
        if fit_TW.any():
            backdrop_H3[y] = np.median(frames[:, y][fit_TW], axis=0)
    return (shapes.SCENES[best] if shares[best] > 0.3 else shapes.UNKNOWN), backdrop_H3


def _find(frames: Float32, backdrop_H3: Float32) -> dict[str, Bool]:
    """Return the mask (T, H, W) of each colour that has a core in half of the frames.

    A pixel belongs to the colour whose chroma it is nearest to, or to the backdrop of its row. Rims
    where two colours mix may look like a third, but have no core.
    """
    a_H, b_H = shapes.chroma(backdrop_H3)
    a, b = shapes.chroma(frames)
    a -= a_H[:, None]
    b -= b_H[:, None]
    toward = np.stack(shapes.chroma(np.asarray(list(draw.COLOURS.values()), np.float32)), axis=1)
    apart = [(pa - a_H[:, None], pb - b_H[:, None]) for pa, pb in toward]
    away = np.stack([(a - pa) ** 2 + (b - pb) ** 2 for pa, pb in apart])
    near = np.concatenate([(a * a + b * b)[None], away])
    least = _LEAST_CORE * min(frames.shape[1:3]) ** 2
    best = near.argmin(axis=0)
    present = [
        c
        for c in range(len(toward))
        if ((_around(best == c + 1) > _CORE).sum(axis=(1, 2)) > least).mean() >= 0.5
    ]
    best = near[[0, *(c + 1 for c in present)]].argmin(axis=0)
    masks = {}
    for i, c in enumerate(present):
        pa, pb = apart[c]
        straight = np.abs(a * pb - b * pa) < _SIDEWAYS * (pa * pa + pb * pb)
        masks[list(draw.COLOURS)[c]] = (best == i + 1) & straight
    return masks


def _around(mask_THW: Bool) -> NDArray[np.int32]:
    """Count the pixels of the mask in the 5 x 5 around each pixel."""
    total = (
        np.pad(mask_THW, ((0, 0), (3, 2), (3, 2))).astype(np.int32).cumsum(axis=1).cumsum(axis=2)
    )
    counts: NDArray[np.int32] = (
        total[:, 5:, 5:] - total[:, :-5, 5:] - total[:, 5:, :-5] + total[:, :-5, :-5]
    )
    return counts


def _prefer_apart(seen: shapes.Seen, mask_THW: Bool, others: list[Bool]) -> shapes.Seen:
    """Keep the frames in which the object touches no other, if these are a quarter of all."""
    if not others:
        return seen
    other = np.logical_or.reduce(others)
    touching_T = ((_around(mask_THW) > 0) & other).any(axis=(1, 2))
    use = ~touching_T[seen.frame_N]
    if use.sum() * 4 < len(mask_THW):
        return replace(seen, whole_N=seen.whole_N & use)
    kept = {k: v[use] for k, v in vars(seen).items() if k.endswith("_N")}
    return replace(seen, **kept)
