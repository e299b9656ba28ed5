"""UniPC's own claims: its published times, and that it is of second order."""

from __future__ import annotations

import pytest
import torch

from fastvideo.schedulers.unipc import Scheduler


def test_three_steps_under_shift_8_are_the_known_times():
    assert Scheduler(shift=8).grid(3).timesteps.tolist() == [999, 941, 800]


def test_ends_of_the_original_code_give_its_known_times():
    original = Scheduler(shift=5, start=0.999, stop=0.0)
    assert original.grid(4).timesteps.tolist() == [999, 937, 833, 624]


def _error(num_steps: int) -> float:
    """Distance from the exact end of x' = x cos(3 s), s from 1 to 0, for sigma = s."""
    scheduler = Scheduler(start=0.99, stop=0.0)
    grid = scheduler.grid(num_steps)
    state, x = scheduler.init(grid), torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    for i in range(num_steps):
        state, x = scheduler.step(state, x, x * torch.cos(3 * grid.sigmas[i]), i)
    exact = torch.exp(-torch.sin(3 * grid.sigmas[0]) / 3)
    return float((x - exact).abs())


def test_halving_the_step_quarters_the_error():
    assert _error(80) < 0.3 * _error(40) < 0.1 * _error(20)


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (1.1, 0.0), (1.0, -0.1)])
def test_ends_outside_0_to_1_are_refused(start, stop):
    with pytest.raises(ValueError, match="0 <= stop < start <= 1"):
        Scheduler(start=start, stop=stop)
