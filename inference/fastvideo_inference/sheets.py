"""Pictures beside an evaluation's numbers: of the first prompts, none picked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastvideo import media
from fastvideo_inference.scores import Record

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Frames = npt.NDArray[np.uint8]

SHEET, MOVING = "sheet.png", "clips.webp"


def of_model(folder: Path, clips: Sequence[Frames], made: Sequence[Record], *, fps: float) -> None:
    """Write a row of frames for each clip, its prompt above and what was read wrongly behind it."""
    wrong = [{k: v for k, v in m["parse"].items() if m["truth"].get(k, v) != v} for m in made]
    labels = [
        m["prompt"] + (f"  [{', '.join(w.values())}]" if w else "")
        for m, w in zip(made, wrong, strict=True)
    ]
    media.write_png(folder / SHEET, media.contact_sheet(clips, labels=labels), overwrite=True)
    media.write_webp(folder / MOVING, media.mosaic(clips[:8]), fps=fps, overwrite=True)


def of_settings(
    folder: Path, clips: Sequence[Sequence[Frames]], labels: Sequence[str], *, fps: float
) -> None:
    """Write a row of clips for each setting, the same prompts in the same columns.

    The sheet shows the first, middle and last frame of each clip under its setting's label; the
    moving mosaic has no labels, its rows are in the same order.
    """
    import numpy as np

    picks = [[clip[[0, len(clip) // 2, -1]] for clip in row] for row in clips]
    rows = [np.concatenate(row) for row in picks]
    sheet = media.contact_sheet(rows, labels=labels, num_columns=len(rows[0]))
    media.write_png(folder / SHEET, sheet, overwrite=True)
    moving = media.mosaic([clip for row in clips for clip in row], num_columns=len(clips[0]))
    media.write_webp(folder / MOVING, moving, fps=fps, overwrite=True)
