"""Programs that make captioned clips with exact truth, and read that truth back out of frames.

A world module exports `World`, `ATTRIBUTES` (the legal values of each attribute) and
`GENERATOR_VERSION`, raised whenever the frames or captions of any clip change. A truth names a
value of every attribute, or joins those of several things by `+`. The module may export
`CLASSIFIER`, the folder of its trained classifier: a name in the package's zoo, or a path; and
`FIT`, which tells how well what a clip shows fits its true shape.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from fastvideo import registry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastvideo.scenery.shapes_fit import Fit

    Frames = npt.NDArray[np.uint8]
    ToFit = Callable[[Frames, Mapping[str, str]], Fit | None]


class Clip(Protocol):
    """A captioned clip: uint8 frames (T, H, W, 3), one sentence, and what is true of both."""

    @property
    def frames_THWC(self) -> Frames: ...
    @property
    def caption(self) -> str: ...
    @property
    def truth(self) -> dict[str, str]: ...


class World(Protocol):
    """Clips of one size, each decided by (seed, index, split), and their parser."""

    def clip(self, seed: int, index: int, split: str = "train") -> Clip: ...
    def render(self, truth: Mapping[str, str], generator: np.random.Generator) -> Frames: ...
    def parse(self, frames_THWC: Frames) -> dict[str, str]: ...


def open_world(name: str, *, height: int, width: int, num_frames: int, fps: float = 16) -> World:
    """Return the world of a name, at one size. A name is a file here, or `some.module:World`."""
    make = registry.load(__name__, name, "World")
    world: World = make(height=height, width=width, num_frames=num_frames, fps=whole_fps(fps))
    return world


def whole_fps(fps: float) -> int:
    """Return a frame rate that a world can have; `ValueError` names the nearest to another."""
    if fps < 1 or fps != int(fps):
        nearest = max(1, round(fps))
        raise ValueError(f"fps {fps:g} must be whole for clips of a world; nearest: {nearest}")
    return int(fps)


def attributes(name: str) -> Mapping[str, tuple[str, ...]]:
    """Return the legal values of each attribute of a world."""
    legal: Mapping[str, tuple[str, ...]] = _module(name).ATTRIBUTES
    return legal


def generator_version(name: str) -> int:
    """Return the version of a world's frames and captions."""
    version: int = _module(name).GENERATOR_VERSION
    return version


def classifier(name: str) -> str | None:
    """Return where the classifier of a world's clips is kept; None if it has none."""
    folder: str | None = getattr(_module(name), "CLASSIFIER", None)
    return folder


def fit(name: str) -> ToFit | None:
    """Return what tells how well a clip's object fits its true shape; None if nothing does."""
    found: ToFit | None = getattr(_module(name), "FIT", None)
    return found


def _module(name: str) -> ModuleType:
    path, colon, _ = name.partition(":")
    return importlib.import_module(path) if colon else registry.module(__name__, name)
