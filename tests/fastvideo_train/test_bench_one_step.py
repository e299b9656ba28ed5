"""The benchmark of a training step, tiny: both loops do the same work, and what is recorded."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import one_step
import pytest
import torch
from _one_step_rows import Case, random_weights
from fastvideo_train import recipe as recipes
from tiny_recipes import CONFIGS, ROOT

from fastvideo.models.dit import wan

NANO, WAN = (CONFIGS / "dit-image.toml", ROOT / "configs/train/wan-1.3b/vsa.toml")
SMALL = ["--smoke", "--size", "2", "8", "8", "--batch", "2", "--threads", "0", "--repeats", "2"]


def words(recipe: Path, *more: str) -> list[str]:
    return ["one_step.py", str(recipe), *SMALL, "--peak-side", "64", *more]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, recipe: Path, *more: str) -> dict[str, Any]:
    pytest.importorskip("diffusers")
    out = folder / "results.jsonl"
    monkeypatch.setattr(sys, "argv", words(recipe, "--out", str(out), *more))
    one_step.main()
    (line,) = out.read_text().splitlines()
    return json.loads(line)


def test_a_record_has_the_rates_memory_and_ratios_of_each_row(monkeypatch, tmp_path, capsys):
    record = run(monkeypatch, tmp_path, NANO, "--set", "run.recompute=true")
    rows, tokens = record["rows"], 2 * 2 * 4 * 4
    assert list(rows) == ["diffusers", "ours", "ours, muon"]
    assert record["settings"]["tokens"] == tokens and record["machine"]["torch"]
    assert "measured here" in record["peak"]["source"]
    for row in rows.values():
        assert row["tokens_per_s"] == pytest.approx(tokens / row["s"], rel=0.01)
        rate = row["executed_tflop"] / row["s"]
        assert row["executed_tflop_per_s"] == pytest.approx(rate, rel=0.01)
        rate = row["model_tflop"] / row["s"]
        assert row["mfu"] == pytest.approx(rate / record["peak"]["tflops"], rel=0.01)
        assert 1.2 < row["executed_tflop"] / row["model_tflop"] < 4 / 3, "layers once more"
        assert row["peak_mib"] > 0 and len(row["first_losses"]) == 3
        low, high = row["diffusers_over_this"]["range"]
        assert 0 < low <= row["diffusers_over_this"]["ratio"] <= high
    assert rows["diffusers"]["diffusers_over_this"]["range"] == [1, 1]
    assert rows["ours"]["velocity_apart"] < 0.05 and rows["ours"]["losses_apart"] < 0.01
    assert "losses_apart" not in rows["ours, muon"]
    assert re.search(r"\| ours \| AdamW, dense by \w+ \|", capsys.readouterr().out)


def test_in_float32_both_loops_learn_the_same_and_the_sparse_row_does_less(monkeypatch, tmp_path):
    more = ("--set", "run.dtype=float32", "--set", "optim.lr=1e-2", "--size", "4", "16", "16")
    rows = run(monkeypatch, tmp_path, WAN, *more, "--peak", "1")["rows"]
    assert list(rows) == ["diffusers", "ours", "ours, vsa"]
    first, _, last = rows["diffusers"]["first_losses"]
    assert last < 0.9 * first, "they moved"
    assert rows["ours"]["velocity_apart"] < 1e-5 and rows["ours"]["losses_apart"] < 1e-4
    assert rows["ours, vsa"]["model_tflop"] < rows["ours"]["model_tflop"]
    assert "velocity_apart" not in rows["ours, vsa"]


def test_networks_that_compute_something_else_are_not_timed(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sys, "argv", words(NANO))
    args = one_step.parse_arguments()
    case = Case.of(recipes.load(NANO, smoke=True), args)
    begun = {n: one_step.begin(make, case.draws, "cpu") for n, make in case.rows([]).items()}
    assert one_step.compared(begun, "bfloat16")
    case.first["proj_out.weight"].mul_(1.1)
    begun["ours"] = one_step.begin(case.rows(["ours"])["ours"], case.draws, "cpu")
    with pytest.raises(SystemExit, match="ours and diffusers do not compute the same"):
        one_step.compared(begun, "bfloat16")


def test_no_first_weight_is_constant():
    recipe = recipes.load(WAN, smoke=True)
    config = wan.Config.parse(recipe.roles["student"].config)
    drawn = random_weights(config, "cpu")
    assert any("to_gate_compress" in name for name in drawn)
    assert all(float(x.std()) > 0.005 for x in drawn.values())


def test_memory_is_the_peak_of_a_step_and_not_of_building():
    with one_step.OnHost() as memory:
        kept, gone = torch.ones(1000), torch.ones(9000)
        del gone
        memory.forget()
        assert memory.peak == kept.nbytes
        assert (kept + 1).nbytes and memory.peak == 2 * kept.nbytes


def test_other_methods_and_unknown_rows_are_refused(monkeypatch):
    for recipe, more, said in (
        (CONFIGS / "dit-dmd.toml", [], "must be of method flow_matching"),
        (NANO, ["--only", "theirs"], "not among"),
    ):
        monkeypatch.setattr(sys, "argv", words(recipe, *more))
        with pytest.raises(SystemExit, match=said):
            one_step.main()


@pytest.mark.gpu
def test_on_a_gpu_all_rows_are_timed_with_what_the_allocator_gave(monkeypatch, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    more = ("--device", "cuda", "--peak", "100", "--set", "roles.student.config.num_layers=3")
    rows = run(monkeypatch, tmp_path, WAN, *more)["rows"]
    assert all(row["peak_mib"] > 0 and row["mfu"] is not None for row in rows.values())
