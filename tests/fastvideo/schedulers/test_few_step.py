"""The few-step sampler evaluates where the model was distilled, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from fastvideo import flow
from fastvideo.schedulers.few_step import Scheduler

FASTWAN = (1.0, 0.756757, 0.521739)


def test_fastwan_is_told_757_and_522_at_sigmas_of_its_table():
    grid = Scheduler(sigmas=FASTWAN, timesteps=(1000, 757, 522)).grid(3)
    assert grid.timesteps.tolist() == [1000, 757, 522]
    torch.testing.assert_close(grid.sigmas, torch.tensor([*FASTWAN, 0]).double(), rtol=0, atol=1e-7)


def test_times_are_1000_sigma_unless_given():
    grid = Scheduler(sigmas=[1.0, 0.9375, 0.625]).grid(3)
    assert grid.timesteps.tolist() == [1000, 937.5, 625]


def test_sigmas_of_another_number_need_no_times():
    assert Scheduler(sigmas=(1.0, 0.5)).grid(2).timesteps.tolist() == [1000, 500]


def test_other_numbers_of_steps_are_refused_with_the_right_one():
    with pytest.raises(ValueError, match=r"num_inference_steps 4.* exactly 3 steps"):
        Scheduler().grid(4)


def _one_step(renoise: bool) -> tuple[torch.Tensor, ...]:
    x, v, noise = torch.randn(3, 1, 2, 2, 2, 2, generator=torch.manual_seed(0))
    scheduler = Scheduler(sigmas=(1.0, 0.5), timesteps=None, renoise=renoise)
    grid = scheduler.grid(2)
    return x, v, noise, scheduler.step(scheduler.init(grid), x, v, 0, noise=noise)[1]


def test_renoise_puts_fresh_noise_on_the_clean_estimate():
    x, v, noise, out = _one_step(renoise=True)
    torch.testing.assert_close(out, flow.mix(x - v, noise, 0.5))


def test_without_renoise_the_step_is_euler_and_ignores_noise():
    x, v, _, out = _one_step(renoise=False)
    torch.testing.assert_close(out, x - 0.5 * v)


def test_last_step_returns_the_clean_estimate_without_noise():
    scheduler = Scheduler(sigmas=(0.8,), timesteps=None)
    x, v = torch.randn(2, 1, 2, 2, 2, 2, generator=torch.manual_seed(0))
    out = scheduler.step(scheduler.init(scheduler.grid(1)), x, v, 0)[1]
    torch.testing.assert_close(out, x - 0.8 * v)


@pytest.mark.parametrize("sigmas", [(), (0.5, 0.5), (0.4, 0.6), (1.2,), (0.5, 0.0), (0.5, -0.1)])
def test_sigmas_that_do_not_fall_within_0_and_1_are_refused(sigmas):
    with pytest.raises(ValueError, match="must fall strictly"):
        Scheduler(sigmas=sigmas, timesteps=None)


def test_times_that_do_not_pair_with_sigmas_are_refused():
    with pytest.raises(ValueError, match="2 timesteps for 1 sigmas"):
        Scheduler(sigmas=(1.0,), timesteps=(1000, 500))
