"""What a training step computes, one file per method.

A method module exports `Config` (a frozen `Strict`) and `Method`. `step` is a generator: the loop
back-propagates each `Update`, updates the roles that it names, and only then resumes the generator.

    class Method:
        def step(self, batch, roles, key):
            yield Update(("student",), loss, {"mse": ...})     # the student steps here
            yield Update(("critic",), critic_loss, {})         # and sees it already updated
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fastvideo import rng

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class StepKey:
    """Names one micro-batch of one step; every random draw of a method comes from here.

    `lane` counts micro-batches over ranks and accumulation, so that a step draws the same numbers
    however it is spread over processes.
    """

    seed: int
    step: int
    num_steps: int
    lane: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """Return a CPU generator for one purpose of this micro-batch."""
        return rng.torch_generator(self.seed, purpose, self.step, self.lane)

    def noise(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Draw float32 standard normal noise on the CPU."""
        return rng.noise(shape, seed=self.seed, purpose=purpose, step=self.step, rank=self.lane)

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Draw float32 numbers in [0, 1) on the CPU."""
        return torch.rand(shape, generator=self.generator(purpose))


class Method(Protocol):
    """A training method; built as `Method(config)`, stateless between steps."""

    wants: Mapping[str, Wants]

    def initialise(self, roles: Mapping[str, Role]) -> None:
        """Adjust freshly drawn weights, once, before the first step of a run."""

    def step(self, batch: Batch, roles: Mapping[str, Role], key: StepKey) -> Iterator[Update]:
        """Yield the phases of one micro-batch in the order of the paper."""
