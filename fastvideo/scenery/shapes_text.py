"""Captions of the shapes world: a small grammar and its inverse."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

SIZES = {"small": ("small", "tiny", "little"), "big": ("big", "large", "huge")}
COLOURS = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
}
SHAPES = {
    "ball": ("ball", "circle", "sphere"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
SCENES = {
    "day": ("by day", "in the daytime", "on a sunny day", "under a bright sky"),
    "night": ("at night", "on a dark night", "under the moon", "in the moonlight"),
    "meadow": ("in a meadow", "over the hills", "above the grass", "in a grassy field"),
    "sea": ("over the sea", "above the ocean", "over the waves", "by the sea"),
}
# each motion as (participle, finite verb)
MOTIONS = {
    "left": (
        ("moving left", "moves left"),
        ("moving to the left", "moves to the left"),
        ("drifting left", "drifts left"),
        ("sliding leftward", "slides leftward"),
        ("going to the left", "goes to the left"),
    ),
    "right": (
        ("moving right", "moves right"),
        ("moving to the right", "moves to the right"),
        ("drifting right", "drifts right"),
        ("sliding rightward", "slides rightward"),
        ("going to the right", "goes to the right"),
    ),
    "up": (
        ("moving up", "moves up"),
        ("rising", "rises"),
        ("drifting up", "drifts up"),
        ("floating upward", "floats upward"),
        ("going up", "goes up"),
    ),
    "down": (
        ("moving down", "moves down"),
        ("falling", "falls"),
        ("drifting down", "drifts down"),
        ("sinking downward", "sinks downward"),
        ("going down", "goes down"),
    ),
    "bouncing": (
        ("bouncing", "bounces"),
        ("bouncing up and down", "bounces up and down"),
        ("hopping", "hops"),
        ("jumping up and down", "jumps up and down"),
    ),
}
FORMS = (
    "a {thing} {doing} {where}",
    "{where}, a {thing} {does}",
    "{thing} {doing} {where}",
    "a {thing} {does} {where}",
    "a video of a {thing} {doing} {where}",
)

# words that say a value; every other word of the grammar says nothing by itself
_KEYWORDS: dict[str, dict[str, str]] = {
    "size": {"small": "small tiny little", "big": "big large huge"},
    "colour": {name: " ".join(words) for name, words in COLOURS.items()},
    "shape": {name: " ".join(f"{w} {w}s" for w in words) for name, words in SHAPES.items()},
    "scene": {
        "day": "day daytime sunny bright daylight",
        "night": "night moon moonlight dark",
        "meadow": "meadow hills grass grassy field",
        "sea": "sea ocean waves water",
    },
    "motion": {
        "left": "left leftward leftwards",
        "right": "right rightward rightwards",
        "up": "up upward upwards rising rises",
        "down": "down downward downwards falling falls sinking sinks",
        "bouncing": "bouncing bounces hopping hops jumping jumps",
    },
}


def caption(truth: Mapping[str, str], generator: np.random.Generator) -> str:
    """Say the truth in one of the grammar's ways."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(generator.integers(len(options)))]

    form, size, colour = pick(FORMS), pick(SIZES[truth["size"]]), pick(COLOURS[truth["colour"]])
    shape, where = pick(SHAPES[truth["shape"]]), pick(SCENES[truth["scene"]])
    ways = MOTIONS[truth["motion"]]
    doing, does = ways[int(generator.integers(len(ways)))]
    return form.format(thing=f"{size} {colour} {shape}", doing=doing, does=does, where=where)


def truth_of(text: str) -> dict[str, str]:
    """Return the attributes that a caption names; the inverse of `caption` on its own captions.

    An attribute that the text does not name is absent. Raises `ValueError` if the text names two
    values of one attribute; "up and down" beside a word for bouncing is bouncing.
    """
    words = set(re.findall(r"[a-z]+", text.lower()))
    truth: dict[str, str] = {}
    for attribute, values in _KEYWORDS.items():
        named = [value for value, keys in values.items() if words & set(keys.split())]
        if "bouncing" in named:
            named = [value for value in named if value not in ("up", "down")]
        if len(named) > 1:
            raise ValueError(
                f"caption {text!r} names more than one {attribute}: {', '.join(named)}; "
                "a clip of this world has exactly one"
            )
        if named:
            truth[attribute] = named[0]
    return truth


def words() -> list[str]:
    """List every word and sign that `caption` can say, sorted."""
    phrases = [form.replace("{", " ").replace("}", " ") for form in FORMS]
    for table in (SIZES, COLOURS, SHAPES, SCENES):
        phrases += [phrase for options in table.values() for phrase in options]
    phrases += [way for ways in MOTIONS.values() for pair in ways for way in pair]
    slots = {"thing", "doing", "does", "where"}
    return sorted({w for p in phrases for w in re.findall(r"[a-z]+|,", p)} - slots)
