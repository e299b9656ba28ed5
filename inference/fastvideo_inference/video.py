"""A clip in memory: frames or latents, the recipe that made them, and its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo import media
from fastvideo_inference import recipe

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Video:
    """A clip: `frames` T H W 3 uint8 or `latents` B C T H W normalised; `timings` in seconds.

    `budget` says what was chosen within a budget and why, and the seconds predicted and taken.
    Of the processes that made it together one `writes`; `save` does nothing on the others.
    """

    fps: float
    recipe: dict[str, Any]
    timings: dict[str, float]
    frames: Frames | None = None
    latents: Tensor | None = None
    writes: bool = True
    budget: dict[str, Any] | None = None

    @property
    def frames_sha256(self) -> str:
        """Digest of the frames' bytes (T H W 3) before the encoder, which may write equal frames as
        other files; the seconds of it are less than one in a hundred of the encoder's.
        """
        import hashlib

        if self.frames is None:
            text = 'there are no frames to digest: the clip was made with output="latents"'
            raise ValueError(text)
        return hashlib.sha256(self.frames.tobytes()).hexdigest()

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write an mp4 that carries the recipe; raise `FileExistsError` rather than overwrite."""
        import json

        if self.frames is None:
            raise ValueError('there are no frames to save: the clip was made with output="latents"')
        if not self.writes:
            return Path(path)
        tags = {"title": self.recipe["request"]["prompt"], recipe.TAG: json.dumps(self.recipe)}
        return media.write_video(
            path, self.frames, fps=self.fps, metadata=tags, overwrite=overwrite
        )
