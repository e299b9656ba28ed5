"""The few steps of a distilled model as a config of diffusers' FlowMatchEulerDiscreteScheduler.

A stock pipeline tells its scheduler the number of steps and nothing else, so the sigmas must follow
from the config. For N steps that scheduler takes an even grid from 1 to its smallest sigma, shifts
it by k, and then stretches 1 - sigma so that the last one is `shift_terminal`. Every grid of two or
three sigmas from 1 is one of these, and every longer one that is itself a shifted even grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NEAR = 1e-6  # of a sigma, of what float32 keeps there
TIME_NEAR = 1e-3  # of a timestep in 0..1000
_SHIFTS = (0.1, 100.0)  # beyond, its float32 grid is off by more than NEAR


def stock_shift(sigmas: Sequence[float]) -> tuple[float, float | None] | None:
    """Return (`shift`, `shift_terminal`) that make these sigmas of their own number of steps.

    None if no config does, as for a grid that does not start at 1.
    """
    if sigmas[0] != 1.0:
        return None
    if len(sigmas) == 1:
        return 1.0, None
    k = _solve(sigmas) if len(sigmas) > 2 else 1.0
    made = stock_sigmas(len(sigmas), k, sigmas[-1])
    near = all(abs(a - b) <= NEAR for a, b in zip(made, sigmas, strict=True))
    return (k, sigmas[-1]) if near else None


def stock_sigmas(num_steps: int, k: float, terminal: float) -> list[float]:
    """Return what the stock scheduler makes of `shift` k and `shift_terminal`, for 2 steps or more.

    Its smallest sigma is read from a table that is shifted already, and shifted again.
    """
    from fastvideo.flow import shift  # torch comes in here, late

    smallest = shift(0.001, k)
    even = [1 - (1 - smallest) * i / (num_steps - 1) for i in range(num_steps)]
    clean = [1 - shift(u, k) for u in even]
    return [1 - c * (1 - terminal) / clean[-1] for c in clean]


def _solve(sigmas: Sequence[float]) -> float:
    """Find the shift that puts the second sigma in its place; it rises with the shift."""
    low, high = _SHIFTS
    k = 1.0
    for _ in range(60):  # halves the range of 7 natural logarithms down to rounding
        k = math.sqrt(low * high)
        if stock_sigmas(len(sigmas), k, sigmas[-1])[1] < sigmas[1]:
            low = k
        else:
            high = k
    return k


def tells_sigmas(sigmas: Sequence[float], timesteps: Sequence[float] | None) -> bool:
    """Tell whether the timesteps are 1000 sigma, as a stock pipeline does."""
    times = timesteps or [1000 * s for s in sigmas]
    return all(abs(t - 1000 * s) <= TIME_NEAR for t, s in zip(times, sigmas, strict=True))
