"""Samplers, one per file: where on the noise path to evaluate a model, and how to move between.

A scheduler is a frozen value with three pure functions. Nothing is kept in it between steps, so one
object serves every request, and a run resumes from any step that it once yielded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fastvideo import flow, registry

S = TypeVar("S")


@dataclass(frozen=True)
class Grid:
    """Where a model is evaluated: sigmas, and the timesteps the model is conditioned on.

    `sigmas` is float64 (N+1,), strictly falling to 0, or to the end of a part of the path;
    `timesteps` is float32 (N,), in 0..1000.
    The two are kept apart because published samplers truncate or look up one and not the other.
    """

    sigmas: Tensor
    timesteps: Tensor

    @property
    def num_steps(self) -> int:
        """Number of model evaluations N."""
        return len(self.timesteps)


class Scheduler(Protocol[S]):
    """What every file in this folder exports under the name `Scheduler`."""

    @property
    def renoise(self) -> bool:
        """Whether `step` wants fresh standard normal noise, shaped as x."""
        ...

    def grid(self, num_steps: int) -> Grid:
        """Return the evaluation points; raise `ValueError` if this scheduler has none for N."""
        ...

    def init(self, grid: Grid) -> S:
        """Return the state before the first step: a frozen dataclass of plain tensors."""
        ...

    def step(
        self, state: S, x: Tensor, v: Tensor, i: int, *, noise: Tensor | None = None
    ) -> tuple[S, Tensor]:
        """Move x from sigma i to sigma i+1, given its velocity v in x's dtype."""
        ...


def create(name: str, args: Mapping[str, Any]) -> Scheduler[Any]:
    """Build the scheduler `name` (or `module:object`); `ValueError` for an unknown argument.

    Two of the same name and arguments, given or by default, are equal.
    """
    kind = registry.load(__name__, name, "Scheduler")
    legal = [f.name for f in dataclasses.fields(kind)]
    for key in args:
        if key not in legal:
            hint = registry.did_you_mean(key, legal)
            raise ValueError(
                f"scheduler {name!r} takes no {key!r}{hint} (takes: {', '.join(legal)})"
            )
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in args.items()}
    return cast(Scheduler[Any], kind(**values))


def make_grid(sigmas: Tensor, timesteps: Tensor) -> Grid:
    """Append the clean end and round sigmas to float32, the precision published samplers keep."""
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    assert bool((sigmas.diff() < 0).all()), "sigmas must fall strictly to 0"
    return Grid(sigmas.float().double(), timesteps.float())


def part_grid(sigmas: Sequence[float]) -> Grid:
    """Return a part of the path: given sigmas (N+1,) that need not end at 0, and 1000 of each.

    The first is kept off 1, where log((1 - sigma) / sigma), which samplers step in, is infinite.
    """
    ends = torch.tensor([min(sigmas[0], 1 - 1e-6), *sigmas[1:]], dtype=torch.float64)
    assert bool((ends.diff() < 0).all()), "sigmas must fall strictly"
    return Grid(ends, flow.timestep(ends[:-1]).float())


def check_num_steps(num_steps: int) -> None:
    """Raise `ValueError` unless a model is to be evaluated at least once."""
    if num_steps < 1:
        raise ValueError(f"num_inference_steps {num_steps} must be at least 1; nearest: 1")


def check_shift(shift: float) -> None:
    """Raise `ValueError` unless `shift` maps [0, 1] onto itself in order."""
    if not shift > 0:
        raise ValueError(f"scheduler argument shift {shift} must be positive; 1 leaves times alone")
