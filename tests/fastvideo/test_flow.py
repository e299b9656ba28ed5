"""The arithmetic of the straight path holds together."""

from __future__ import annotations

import pytest
import torch

from fastvideo import flow

CLEAN, NOISE = torch.randn(2, 2, 3, 4, 2, 2, generator=torch.manual_seed(0)).double()


def test_path_runs_from_clean_to_noise():
    assert torch.equal(flow.mix(CLEAN, NOISE, 0.0), CLEAN)
    assert torch.equal(flow.mix(CLEAN, NOISE, 1.0), NOISE)


def test_velocity_is_the_slope_of_the_path_in_sigma():
    slope = (flow.mix(CLEAN, NOISE, 0.6) - flow.mix(CLEAN, NOISE, 0.4)) / 0.2
    torch.testing.assert_close(slope, flow.velocity(CLEAN, NOISE))


def test_the_clean_end_comes_back_from_any_point_with_a_sigma_per_frame():
    sigma = flow.per_frame(torch.rand(2, 4, generator=torch.manual_seed(1), dtype=torch.float64))
    x, v = flow.mix(CLEAN, NOISE, sigma), flow.velocity(CLEAN, NOISE)
    torch.testing.assert_close(flow.clean_from(x, v, sigma), CLEAN)


def test_per_frame_accepts_one_sigma_for_the_clip():
    assert flow.per_frame(torch.zeros(2, 1)).shape == (2, 1, 1, 1, 1)


def test_shift_keeps_the_ends_and_is_undone_by_its_inverse():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = flow.shift(u, 5.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] > u[1:-1]).all()
    torch.testing.assert_close(flow.shift(shifted, 1 / 5.0), u)


def test_self_forcing_list_warped_by_shift_5_is_the_known_one():
    warped = [flow.timestep(flow.shift(t / 1000, 5.0)) for t in (1000, 750, 500, 250)]
    assert warped == pytest.approx([1000, 937.5, 2500 / 3, 625])
