"""The demonstration on two processes, tiny, started by torchrun: equal to one process."""

from __future__ import annotations

import json
import os
import sys

import pytest
import scaling
from tiny_recipes import CONFIGS


@pytest.mark.full
def test_two_processes_have_the_losses_of_one_and_hold_less(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.jsonl"
    words = ["--smoke", "--size", "2", "8", "8", "--batch", "2", "--only", "fsdp2"]
    argv = ["scaling.py", str(CONFIGS / "dit-image.toml"), *words, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    assert not ended.value.code
    (line,) = out.read_text().splitlines()
    record = json.loads(line)
    one, two = record["runs"]["single"], record["runs"]["fsdp2"]
    assert (one["degrees"], two["degrees"]) == ({}, {"shard": 2})
    assert len(set(one["losses"])) == 3 and len(two["losses"]) == 3
    assert two["losses_apart"] <= 1e-5 and two["gradient_norms_apart"] <= 1e-4
    assert two["estimated_mib"] < one["estimated_mib"]
    assert "correctness, not speed" in record["says"] and record["says"] in capsys.readouterr().out


def test_the_greatest_difference_of_any_step_is_noted():
    found = {
        "single": {"losses": [2.0, 1.0], "gradient_norms": [4.0, 4.0]},
        "fsdp2": {"losses": [2.0, 1.5], "gradient_norms": [3.0, 4.0]},
    }
    scaling.note_differences(found)
    assert found["fsdp2"]["losses_apart"] == pytest.approx(0.5)
    assert found["fsdp2"]["gradient_norms_apart"] == pytest.approx(0.25)
    assert found["single"]["losses_apart"] == 0
