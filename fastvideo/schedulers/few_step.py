"""Fixed-sigma (distilled) flow-match scheduler, with fresh noise between steps or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastvideo import flow
from fastvideo.foreign import FASTWAN_SIGMAS
from fastvideo.schedulers import Grid, make_grid


@dataclass(frozen=True)
class State:
    """Nothing but the grid: each step starts from its own estimate of the clean clip."""

    sigmas: Tensor


@dataclass(frozen=True)
class Scheduler:
    """Evaluate exactly at `sigmas`; a model was distilled for these points and no others.

    `renoise=True` predicts the clean clip and noises it afresh to the next sigma (DMD2 2405.14867,
    Self-Forcing 2506.08009, FastWan); `renoise=False` takes the deterministic Euler step.
    `timesteps` are what the network is conditioned on; None is 1000 sigma.
    """

    sigmas: Sequence[float] = FASTWAN_SIGMAS
    timesteps: Sequence[float] | None = None
    renoise: bool = True

    def __post_init__(self) -> None:
        """Refuse a list that does not fall within (0, 1], or times that do not pair with it."""
        ends = [*self.sigmas, 0.0]
        falls = all(a > b for a, b in pairwise(ends))
        if len(ends) == 1 or not falls or ends[0] > 1:
            raise ValueError(
                f"few_step sigmas {list(self.sigmas)} must fall strictly within (0, 1]"
            )
        if self.timesteps is not None and len(self.timesteps) != len(self.sigmas):
            raise ValueError(
                f"few_step has {len(self.timesteps)} timesteps for {len(self.sigmas)} sigmas; "
                "give one for each, or none for 1000 sigma"
            )

    def grid(self, num_steps: int) -> Grid:
        """Return the model's own points; `ValueError` unless `num_steps` is their number."""
        if num_steps != len(self.sigmas):
            raise ValueError(
                f"num_inference_steps {num_steps}: this distilled model takes exactly"
                f" {len(self.sigmas)} steps; nearest: {len(self.sigmas)}"
            )
        sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        if self.timesteps is None:
            return make_grid(sigmas, flow.timestep(sigmas))
        return make_grid(sigmas, torch.tensor(self.timesteps))

    def init(self, grid: Grid) -> State:
        """Return the state before the first step."""
        return State(grid.sigmas)

    def step(
        self, state: State, x: Tensor, v: Tensor, i: int, *, noise: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Move x from sigma i to sigma i+1; `noise` is wanted before every step but the last."""
        sigma, following = state.sigmas[i : i + 2].tolist()
        clean = flow.clean_from(x, v, sigma)
        if following == 0:
            return state, clean
        if not self.renoise:
            return state, x + (following - sigma) * v
        assert noise is not None, "a renoising step needs noise"
        return state, flow.mix(clean, noise, following)
