"""Draws are functions of (seed, purpose, step, rank); the numbers here never change."""

from __future__ import annotations

import pytest

from fastvideo import rng

GOLDEN = (4965117183502616098, 7149487397042541585, 8888379592267020169)
NUMPY = [247, 377, 198, 585]


def test_derived_seeds_are_frozen():
    assert rng.derive(0, "latents") == GOLDEN[0]
    assert rng.derive(1, "renoise", step=2) == GOLDEN[1]
    assert rng.derive(-5, "data", step=10**9, rank=7) == GOLDEN[2]


def test_every_argument_matters_and_none_runs_into_the_next():
    calls = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 0, 1), (0, "a/1"), (0, "a", 11)]
    assert len({rng.derive(*call) for call in calls}) == len(calls)


def test_derived_seeds_fit_every_generator():
    assert all(0 <= rng.derive(seed, "x") < 2**63 for seed in range(100))


def test_numpy_draws_are_frozen():
    draw = rng.numpy_generator(0, "world", step=3).integers(0, 1000, 4)
    assert draw.tolist() == NUMPY


def test_one_number_seeds_a_batch_by_counting_up():
    assert rng.clip_seeds(5, 3) == (5, 6, 7)
    assert rng.clip_seeds([9, 2], 2) == (9, 2)


def test_wrong_number_of_seeds_is_refused():
    with pytest.raises(ValueError, match="2 seeds for 3 clips"):
        rng.clip_seeds([1, 2], 3)
