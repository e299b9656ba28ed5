"""The parser of the trio world: which objects are in these frames, told apart by their colours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fastvideo.scenery import draw
from fastvideo.scenery import shapes_read as shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bool = NDArray[np.bool_]
    Float32 = NDArray[np.float32]

_SIZE_LIMIT = 0.33  # between small and big, in shorter sides
_SCENE_LIMIT = 60.0  # RGB distance beyond which a pixel is none of a scene's
_CORE = 21  # of the 25 pixels around one: where so many of a colour lie together is no rim
_RIM = 7  # pixels from a core within which its colour is the object's


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
    for colour, mask_THW in _find(small, backdrop_H3):
        seen = shapes.track(mask_THW)
        if seen is None:
            continue
        shape, across = shapes.form(mask_THW, seen)
        size = "big" if across > _SIZE_LIMIT else "small"
        motion = shapes.motion(seen, seconds_T)
        things.append({"colour": colour, "shape": shape, "motion": motion, "size": size})
    return scene, things


def _backdrop(frames: Float32) -> tuple[str, Float32]:
    """Return the scene that most pixels fit, and the colours of its rows (H, 3)."""
    typical = shapes.typical_backdrops()  # (scene, 64, 3)
    rows = (np.arange(frames.shape[1]) * typical.shape[1]) // frames.shape[1]
    gaps = [np.linalg.norm(frames - colours[rows][:, None], axis=-1) for colours in typical]
    shares = [float((gap < _SCENE_LIMIT).mean()) for gap in gaps]
    best = int(np.argmax(shares))
    return (shapes.SCENES[best] if shares[best] > 0.3 else shapes.UNKNOWN), typical[best][rows]


def _find(frames: Float32, backdrop_H3: Float32) -> Iterator[tuple[str, Bool]]:
    """Yield the mask (T, H, W) of each colour that has a core in half of the frames.

    A pixel belongs to the colour whose chroma it is nearest to, or to the backdrop of its row. A
    rim where two colours mix looks like a third, but it has no core and lies at another's.
    """
    a_H, b_H = shapes.chroma(backdrop_H3)
    a, b = shapes.chroma(frames)
    toward = np.stack(shapes.chroma(np.asarray(list(draw.COLOURS.values()), np.float32)), axis=1)
    away = [(a - a_H[:, None]) ** 2 + (b - b_H[:, None]) ** 2]
    away += [(a - pa) ** 2 + (b - pb) ** 2 for pa, pb in toward]
    near = np.stack(away)  # the squared distance to the backdrop, then to each colour
    cores = {c: _core(near.argmin(axis=0) == c) for c in range(1, len(near))}
    present = [c for c, core in cores.items() if core.any(axis=(1, 2)).mean() >= 0.5]
    best = near[[0, *present]].argmin(axis=0)
    for i, c in enumerate(present, start=1):
        mask = best == i
        yield list(draw.COLOURS)[c - 1], mask & (_around(_core(mask), _RIM) > 0)


def _core(mask_THW: Bool) -> Bool:
    core: Bool = _around(mask_THW, 2) >= _CORE
    return core


def _around(mask_THW: Bool, reach: int) -> NDArray[np.int32]:
    """Count the pixels of the mask in the square around each pixel, `reach` to every side."""
    side, before = 2 * reach + 1, (reach + 1, reach)
    total = np.pad(mask_THW, ((0, 0), before, before)).astype(np.int32)
    total = total.cumsum(axis=1).cumsum(axis=2)
    counts: NDArray[np.int32] = (
        total[:, side:, side:]
        - total[:, :-side, side:]
        - total[:, side:, :-side]
        + total[:, :-side, :-side]
    )
    return counts
