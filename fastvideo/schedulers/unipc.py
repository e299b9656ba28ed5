"""UniPC of order 2 on the flow path, Wan's default sampler (Zhao et al. 2302.04867, variant B2(h)).

Each evaluation first corrects the point it was made at, then predicts the next one, both by a
polynomial in lambda = log((1 - sigma) / sigma) through the last estimates of the clean clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastvideo import flow
from fastvideo.schedulers import Grid, check_num_steps, check_shift, make_grid

ORDER = 2


@dataclass(frozen=True)
class State:
    """The grid, the last corrected x, and the last one or two clean estimates (newest last)."""

    sigmas: Tensor
    x: Tensor | None = None
    cleans: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Scheduler:
    """UniPC as diffusers' UniPCMultistepScheduler runs it for Wan.

    That is: solver_order 2, bh2, predict_x0, flow_prediction, use_flow_sigmas, lower_order_final,
    final sigma 0; `shift` is its flow_shift. The grid is `start`..`stop` in N+1 even points without
    the last, shifted. diffusers runs 1..0.001; Wan's own code runs 0.999..0 (set both to get it).
    Networks are conditioned on whole timesteps, 1000 sigma truncated, while sigmas stay exact.
    """

    shift: float = 1.0
    start: float = 1.0
    stop: float = 1 / flow.NUM_TRAIN_TIMESTEPS
    renoise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a shift or ends that do not give a falling grid in (0, 1]."""
        check_shift(self.shift)
        if not 0 <= self.stop < self.start <= 1:
            raise ValueError(
                f"unipc start {self.start} and stop {self.stop} must satisfy 0 <= stop < start <= 1"
            )

    def grid(self, num_steps: int) -> Grid:
        """Return `num_steps` evaluation points."""
        check_num_steps(num_steps)
        # not torch.linspace: its rounding, mirrored about the middle, would truncate 334 to 333
        stride = (self.stop - self.start) / num_steps
        u = torch.arange(num_steps, dtype=torch.float64) * stride + self.start
        sigmas = flow.shift(u, self.shift)
        if sigmas[0] > 1 - 1e-6:
            sigmas[0] -= 1e-6  # lambda is infinite at sigma 1
        return make_grid(sigmas, flow.timestep(sigmas).trunc())

    def init(self, grid: Grid) -> State:
        """Return the state before the first step."""
        return State(grid.sigmas)

    def step(
        self, state: State, x: Tensor, v: Tensor, i: int, *, noise: Tensor | None = None
    ) -> tuple[State, Tensor]:
        """Correct x at sigma i with its own velocity, then predict x at sigma i+1."""
        sigmas: list[float] = state.sigmas.tolist()
        clean = flow.clean_from(x, v, sigmas[i])
        if state.x is not None:
            x = _correct(state.x, state.cleans, clean, sigmas[: i + 1])
        cleans = (*state.cleans, clean)[-ORDER:]
        is_last = sigmas[i + 1] == 0  # a part of a grid, such as a teacher's, may end before
        return (
            State(state.sigmas, x, cleans),
            _predict(x, cleans[-1:] if is_last else cleans, sigmas[: i + 2]),
        )


def _predict(x: Tensor, cleans: tuple[Tensor, ...], sigmas: list[float]) -> Tensor:
    """UniP: go from sigmas[-2] to sigmas[-1] by the clean estimates at sigmas[-2], sigmas[-3]."""
    target = cleans[-1]
    if len(cleans) == ORDER:
        target = target + 0.5 / _ratio(sigmas) * (cleans[0] - cleans[1])
    return _exponential_step(x, target, sigmas)


def _correct(x: Tensor, cleans: tuple[Tensor, ...], clean: Tensor, sigmas: list[float]) -> Tensor:
    """UniC: go from sigmas[-2] to sigmas[-1] again, now also knowing the clean estimate there."""
    newest = cleans[-1]
    if len(cleans) == 1:
        return _exponential_step(x, newest + 0.5 * (clean - newest), sigmas)
    ratio = _ratio(sigmas)
    b1, b2 = _moments(_lambda(sigmas[-1]) - _lambda(sigmas[-2]))
    rho1 = (b1 - b2) / (1 - ratio)  # solves rho1 + rho2 = b1 and ratio rho1 + rho2 = b2
    rho2 = b1 - rho1
    target = newest + rho1 / ratio * (cleans[0] - newest) + rho2 * (clean - newest)
    return _exponential_step(x, target, sigmas)


def _exponential_step(x: Tensor, target: Tensor, sigmas: list[float]) -> Tensor:
    """Solve the linear part exactly: DDIM with `target` as the clean end of the path."""
    before, after = sigmas[-2:]
    gain = (1 - after) * math.expm1(_lambda(before) - _lambda(after))
    return after / before * x - gain * target


def _ratio(sigmas: list[float]) -> float:
    """Return r_1: the step before in units of this one, in lambda; negative."""
    older, before, after = map(_lambda, sigmas[-3:])
    return (older - before) / (after - before)


def _moments(h: float) -> tuple[float, float]:
    """Return b_1, b_2 of B2(h): k! h phi_{k+1}(-h) / (1 - e^-h), signs folded in."""
    b = math.expm1(-h)
    first = b / -h - 1
    second = first / -h - 0.5
    return first / b, 2 * second / b


def _lambda(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)
