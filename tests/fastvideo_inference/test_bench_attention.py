"""The attention benchmark, tiny: its records and its plot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "inference/bench/attention.py"
QUICK = ["--grids", "4x8x8", "--tile", "2x4x4", "--heads", "2", "--head-dim", "16"]


@pytest.mark.parametrize("more", [[], ["--training"]], ids=["forward", "training"])
def test_smoke_measures_dense_vsa_and_sta_in_one_record_and_draws(tmp_path: Path, more: list[str]):
    out, plot = tmp_path / "results.jsonl", tmp_path / "speedup.svg"
    flags = ["--backends", "gather", "masked", "reference", "--windows", "1x1x1", "--repeats", "1"]
    flags += ["--sparsity", "0.5", "--threads", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *QUICK, *flags, *more, "--out", out, "--plot", plot],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    names = [f"{n} {p}" for p in ("0.5", "sta 1x1x1") for n in ("gather", "masked", "reference")]
    assert list(record["variants"]) == ["dense sdpa", *names]
    rows = record["variants"]
    assert rows["gather 0.5"]["issued"] == 1 and rows["reference 0.5"]["issued"] == 2
    assert rows["gather sta 1x1x1"]["sparsity"] == pytest.approx(1 - 1 / 8), "one of 8 tiles"
    assert rows["masked 0.5"]["overhead"] > 0 and rows["gather sta 1x1x1"]["overhead"] == 0
    assert all(v["seconds"] > 0 and v["speedup"] > 0 for v in rows.values())
    assert plot.read_text().startswith("<svg") and "sparsity 0.5" in plot.read_text()
    assert "| gather sta 1x1x1 |" in done.stdout
