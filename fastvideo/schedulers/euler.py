"""Euler steps along the flow, on the grid of diffusers' FlowMatchEulerDiscreteScheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastvideo import flow
from fastvideo.schedulers import Grid, check_num_steps, check_shift, make_grid


@dataclass(frozen=True)
class State:
    """Nothing but the grid: Euler remembers no past."""

    sigmas: Tensor


@dataclass(frozen=True)
class Scheduler:
    """x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v.

    The last evaluation is at shift(shift(0.001)), not shift(0.001): diffusers reads the smallest
    sigma from a table that is shifted already, and shifts the grid again. N=3 under shift 8 is
    therefore 1000, 890, 60, far from what a few-step model was trained on; use `few_step` there.
    """

    shift: float = 1.0
    renoise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def grid(self, num_steps: int) -> Grid:
        """Return `num_steps` evaluation points from sigma 1 to the doubly shifted 0.001."""
        check_num_steps(num_steps)
        smallest = flow.shift(1 / flow.NUM_TRAIN_TIMESTEPS, self.shift)
        u = torch.linspace(1.0, smallest, num_steps, dtype=torch.float64)
        sigmas = flow.shift(u, self.shift)
        return make_grid(sigmas, flow.timestep(sigmas.float()))

    def init(self, grid: Grid) -> State:
        """Return the state before the first step."""
        return State(grid.sigmas)

    def step(
        self, state: State, x: Tensor, v: Tensor, i: int, *, noise: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Move x from sigma i to sigma i+1."""
        return state, x + float(state.sigmas[i + 1] - state.sigmas[i]) * v
