"""What a running stage tells: progress, frames, and at last its result.

Progress bars, streaming and cancellation are what the consumer does with the iterator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastvideo_inference.state import State


@dataclass(frozen=True)
class Progress:
    """`index` of `total` units of a stage are done; a stage begins at 0 and ends at `total`.

    `state`, where there is one, is all that is needed to go on from here later or elsewhere.
    """

    stage: str
    index: int
    total: int
    state: State | None = None


@dataclass(frozen=True)
class Chunk:
    """Finished frames, T H W 3 uint8; `start` is the place of the first one in the clip."""

    stage: str
    start: int
    frames: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Done:
    """The end of a stage: its state, with what the stage gives filled in."""

    stage: str
    state: State


Event: TypeAlias = Progress | Chunk | Done
