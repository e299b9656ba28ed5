"""What every scheduler file must keep to; a new file is found and tested by its name."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch

from fastvideo import flow, registry, schedulers
from fastvideo.sample import sample

NAMES = registry.names("fastvideo.schedulers")
NUM_STEPS = [*range(1, 11), 25, 50]


def legal(scheduler: schedulers.Scheduler[Any]) -> list[schedulers.Grid]:
    grids = []
    for n in NUM_STEPS:
        try:
            grids.append(scheduler.grid(n))
        except ValueError as error:
            assert "nearest" in str(error)
    assert grids, "a scheduler must accept some number of steps of the usual ones"
    return grids


@pytest.fixture(params=NAMES)
def scheduler(request: pytest.FixtureRequest) -> schedulers.Scheduler[Any]:
    return schedulers.create(request.param, {})


def test_every_grid_falls_strictly_from_at_most_1_to_0(scheduler):
    for grid in legal(scheduler):
        assert grid.sigmas.dtype == torch.float64
        assert grid.sigmas.shape == (grid.num_steps + 1,)
        assert 0 < grid.sigmas[0] <= 1
        assert grid.sigmas[-1] == 0
        assert (grid.sigmas.diff() < 0).all()


def test_every_time_is_near_1000_sigma_and_falls(scheduler):
    for grid in legal(scheduler):
        assert grid.timesteps.dtype == torch.float32
        assert (grid.timesteps - 1000 * grid.sigmas[:-1]).abs().max() < 1.001  # some truncate
        assert (grid.timesteps.diff() < 0).all()


def test_straight_flow_is_solved_exactly(scheduler):
    clean, noise = torch.randn(2, 1, 3, 2, 4, 4, generator=torch.manual_seed(0)).double()
    for grid in legal(scheduler):
        x = flow.mix(clean, noise, grid.sigmas[0])
        state = scheduler.init(grid)
        for i in range(grid.num_steps):
            # the straight path through x to the clean end, whatever noise was mixed in before
            v = (x - clean) / grid.sigmas[i]
            state, x = scheduler.step(state, x, v, i, noise=torch.randn_like(x))
        torch.testing.assert_close(x, clean, rtol=0, atol=1e-12)


def _bent(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.sin(3 * x + t[..., None, None, None] / 200)


def test_run_resumed_from_any_step_equals_the_uninterrupted_one_bitwise(scheduler):
    grid = legal(scheduler)[-1] if scheduler.renoise else scheduler.grid(6)
    common: dict[str, Any] = {"num_steps": grid.num_steps, "seed": 3}
    latents = torch.randn(2, 3, 2, 4, 4, generator=torch.manual_seed(1))
    steps = list(sample(_bent, scheduler, latents=latents, **common))
    for step in steps[:-1]:
        state = _through_a_file(step.state)
        rest = sample(_bent, scheduler, latents=step.x, state=state, start=step.index + 1, **common)
        *_, last = rest
        assert torch.equal(last.x, steps[-1].x)


def _through_a_file(state: Any) -> Any:
    """Store and load a state as plain tensors, and nothing but."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    file = io.BytesIO()
    torch.save(fields, file)
    file.seek(0)
    return type(state)(**torch.load(file, weights_only=True))


def test_step_changes_neither_its_inputs_nor_the_old_state(scheduler):
    grid = legal(scheduler)[-1]
    x, v, noise = torch.randn(3, 1, 3, 2, 4, 4, generator=torch.manual_seed(0))
    before, state = (x.clone(), v.clone()), scheduler.init(grid)
    first = scheduler.step(state, x, v, 0, noise=noise)[1]
    again = scheduler.step(state, x, v, 0, noise=noise)[1]
    assert torch.equal(x, before[0])
    assert torch.equal(v, before[1])
    assert torch.equal(first, again)


def test_unknown_argument_names_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"'unipc' takes no 'shfit'; did you mean 'shift'\?"):
        schedulers.create("unipc", {"shfit": 5.0})


def test_unknown_scheduler_names_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"scheduler 'unpc' is unknown; did you mean 'unipc'\?"):
        schedulers.create("unpc", {})


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("shift", [0, -1.0])
def test_shift_that_is_not_positive_is_refused(name, shift):
    with pytest.raises(ValueError, match="must be positive"):
        schedulers.create(name, {"shift": shift})


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_no_steps_are_refused(name):
    with pytest.raises(ValueError, match="num_inference_steps 0 must be at least 1"):
        schedulers.create(name, {}).grid(0)
