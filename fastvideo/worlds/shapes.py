"""The shapes world: one coloured object moves through one scene, and its caption says so.

A world makes captioned clips with exact ground truth and reads that truth back out of frames, so
that a model trained on its clips can be measured instead of judged.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastvideo import rng
from fastvideo.scenery import draw, scenes, shapes_fit
from fastvideo.scenery import shapes_read as reader
from fastvideo.scenery import shapes_text as text
from fastvideo.scenery.film import film
from fastvideo.scenery.shapes_text import truth_of, words

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ATTRIBUTES",
    "CLASSIFIER",
    "GENERATOR_VERSION",
    "SPLITS",
    "Clip",
    "World",
    "held_out",
    "kept",
    "truth_of",
    "words",
]

# raise it when the frames or captions of any (seed, index) change, and that of trio with it
GENERATOR_VERSION = 1
CLASSIFIER = "shapes-classifier"
FIT = shapes_fit.fit
SPLITS = ("train", "heldout")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": tuple(text.SHAPES),
    "colour": tuple(text.COLOURS),
    "scene": tuple(text.SCENES),
    "motion": tuple(text.MOTIONS),
    "size": tuple(text.SIZES),
}


@dataclass(frozen=True)
class Clip:
    """A captioned clip: uint8 RGB frames (T, H, W, 3), one sentence, and what is true of both."""

    frames_THWC: NDArray[np.uint8]
    caption: str
    truth: dict[str, str]


@dataclass(frozen=True)
class World:
    """Clips of one size. Frame k shows second k / fps, so a short clip begins a long one."""

    height: int = 128
    width: int = 128
    num_frames: int = 81
    fps: int = 16

    def __post_init__(self) -> None:
        """Refuse sizes at which the shapes cannot be told apart."""
        for name, value, least in (
            ("height", self.height, 32),
            ("width", self.width, 32),
            ("num_frames", self.num_frames, 1),
            ("fps", self.fps, 1),
        ):
            if value < least:
                raise ValueError(f"{name} {value} must be at least {least} in the shapes world")

    def clip(self, seed: int, index: int, split: str = "train") -> Clip:
        """Make clip `index` of a split; nothing but the arguments and the sizes decides it."""
        legal = combinations(split)
        purpose = f"worlds.shapes/{split}"
        chooser = rng.numpy_generator(seed, f"{purpose}/caption", index)
        truth = dict(legal[int(chooser.integers(len(legal)))])
        frames = self.render(truth, rng.numpy_generator(seed, f"{purpose}/frames", index))
        return Clip(frames, text.caption(truth, chooser), truth)

    def render(self, truth: Mapping[str, str], generator: np.random.Generator) -> NDArray[np.uint8]:
        """Draw frames (T, H, W, 3) in which `truth` holds; the generator decides the rest."""
        check(truth)
        times_T = np.arange(self.num_frames) / self.fps
        canvas = scenes.Canvas(self.height, self.width, times_T)
        jitter = 1 + 0.04 * float(generator.uniform(-1, 1))
        diameter = draw.DIAMETER[truth["size"]] * jitter
        where = draw.path(
            truth["motion"],
            diameter=diameter,
            times_T=times_T,
            height=self.height,
            width=self.width,
            draws=generator.uniform(-1, 1, 4),
        )
        drawn = draw.sprites(truth["shape"], truth["colour"], diameter * canvas.unit, where)
        return film(scenes.paint(truth["scene"], canvas, generator), [(drawn, where)])

    def parse(self, frames_THWC: NDArray[np.uint8]) -> dict[str, str]:
        """Read every attribute out of frames of any size; "unknown" for what cannot be read."""
        return reader.parse(frames_THWC, fps=self.fps)


def kept(prompt: str, frames_THWC: NDArray[np.uint8], *, fps: float = 16) -> dict[str, bool]:
    """Return whether each attribute that a prompt names is seen in a clip, by the world's parser.

    Empty for a prompt that names no shape, or contradicts itself, which no clip can follow.
    """
    try:
        asked = truth_of(prompt)
    except ValueError:
        return {}
    found = reader.parse(frames_THWC, fps=round(fps)) if "shape" in asked else {}
    return {name: found[name] == asked[name] for name in ATTRIBUTES if name in asked and found}


def held_out(truth: Mapping[str, str]) -> bool:
    """Tell whether this combination of all five attributes is kept away from training."""
    check(truth)
    key = ",".join(truth[attribute] for attribute in ATTRIBUTES)
    return rng.derive(0, f"worlds.shapes/held out/{key}") % 10 == 0


@functools.cache
def combinations(split: str) -> tuple[dict[str, str], ...]:
    """Return every combination of a split; `ValueError` for a split that there is not."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown (known: {', '.join(SPLITS)})")
    every = (
        dict(zip(ATTRIBUTES, values, strict=True))
        for values in itertools.product(*ATTRIBUTES.values())
    )
    return tuple(truth for truth in every if held_out(truth) == (split == "heldout"))


def check(truth: Mapping[str, str]) -> None:
    """Raise `ValueError` unless every attribute has a legal value."""
    for attribute, legal in ATTRIBUTES.items():
        if truth.get(attribute) not in legal:
            value = truth.get(attribute)
            raise ValueError(f"{attribute} {value!r} is unknown (known: {', '.join(legal)})")
