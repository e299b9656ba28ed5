"""Our schedulers follow diffusers' step by step, fed with the same random velocities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvideo.schedulers import Scheduler, euler, unipc

diffusers = pytest.importorskip("diffusers")

NUM_STEPS = [*range(1, 11), 25, 50]
SHIFTS = [1.0, 3.0, 5.0, 8.0, 16.0]


def _worst(ours: Scheduler[Any], theirs: Any, num_steps: int, dtype: torch.dtype) -> float:
    """Return the largest difference of x over the run, relative to x's largest value."""
    random = torch.manual_seed(num_steps)
    grid = ours.grid(num_steps)
    state = ours.init(grid)
    x = y = torch.randn(1, 2, 3, 4, 4, generator=random, dtype=dtype)
    worst = 0.0
    theirs.set_begin_index(0)
    for i, t in enumerate(theirs.timesteps):
        v = torch.randn(x.shape, generator=random, dtype=dtype)
        x = theirs.step(v, t, x).prev_sample
        state, y = ours.step(state, y, v, i)
        worst = max(worst, float((x - y).abs().max() / x.abs().max()))
    return worst


def _unipc(shift: float, num_steps: int) -> Any:
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    theirs.set_timesteps(num_steps)
    return theirs


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_unipc_grid_is_equal(num_steps, shift):
    theirs, grid = _unipc(shift, num_steps), unipc.Scheduler(shift=shift).grid(num_steps)
    assert torch.equal(grid.timesteps.long(), theirs.timesteps)
    assert torch.equal(grid.sigmas.float(), theirs.sigmas)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_unipc_steps_agree_to_1e_14_in_float64(num_steps, shift):
    theirs = _unipc(shift, num_steps)
    theirs.sigmas = theirs.sigmas.double()  # its coefficients take their dtype from here
    assert _worst(unipc.Scheduler(shift=shift), theirs, num_steps, torch.float64) < 1e-14


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_unipc_steps_agree_to_2e_6_in_float32(num_steps, shift):
    # theirs computes coefficients in float32, which costs it up to 1e-6 over 50 steps
    theirs = _unipc(shift, num_steps)
    assert _worst(unipc.Scheduler(shift=shift), theirs, num_steps, torch.float32) < 2e-6


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_euler_agrees_in_grid_and_steps_to_1e_6(num_steps, shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(num_steps)
    ours = euler.Scheduler(shift=shift)
    grid = ours.grid(num_steps)
    torch.testing.assert_close(grid.sigmas.float(), theirs.sigmas, rtol=0, atol=1e-7)
    torch.testing.assert_close(grid.timesteps, theirs.timesteps, rtol=0, atol=1e-4)
    assert _worst(ours, theirs, num_steps, torch.float32) < 1e-6
