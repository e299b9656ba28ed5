"""What a training step computes, one file per method.

A method module exports `Config` (a frozen `Strict`) and `Method`. `step` is a generator: the loop
back-propagates each `Update`, updates the roles that it names, and only then resumes the generator.

    class Method:
        def step(self, batch, roles, key):
            yield Update(("student",), loss, {"mse": ...})     # the student steps here
            yield Update(("critic",), critic_loss, {})         # and sees it already updated
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fastvideo import rng

if TYPE_CHECKING:
    from fastvideo.parallel.degrees import ParallelConfig
    from fastvideo_train.recipe import Recipe
    from fastvideo_train.roles import Role

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Wants:
    """A role that a method needs: the kind of network, and the functions that it calls."""

    kind: str
    calls: tuple[str, ...] = ("forward",)
    trainable: bool | None = None  # None leaves it to the recipe


@dataclass(frozen=True)
class Update:
    """One phase of a step: the roles to update, their scalar loss, and numbers for the log."""

    roles: tuple[str, ...]
    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor | float] = field(default_factory=dict)


_MANY_DRAWS = 1 << 20  # numbers; threads take a millisecond to begin, in which one draws 100,000


@dataclass(frozen=True)
class StepKey:
    """Names one micro-batch of one step; every random draw of a method comes from here.

    `lane` counts a step's micro-batches, `first` the clips of this one that other processes hold
    before its own. A clip's draws are its own, so that it sees the same numbers however a
    micro-batch is cut into parts, and no process draws for the clips of another.
    """

    seed: int
    step: int
    num_steps: int
    lane: int = 0
    first: int = 0

    def noise(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Draw float32 standard normal noise (B, ...) for B clips, on the CPU."""
        return self._stacked(torch.randn, purpose, shape)

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Draw float32 numbers (B, ...) in [0, 1) for B clips, on the CPU."""
        return self._stacked(torch.rand, purpose, shape)

    def shared(self, purpose: str) -> float:
        """Draw one number in [0, 1) for all clips of a step."""
        return float(torch.rand((), generator=rng.torch_generator(self.seed, purpose, self.step)))

    def _stacked(
        self, draw: Callable[..., torch.Tensor], purpose: str, shape: tuple[int, ...]
    ) -> torch.Tensor:
        def of_clip(clip: int) -> torch.Tensor:
            key = (self.seed, f"{purpose}/{clip}", self.step, self.lane)
            return draw(shape[1:], generator=rng.torch_generator(*key))

        clips = range(self.first, self.first + shape[0])
        threads = min(torch.get_num_threads(), len(clips))
        if threads == 1 or math.prod(shape) < _MANY_DRAWS:
            return torch.stack([of_clip(clip) for clip in clips])
        with ThreadPoolExecutor(threads) as pool:  # a generator draws in one thread only
            return torch.stack(list(pool.map(of_clip, clips)))


class Method(Protocol):
    """A training method; built as `Method(config)`, stateless between steps."""

    wants: Mapping[str, Wants]

    def check(self, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Raise `ValueError` for a recipe that the method cannot serve, before weights load."""

    def initialise(self, roles: Mapping[str, Role]) -> None:
        """Adjust freshly drawn weights, once, before the first step of a run."""

    def step(self, batch: Batch, roles: Mapping[str, Role], key: StepKey) -> Iterator[Update]:
        """Yield the phases of one micro-batch in the order of the paper."""
