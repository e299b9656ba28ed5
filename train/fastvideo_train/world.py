"""The processes of a run and what they agree on; alone, nothing is sent.

Every function here is called by all processes together, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from fastvideo.parallel.agree import broadcast_object, world_group
from fastvideo.parallel.mesh import Meshes, alone

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All processes of a run."""

    meshes: Meshes = field(default_factory=alone)

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.meshes.degrees.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process logs, writes, validates and prints."""
        return self.meshes.is_first

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether any process raises it."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32, device=self.meshes.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(bool(x) for x in raised.tolist())

    def every(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return [v for v in values if v is not None]

    def means(self, seen: Mapping[str, list[float]]) -> dict[str, float]:
        """Return the mean of each key over all numbers of all processes that have it."""
        joined: dict[str, list[float]] = {}
        for one in self.every(dict(seen)):
            for key, values in one.items():
                joined.setdefault(key, []).extend(values)
        return {key: math.fsum(values) / len(values) for key, values in joined.items()}

    def on_first(self, do: Callable[[], T]) -> T:
        """Let the first process do something; return its result to all, or raise its error.

        What is returned is pickled. On the others a `ValueError` or `OSError` comes as a
        `ValueError`, anything else as a `RuntimeError`, with the same words.
        """
        if self.size == 1:
            return do()
        error: Exception | None = None
        answer: tuple[str, T | None] = ("", None)
        if self.is_first:
            try:
                answer = ("", do())
            except Exception as caught:
                error = caught
                is_users = isinstance(caught, (ValueError, OSError))
                answer = (f"{'user' if is_users else 'own'}:{caught}", None)
        words, result = broadcast_object(answer, world_group(), self.meshes.device)
        if error is not None:
            raise error
        whose, is_failure, text = words.partition(":")
        if is_failure:
            raise ValueError(text) if whose == "user" else RuntimeError(text)
        return result  # type: ignore[return-value]
