"""Which few steps a stock scheduler's config can say, held against the stock scheduler itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fastvideo import flow
from fastvideo.formats import diffusers as layout
from fastvideo.model import load
from fastvideo.spec import Scheduler
from fastvideo.stock_few_step import stock_shift, stock_sigmas, tells_sigmas


def shifted(num_steps: int, k: float) -> list[float]:
    """Return the even grid of times from 1 above 0, shifted."""
    return [flow.shift(1 - i / num_steps, k) for i in range(num_steps)]


GRIDS = {
    "ours": [1.0, 0.909091, 0.714286],
    "fastwan": [1.0, 0.756757, 0.521739],
    "self-forcing": [1.0, 0.9375, 0.8333333, 0.625],
    "even": shifted(4, 1.0),
    "four": shifted(4, 3.0),
    "eight": shifted(8, 5.0),
    "two": [1.0, 0.3],
    "one": [1.0],
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_stock_scheduler_with_the_config_takes_these_sigmas(name: str):
    diffusers = pytest.importorskip("diffusers")
    sigmas = GRIDS[name]
    shift, terminal = stock_shift(sigmas)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal)
    theirs.set_timesteps(len(sigmas))
    assert theirs.sigmas.tolist() == pytest.approx([*sigmas, 0.0], rel=0, abs=1e-6)
    assert theirs.timesteps.tolist() == pytest.approx([1000 * s for s in sigmas], rel=0, abs=1e-3)


def test_our_account_of_the_stock_grid_is_the_stock_grid():
    diffusers = pytest.importorskip("diffusers")
    for num_steps, k, terminal in ((2, 1.0, 0.4), (5, 7.0, 0.1), (9, 0.5, 0.2)):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=k, shift_terminal=terminal)
        theirs.set_timesteps(num_steps)
        ours = stock_sigmas(num_steps, k, terminal)
        assert theirs.sigmas.tolist()[:-1] == pytest.approx(ours, rel=0, abs=1e-6)


@pytest.mark.parametrize("sigmas", [[0.9, 0.5], [0.9], [1.0, 0.9, 0.5, 0.4], [1.0, 0.02, 0.01]])
def test_what_no_config_says_is_told(sigmas: list[float]):
    assert stock_shift(sigmas) is None


def test_a_network_that_is_told_other_times_is_not_like_a_stock_one():
    assert tells_sigmas([1.0, 0.5], None) and tells_sigmas([1.0, 0.5], [1000.0, 500.0])
    assert not tells_sigmas([1.0, 0.756757], [1000.0, 757.0])


@pytest.mark.parametrize(
    ("args", "shift", "terminal", "warns"),
    [
        ({"sigmas": [1.0, 0.5], "renoise": False}, 1.0, 0.5, False),
        ({"sigmas": [1.0, 0.5]}, 1.0, 0.5, False),
        ({"sigmas": [0.9, 0.5]}, 1.0, None, True),
        ({"sigmas": [1.0, 0.5], "timesteps": [1000.0, 501.0]}, 1.0, None, True),
    ],
)
def test_a_saved_folder_carries_the_config_or_a_warning_was_given(
    tiny_folder: Path, tmp_path: Path, caplog, args, shift, terminal, warns
):
    model = load(tiny_folder, dtype="float32")
    changed = model.spec.model_copy(update={"scheduler": Scheduler(name="few_step", args=args)})
    with caplog.at_level("WARNING", logger="fastvideo"):
        layout.save(dataclasses.replace(model, spec=changed), tmp_path / "x")
    assert caplog.text.count("give both to the set_timesteps") == warns
    config = json.loads((tmp_path / "x" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["shift"], config["shift_terminal"]) == (shift, terminal)
    assert config["stochastic_sampling"] is args.get("renoise", True)
    assert load(tmp_path / "x", dtype="float32").spec.scheduler.args == args
