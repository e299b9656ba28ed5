"""Intervals of paired differences against hand computations, tables and simulated truth."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from fastvideo_inference.paired import Estimate, difference, ratio, t_quantile


@pytest.mark.parametrize(
    ("dof", "published"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (10, 2.228139), (81, 1.989686)],
)
def test_quantiles_of_students_t_are_those_of_the_tables(dof: int, published: float):
    assert t_quantile(0.975, dof) == pytest.approx(published, abs=1e-6)


def test_many_degrees_of_freedom_are_the_normal_distribution():
    assert t_quantile(0.975, 100_000) == pytest.approx(1.959964, abs=1e-4)
    assert t_quantile(0.95, 10) == pytest.approx(1.812461, abs=1e-6)


def test_prompts_that_stand_alone_give_students_interval_by_hand():
    # differences 1 0 0 1 1: mean 0.6, variance 0.3, standard error sqrt(0.06), t(4) 2.776445
    found = difference([1, 1, 0, 1, 1], [0, 1, 0, 0, 0], groups=range(5))
    half = 2.776445 * math.sqrt(0.06)
    assert found.value == pytest.approx(0.6)
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-6)


def test_prompts_of_one_group_give_the_interval_of_clusters_by_hand():
    # groups: A +0.2 +0.2, B 0, C -0.2; value 0.2/4; residuals 0.3, -0.05, -0.25; t(2) 4.302653
    found = difference([0.6, 0.8, 1.0, 0.4], [0.4, 0.6, 1.0, 0.6], groups="AABC")
    half = 4.302653 * math.sqrt(3 / 2 * (0.09 + 0.0025 + 0.0625)) / 4
    assert found.value == pytest.approx(0.05)
    assert (found.low, found.high) == pytest.approx((0.05 - half, 0.05 + half), abs=1e-6)


def test_asking_the_same_again_does_not_narrow_the_interval():
    draw = np.random.default_rng(0)
    ours, base = draw.random(12).tolist(), draw.random(12).tolist()
    once = difference(ours, base, groups=range(12))
    twice = difference(ours * 2, base * 2, groups=[*range(12)] * 2)
    assert (twice.value, twice.low, twice.high) == pytest.approx((once.value, once.low, once.high))
    believed = difference(ours * 2, base * 2, groups=range(24))
    assert believed.high - believed.low < 0.8 * (once.high - once.low)


def test_pairing_removes_what_both_share():
    draw = np.random.default_rng(1)
    hard = draw.random(40)
    ours, base = hard + 0.1 + 0.01 * draw.random(40), hard
    found = difference(ours.tolist(), base.tolist(), groups=range(40))
    apart = 1.96 * math.sqrt((statistics.variance(ours) + statistics.variance(base)) / 40)
    assert found.low > 0.1 and found.high - found.low < 0.1 * apart


def test_a_ratio_is_that_of_the_sums_by_hand():
    # 3/6; residuals 1 - 0.5 * 1 = 0.5 and 2 - 0.5 * 5 = -0.5; t(1) 12.706205
    found = ratio([1.0, 2.0], [1.0, 5.0])
    half = 12.706205 * math.sqrt(2 * (0.25 + 0.25)) / 6
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_an_interval_holds_the_truth_95_times_in_100():
    """Clusters of one to four prompts whose differences share what is their cluster's own."""
    draw, hits, truth = np.random.default_rng(2), 0, 0.03
    for _ in range(400):
        groups = np.repeat(np.arange(40), draw.integers(1, 5, 40))
        own = draw.normal(0, 0.1, 40)[groups]
        ours = truth + own + draw.normal(0, 0.05, len(groups))
        found = difference(ours.tolist(), [0.0] * len(groups), groups=groups.tolist())
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_what_never_varies_has_no_interval():
    assert difference([1, 1], [0, 0], groups="AB") == Estimate(1.0, None, None)
    assert difference([1, 0.5], [0, 0.5], groups="AA") == Estimate(0.5, None, None)


@pytest.mark.parametrize(("tops", "bottoms"), [([], []), ([1.0], []), ([1.0], [0.0])])
def test_nothing_to_compare_is_refused(tops: list[float], bottoms: list[float]):
    with pytest.raises(ValueError, match="a ratio needs pairs with a positive sum"):
        ratio(tops, bottoms)
