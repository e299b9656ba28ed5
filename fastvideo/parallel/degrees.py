"""How many ways the work is split, and what is wrong with a split; torch-free."""

from __future__ import annotations

import math

from pydantic import Field

from fastvideo.config import Strict

AXES = ("data", "shard", "guidance", "ring", "ulysses")
"""Outermost first: neighbours on the last axis are neighbours in rank, on the fastest links."""
RUNS = {
    "batch": ("data", "shard"),
    "weights": ("shard", "guidance", "ring", "ulysses"),
    "sample": ("guidance", "ring", "ulysses"),
    "sequence": ("ring", "ulysses"),
}
"""Neighbouring axes taken as one: who sees other batches, who holds other parts of the weights, who
works on the same clips, who on the same sequences."""


class ParallelConfig(Strict):
    """Ways to split: their product is the number of processes.

    data: replicas of the weights; each sees batches of its own.
    shard: parts of the weights (FSDP, ZeRO), whose holders see batches of their own too.
    guidance: 2 runs the two forwards of classifier-free guidance on two halves of the devices.
    ring, ulysses: parts of a sequence, whose attention goes by key and value (ring) or by head.
    """

    data: int = Field(default=1, ge=1)
    shard: int = Field(default=1, ge=1)
    guidance: int = Field(default=1, ge=1, le=2)
    ring: int = Field(default=1, ge=1)
    ulysses: int = Field(default=1, ge=1)

    @property
    def world_size(self) -> int:
        """Number of processes that these degrees need."""
        return math.prod(self.of(axis) for axis in AXES)

    def of(self, name: str) -> int:
        """Return the size of an axis or a run of axes."""
        sizes: dict[str, int] = self.model_dump()
        return math.prod(sizes[axis] for axis in RUNS.get(name, (name,)))

    def check(self, world_size: int) -> None:
        """Raise `ValueError` unless there are as many processes as these degrees need."""
        if self.world_size == world_size:
            return
        sizes = {axis: self.of(axis) for axis in AXES}
        words = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        rest = self.world_size // self.data
        nearest = (
            f"data = {world_size // rest} would fit"
            if world_size % rest == 0
            else f"start a multiple of {rest} processes"
        )
        raise ValueError(
            f"parallel degrees {words or 'of 1'} need {self.world_size} processes, not"
            f" {world_size}; {nearest}"
        )

    def filled(self, world_size: int, axis: str = "data") -> ParallelConfig:
        """Return these degrees with `axis`, if it is 1, as large as the processes allow."""
        others = self.world_size
        if self.of(axis) > 1 or world_size % others:
            self.check(world_size)
            return self
        return self.model_copy(update={axis: world_size // others})


def parse(text: str) -> ParallelConfig:
    """Read "ulysses=2,guidance=2"; `ValueError` names an unknown axis."""
    from fastvideo.config import parse as validated

    tree: dict[str, object] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, is_given, value = word.partition("=")
        if not is_given or not value.strip().isdigit():
            raise ValueError(f"parallel {word!r} must be an axis and a number, such as ulysses=2")
        tree[name.strip()] = int(value)
    return validated(ParallelConfig, tree, source="parallel")
