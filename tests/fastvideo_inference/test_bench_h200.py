"""The GPU benchmark on the CPU, tiny: its records, and that a failure costs only its own case."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastvideo import registry

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "inference/bench/h200.py"
ABSENT = ("pydantic", "ftfy", "av", "diffusers")  # from the GPU's machine


def run(folder: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Run the smoke preset where the packages in ABSENT cannot be imported."""
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not there')\n")
    out = folder / "results.jsonl"
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, SCRIPT, "--smoke", "--out", out, *flags],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = out.read_text().splitlines() if out.exists() else []
    return done, [json.loads(line) for line in lines]


def test_smoke_measures_every_kind_of_case(tmp_path: Path):
    done, records = run(tmp_path, "--only", "eager", "denoise 1.3b 96x64x17 dense auto compile")
    assert done.returncode == 0, done.stderr
    assert {r["status"] for r in records} == {"ok"}
    stages = {r["case"]: r["stages"] for r in records}
    assert {case.split()[0] for case in stages} == {"ceiling", "text", "decode", "denoise", "clip"}
    clip = stages["clip 1.3b 96x64x17 vsa(sparsity=0.8) auto eager"]
    assert list(clip) == ["text", "3 steps", "decode and copy", "end to end"]
    low, high = clip["end to end"]["range"]
    assert 0 < low <= clip["end to end"]["s"] <= high
    assert clip["end to end"]["mfu"] is None, "this CPU's peak is not known"
    compiled = next(r for r in records if r["settings"]["mode"] == "compile")
    assert compiled["error"] < 0.05
    assert compiled["compiler"]["unique_graphs"] == 1, "all blocks share one"
    assert not compiled["compiler"]["graph_breaks"]
    sparse = next(r for r in records if r["case"].startswith("denoise") and "vsa" in r["case"])
    facts = sparse["attention"]
    assert facts["backend"] == "masked" and facts["executed_share"] == 1, "so few tokens"
    assert facts["executed_share"] / facts["executed_over_needed"] < 0.5
    alike = [r["attention"] for r in records if facts.items() <= r.get("attention", {}).items()]
    assert len(alike) == sum("vsa" in r["case"] for r in records), "lists are drawn with a seed"
    assert any("estimated" in name for name in sparse["stages"])
    assert "| clip 1.3b 96x64x17 dense auto eager | end to end |" in done.stdout


def test_a_backend_that_cannot_serve_is_recorded_and_the_rest_goes_on(tmp_path: Path):
    flags = ("--cases", "denoise", "--patterns", "dense", "--modes", "eager")
    done, records = run(tmp_path, *flags, "--backends", "gather", "sdpa")
    assert done.returncode == 1
    assert [r["status"] for r in records] == ["failed", "ok"]
    assert "serves sparse patterns only" in records[0]["reason"]


def test_a_case_that_kills_its_process_is_recorded_and_the_rest_goes_on(tmp_path: Path):
    done, records = run(tmp_path, "--cases", "text", "--case-s", "0.05")
    assert done.returncode == 1
    assert [r["case"] for r in records] == ["text eager", "text compile"]
    assert all("SIGKILL" in r["reason"] for r in records)


def test_after_the_budget_no_case_is_started(tmp_path: Path):
    done, records = run(tmp_path, "--budget-s", "0")
    assert done.returncode == 0
    assert {r["status"] for r in records} == {"not started"}


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_h200_cases", SCRIPT.with_name("_h200_cases.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def test_dense_work_of_the_published_shape_is_what_the_literature_counts(cases: ModuleType):
    config = cases.wan.Config(**cases.DIMS["1.3b"])
    latents = torch.empty(1, 16, 21, 60, 104, device="meta")
    with torch.no_grad():
        _, forward = cases.dit_flop(config, latents, SimpleNamespace(tokens=512))
    assert forward / 1e12 == pytest.approx(283, abs=1)


def test_executed_work_of_a_tiny_sparse_forward_is_what_the_reference_pattern_needs(
    cases: ModuleType,
):
    grid = cases.LatentShape(4, 16, 16).tokens((1, 2, 2))  # 4 whole tiles of 64 tokens
    layout = cases.attention.plan(cases.attention.Vsa(top_k=1), grid)
    gather = registry.module("fastvideo.attention.backends", "gather")
    assert cases.sparse.pairs(layout, gather) == (4 * 64 * 64, 4 * 64 * 64)


def test_weights_are_drawn_never_zero_and_float32_where_the_family_keeps_it(cases: ModuleType):
    args = SimpleNamespace(device="cpu", dtype="bfloat16")
    config = cases.wan.Config(**cases.SMOKE_DIMS["1.3b"], gate_compress=True)
    net = cases.network(lambda: cases.wan.DiT(config), args, cases.wan.KEEP_FLOAT32)
    assert all(bool((p != 0).any()) for p in net.parameters())
    kinds = {n: p.dtype for n, p in net.named_parameters()}
    assert kinds["scale_shift_table"] == torch.float32
    assert kinds["blocks.0.to_gate_compress.weight"] == torch.bfloat16


def test_a_compiler_that_changes_the_result_is_found_out(cases: ModuleType):
    def doubling(graph: Any, _: Any) -> Any:
        return lambda *inputs: [2 * x for x in graph(*inputs)]

    net, x = cases.umt5.GatedMlp(cases.umt5.Config(d_model=4, d_ff=8)), torch.randn(2, 4)
    args = SimpleNamespace(device="cpu", compiler=doubling, profile="")
    with torch.no_grad():
        record = cases.checked(lambda: net(x), [net], SimpleNamespace(mode="compile"), args)
    assert record["error"] == pytest.approx(1)
