"""The trio world: one to three objects, each of a colour of its own, move through one scene.

Colours tell objects apart, also for the parser. Of several objects an attribute names each by its
colour, in a fixed order: `{"shape": "red ball+blue star", "motion": "red left+blue up"}`. The
vocabulary and the scenes are those of the shapes world, and so are the combinations held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastvideo import rng
from fastvideo.scenery import draw, scenes
from fastvideo.scenery import trio_read as reader
from fastvideo.scenery import trio_text as text
from fastvideo.scenery.film import film
from fastvideo.scenery.shapes_read import UNKNOWN
from fastvideo.scenery.shapes_text import words
from fastvideo.worlds import shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]

__all__ = ["ATTRIBUTES", "GENERATOR_VERSION", "NUMBERS", "World", "one", "three", "two", "words"]

GENERATOR_VERSION = 1  # raise it when the frames or captions of any (seed, index) change
NUMBERS = ("one", "two", "three")
OF_EACH = ("shape", "motion", "size")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "number": NUMBERS,
    "scene": shapes.ATTRIBUTES["scene"],
    "colour": shapes.ATTRIBUTES["colour"],
    **{
        name: tuple(
            f"{colour} {value}"
            for colour in shapes.ATTRIBUTES["colour"]
            for value in shapes.ATTRIBUTES[name]
        )
        for name in OF_EACH
    },
}
"""The legal values; of several objects a truth joins one value for each by `+`."""

DIAMETER = {"small": 0.26, "big": 0.42}  # of the shorter side of the frame

_WANDER = 1.8  # objects lie farther from the middle than where they are alone
_FREE = 0.5  # of the five seconds an object must be whole and away from the others
_PLACES, _CASTS = 48, 12  # tries to place objects freely, and to draw others that can be
_REACH = 0.62  # from an object's centre to its farthest point, in diameters

Thing = Mapping[str, str]
"""Colour, shape, motion and size of one object."""


@dataclass(frozen=True)
class World:
    """Clips of one size. Frame k shows second k / fps, so a short clip begins a long one.

    `numbers` says how many objects a clip may have.
    """

    height: int = 128
    width: int = 224
    num_frames: int = 81
    fps: int = 16
    numbers: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        """Refuse sizes at which the shapes cannot be told apart, and numbers of objects."""
        shapes.World(self.height, self.width, self.num_frames, self.fps)
        numbers = sorted(self.numbers)
        if not numbers or sorted({1, 2, 3} & set(numbers)) != numbers:
            raise ValueError(
                f"numbers {self.numbers} of objects must be some of 1, 2, 3, once each"
            )

    def clip(self, seed: int, index: int, split: str = "train") -> shapes.Clip:
        """Make clip `index` of a split; nothing but the arguments and the sizes decides it."""
        purpose = f"worlds.trio/{split}"
        chooser = rng.numpy_generator(seed, f"{purpose}/caption", index)
        generator = rng.numpy_generator(seed, f"{purpose}/frames", index)
        scene, things, placed = self._choose(split, chooser, generator)
        caption = text.caption(scene, things, chooser)
        return shapes.Clip(
            self._film(scene, things, placed, generator), caption, join(scene, things)
        )

    def render(self, truth: Mapping[str, str], generator: np.random.Generator) -> NDArray[np.uint8]:
        """Draw frames (T, H, W, 3) in which `truth` holds; the generator decides the rest."""
        scene, things = separate(truth)
        return self._film(scene, things, self._place(things, generator), generator)

    def parse(self, frames_THWC: NDArray[np.uint8]) -> dict[str, str]:
        """Read every attribute out of frames of any size; "unknown" for what cannot be read.

        Wrong frames may hold things that no clip does: their number is then "many".
        """
        scene, things = reader.parse(frames_THWC, fps=self.fps)
        return join(scene, things)

    def _choose(
        self, split: str, chooser: np.random.Generator, generator: np.random.Generator
    ) -> tuple[str, list[dict[str, str]], _Placed]:
        """Draw a scene and things, others if these are in each other's way wherever they are."""
        number = self.numbers[int(chooser.integers(len(self.numbers)))]
        for _ in range(_CASTS):
            scene, things = _cast(number, split, chooser)
            placed = self._place(things, generator)
            if placed.free >= _FREE:
                break
        return scene, things, placed

    def _place(self, things: Sequence[Thing], generator: np.random.Generator) -> _Placed:
        """Draw where things go until all are free for long enough, or the best of many tries."""
        tries = []
        for _ in range(_PLACES):
            jitter = 1 + 0.04 * generator.uniform(-1, 1, len(things))
            diameters = [DIAMETER[t["size"]] * j for t, j in zip(things, jitter, strict=True)]
            draws = generator.uniform(-1, 1, (len(things), 4))
            paths = self._paths(things, diameters, draws, np.arange(81) / 16)
            tries.append(_Placed(self._free(paths, diameters), diameters, draws))
            if tries[-1].free >= _FREE:
                break
        return max(tries, key=lambda placed: placed.free)

    def _paths(
        self,
        things: Sequence[Thing],
        diameters: Sequence[float],
        draws_N4: Float64,
        times_T: Float64,
    ) -> list[draw.Path]:
        return [
            draw.path(
                thing["motion"],
                diameter=diameter,
                times_T=times_T,
                height=self.height,
                width=self.width,
                draws=draws,
                wander=1.0 if len(things) == 1 else _WANDER,
            )
            for thing, diameter, draws in zip(things, diameters, draws_N4, strict=True)
        ]

    def _free(self, paths: Sequence[draw.Path], diameters: Sequence[float]) -> float:
        """Return the least share of the time in which an object is whole and touches no other."""
        unit = min(self.height, self.width)
        x_NT = np.stack([p.x_T for p in paths])
        y_NT = np.stack([p.y_T for p in paths])
        reach_N = _REACH * unit * np.asarray(diameters)
        room_NT = np.minimum.reduce([x_NT, self.width - x_NT, y_NT, self.height - y_NT])
        apart_NNT = np.hypot(x_NT[:, None] - x_NT, y_NT[:, None] - y_NT)
        is_apart_NNT = apart_NNT > (reach_N[:, None] + reach_N)[..., None]
        is_apart_NNT |= np.eye(len(paths), dtype=bool)[..., None]
        free_NT = is_apart_NNT.all(axis=1) & (room_NT > reach_N[:, None])
        return float(free_NT.mean(axis=1).min())

    def _film(
        self, scene: str, things: Sequence[Thing], placed: _Placed, generator: np.random.Generator
    ) -> NDArray[np.uint8]:
        canvas = scenes.Canvas(self.height, self.width, np.arange(self.num_frames) / self.fps)
        paths = self._paths(things, placed.diameters, placed.draws_N4, canvas.times_T)
        objects = [
            (draw.sprites(thing["shape"], thing["colour"], diameter * canvas.unit, path), path)
            for thing, diameter, path in zip(things, placed.diameters, paths, strict=True)
        ]
        return film(scenes.paint(scene, canvas, generator), objects)


def one(**sizes: int) -> World:
    """Return the world of clips with one object: `fastvideo.worlds.trio:one`."""
    return World(**sizes, numbers=(1,))


def two(**sizes: int) -> World:
    """Return the world of clips with two objects."""
    return World(**sizes, numbers=(2,))


def three(**sizes: int) -> World:
    """Return the world of clips with three objects."""
    return World(**sizes, numbers=(3,))


@dataclass(frozen=True)
class _Placed:
    """Where objects go: four draws and a diameter in shorter sides for each."""

    free: float
    diameters: Sequence[float]
    draws_N4: Float64


def join(scene: str, things: Sequence[Thing]) -> dict[str, str]:
    """Write a scene and its things as the values of attributes."""
    order = shapes.ATTRIBUTES["colour"]
    things = sorted(things, key=lambda thing: order.index(thing["colour"]))
    if not things:
        return dict.fromkeys(ATTRIBUTES, UNKNOWN) | {"scene": scene}
    number = NUMBERS[len(things) - 1] if len(things) <= len(NUMBERS) else "many"
    truth = {"number": number, "scene": scene, "colour": "+".join(t["colour"] for t in things)}
    for name in OF_EACH:
        truth[name] = "+".join(f"{thing['colour']} {thing[name]}" for thing in things)
    return truth


def separate(truth: Mapping[str, str]) -> tuple[str, list[dict[str, str]]]:
    """Return the scene and the things of a truth; `ValueError` for what no clip shows."""
    things = {colour: {"colour": colour} for colour in truth.get("colour", "").split("+")}
    for name in OF_EACH:
        for part in truth.get(name, "").split("+"):
            colour, _, value = part.partition(" ")
            if colour not in things or name in things[colour]:
                raise ValueError(
                    f"{name} {part!r} must be of a colour of its own of {', '.join(things)}"
                )
            things[colour][name] = value
    scene, listed = truth.get("scene", ""), list(things.values())
    for thing in listed:
        shapes.check({**thing, "scene": scene})
    for name, value in join(scene, listed).items():
        if truth.get(name) != value:
            raise ValueError(f"{name} {truth.get(name)!r} must be {value!r}, as its things are")
    return scene, listed


def _cast(
    number: int, split: str, chooser: np.random.Generator
) -> tuple[str, list[dict[str, str]]]:
    """Draw a scene and things of different colours, each a combination of the split."""
    legal = shapes.ATTRIBUTES["scene"]
    scene = legal[int(chooser.integers(len(legal)))]
    left = [truth for truth in shapes.combinations(split) if truth["scene"] == scene]
    things = []
    for _ in range(number):
        chosen = left[int(chooser.integers(len(left)))]
        things.append({name: chosen[name] for name in ("colour", *OF_EACH)})
        left = [truth for truth in left if truth["colour"] != chosen["colour"]]
    return scene, things
