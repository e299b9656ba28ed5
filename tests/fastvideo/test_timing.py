"""What benchmarks share: order, ratios by round, records that can be read back."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastvideo import timing


def test_everyone_is_first_as_often_as_the_others():
    rounds = [timing.in_turn(["a", "b", "c"], i) for i in range(6)]
    assert rounds[0] == ["a", "b", "c"] and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert sorted(r[0] for r in rounds) == ["a", "a", "b", "b", "c", "c"]


def test_a_ratio_is_of_the_same_round_and_not_of_the_medians():
    rounds = [{"ours": 1.0, "peer": 4.0}, {"ours": 2.0, "peer": 6.0}, {"ours": 9.0, "peer": 18.0}]
    assert timing.ratio(rounds, "peer", over="ours") == {"ratio": 3.0, "range": [2.0, 4.0]}
    assert timing.middle([r["ours"] for r in rounds]) == {"s": 2.0, "range": [1.0, 9.0]}


def test_a_call_is_timed_once():
    calls: list[int] = []
    assert timing.timed(lambda: calls.append(1)) >= 0
    assert calls == [1]


def test_a_record_says_day_command_and_machine_and_is_appended(tmp_path: Path):
    for value in (1, 2):
        timing.append(tmp_path / "r.jsonl", timing.record(value=value))
    first, second = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert list(first) == ["date", "command", "machine", "value"]
    assert (first["value"], second["value"]) == (1, 2)
    assert first["machine"]["torch"] == torch.__version__
    assert first["machine"]["threads"] == torch.get_num_threads()


def test_no_path_keeps_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timing.append("", {"value": 1})
    assert list(tmp_path.iterdir()) == []
