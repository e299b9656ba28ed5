"""The simulator against queueing theory, and the engine's rules in it."""

from __future__ import annotations

import statistics

import pytest
from fastvideo_inference.goodput.profile import Estimate
from fastvideo_inference.goodput.simulate import Costs, Pool, arrivals, simulate

pytest.importorskip("simpy")


def pool(stages: str, count: int = 1, *, memory: float | None = None, **seconds: float) -> Pool:
    costs = Costs(
        {name: Estimate(s, s) for name, s in seconds.items()},
        parts={name: (name,) for name in seconds},
        load_s=dict.fromkeys(seconds, 5.0),
        gib=dict.fromkeys(seconds, 1.0),
    )
    return Pool(tuple(stages), count, costs, memory)


def latencies(pools: list[Pool], times: list[float], **how: object) -> list[float]:
    return [one.latency_s for one in simulate(pools, times, **how)]  # type: ignore[arg-type]


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_wait_for_one_worker_is_that_of_a_queue_with_constant_service(load: float):
    times = arrivals(load, 40_000, seed=1)
    one = Pool(("a",), 1, Costs({"a": Estimate(1.0, 1.0)}))
    wait = statistics.mean(latencies([one], times)) - 1.0
    assert wait == pytest.approx(load / (2 * (1 - load)), rel=0.1)  # Pollaczek-Khinchine


@pytest.mark.parametrize("burst", [1.0, 4.0])
def test_gaps_have_the_rate_and_the_variation_that_were_asked(burst: float):
    times = arrivals(2.0, 50_000, seed=0, burst=burst)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.05)
    assert (statistics.stdev(gaps) / statistics.mean(gaps)) ** 2 == pytest.approx(burst, rel=0.1)


def test_split_stages_overlap_and_a_monolith_does_them_in_turn():
    both = {"a": 1.0, "b": 1.0}
    split = [pool("a", **both), pool("b", **both)]
    whole = [pool("ab", 1, **both)]
    loads = 5.0 + 5.0  # of the first clip
    assert latencies(split, [0.0, 0.0])[1] == pytest.approx(3.0 + loads)
    assert latencies(whole, [0.0, 0.0])[1] == pytest.approx(4.0 + loads)


def test_parts_that_do_not_fit_are_loaded_for_each_clip():
    two = {"a": 1.0, "b": 1.0}
    assert latencies([pool("ab", memory=2.0, **two)], [0.0, 100.0]) == [12.0, 2.0]
    assert latencies([pool("ab", memory=1.0, **two)], [0.0, 100.0]) == [12.0, 12.0]


def test_what_passes_before_a_worker_begins_counts_for_each_of_its_clips():
    costs = Costs({"a": Estimate(1.0, 1.0), "b": Estimate(1.0, 1.0)}, dispatch_s=0.25)
    assert latencies([Pool(("a", "b"), 1, costs)], [0.0, 0.0]) == [2.25, 4.5]
    assert latencies([Pool(("a",), 1, costs), Pool(("b",), 1, costs)], [0.0]) == [2.5]


def test_an_end_is_late_that_is_so_in_one_of_ten():
    wide = Pool(("a",), 1, Costs({"a": Estimate(1.0, 3.0)}))
    assert [one.end_s for one in simulate([wide], [0.0], refuse_after_s=2.0)] == [None]


def test_an_early_stage_pauses_while_states_wait_for_a_late_one():
    costs = Costs({"a": Estimate(1.0, 1.0), "b": Estimate(10.0, 10.0)})
    pools = [Pool(("a",), 1, costs), Pool(("b",), 1, costs)]
    times = simulate(pools, [0.0] * 4, in_flight=1)
    assert [one.end_s for one in times] == [11.0, 21.0, 31.0, 41.0]


def test_a_late_end_is_refused():
    one = Pool(("a",), 1, Costs({"a": Estimate(1.0, 1.0)}))
    late = [x.end_s for x in simulate([one], [0.0] * 5, refuse_after_s=2.5)]
    assert late == [1.0, 2.0, None, None, None]


def test_equal_seeds_give_equal_ends_and_another_gives_others():
    wide = Pool(("a",), 1, Costs({"a": Estimate(1.0, 1.5)}))
    times = arrivals(0.5, 50, seed=0)
    assert latencies([wide], times, seed=1) == latencies([wide], times, seed=1)
    assert latencies([wide], times, seed=1) != latencies([wide], times, seed=2)


def test_drawn_seconds_have_the_median_and_the_high_quantile():
    wide = Pool(("a",), 1, Costs({"a": Estimate(1.0, 1.5)}))
    found = sorted(latencies([wide], [100.0 * i for i in range(5000)]))
    assert found[2500] == pytest.approx(1.0, rel=0.03)
    assert found[4500] == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_nonsense_is_refused(rate: float, count: int):
    with pytest.raises(ValueError, match="above zero"):
        arrivals(rate, count, seed=0)
