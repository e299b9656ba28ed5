"""Captions of the trio world: the words of the shapes world, said of one to three objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastvideo.scenery import shapes_text as text

if TYPE_CHECKING:
    import numpy as np

# with participles or with finite verbs, as the caption of one object is
FORMS = (
    ("{things} {where}", False),
    ("a video of {things} {where}", False),
    ("{where}, {things}", True),
    ("{things} {where}", True),
)


def caption(scene: str, things: Sequence[Mapping[str, str]], generator: np.random.Generator) -> str:
    """Say which things move in a scene; of one thing, as the shapes world does."""
    if len(things) == 1:
        return text.caption({**things[0], "scene": scene}, generator)

    def pick(options: tuple[str, ...]) -> str:
        return options[int(generator.integers(len(options)))]

    form, is_finite = FORMS[int(generator.integers(len(FORMS)))]
    said = []
    for thing in things:
        size, colour = pick(text.SIZES[thing["size"]]), pick(text.COLOURS[thing["colour"]])
        ways = text.MOTIONS[thing["motion"]]
        way = ways[int(generator.integers(len(ways)))][is_finite]
        said.append(f"a {size} {colour} {pick(text.SHAPES[thing['shape']])} {way}")
    joined = " and ".join([", ".join(said[:-1]), said[-1]])
    return form.format(things=joined, where=pick(text.SCENES[scene]))
