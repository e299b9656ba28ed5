"""The GPU benchmark on the CPU, tiny: its records, and that a failure costs only its own case."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvideo import attention, registry, weights
from fastvideo.attention import sparse
from fastvideo.models.decoder import taehv
from fastvideo.models.dit import wan
from fastvideo.models.text import umt5
from fastvideo.models.vae.wan import WanVae, WanVaeConfig
from fastvideo.shapes import LatentShape
from tests.processes import has_ended

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "inference/bench/h200.py"
ABSENT = ("pydantic", "ftfy", "av", "diffusers")  # from the GPU's machine

Record = dict[str, Any]


def run(folder: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], list[Record]]:
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


def listed(*flags: str) -> list[str]:
    """Return the names of the cases, in the order in which they would run."""
    command = [sys.executable, SCRIPT, "--list", *flags]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    return done.stdout.splitlines()


# Without packages that the GPU's machine may lack


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Record]]:
    names = ("ceiling", "kernel 1.3b", "tiny", "decode", "text eager", "cold", "native eager")
    names += ("denoise 1.3b 96x64x17 dense auto compile", "vsa(sparsity=0.8) auto one block eager")
    names += ("clip 1.3b 96x64x17 vsa(sparsity=0.8) auto compile",)
    names += ("clip 1.3b 96x64x17 dense auto eager",)
    folder = tmp_path_factory.mktemp("bare")
    ample = ("--budget-s", "3600", "--case-s", "3600")  # a busy machine leaves no case out
    done, records = run(folder, "--only", *names, "--profile", str(folder / "tables"), *ample)
    assert done.returncode == 0, done.stderr
    return done.stdout, {r["case"]: r for r in records}


def test_smoke_measures_every_kind_of_case(bare: tuple[str, dict[str, Record]]):
    table, records = bare
    kinds = {"ceiling", "kernel", "text", "decode", "tiny", "denoise", "clip", "cold", "peer"}
    assert {name.split()[0] for name in records} == kinds
    assert {r["status"] for name, r in records.items() if "peer" not in name} == {"ok"}
    for record in records.values():
        for stage in record.get("stages", {}).values():
            low, high = stage["range"]
            assert 0 < low <= stage["s"] <= high
            assert stage.get("mfu") is None, "this CPU's peak is not known"
        assert record["clocks_before"].keys() == record["clocks_after"].keys() == {"cpu.mhz"}
        assert record["machine"]["torch"] == torch.__version__
    assert "| clip 1.3b 96x64x17 dense auto eager | end to end |" in table


def test_a_clip_s_stages_sum_up_to_its_whole(bare: tuple[str, dict[str, Record]]):
    clips = [r for name, r in bare[1].items() if name.startswith("clip")]
    assert len(clips) == 2
    for clip in clips:
        s = {name: stage["s"] for name, stage in clip["stages"].items()}
        steps = s["text"] + s["3 steps"]
        assert s["end to end"] == pytest.approx(steps + s["decode and copy"], rel=1e-3)
        small = s["decode and copy, tiny decoder"]
        assert s["end to end, tiny decoder"] == pytest.approx(steps + small, rel=1e-3)
        assert {"decode alone", "copy alone, as bytes"} <= s.keys()


def test_absent_packages_are_told_and_stop_nothing_else(bare: tuple[str, dict[str, Record]]):
    peer = bare[1]["peer 1.3b 96x64x17 dense native eager"]
    assert peer["status"] == "not installed"
    assert "diffusers is not there" in peer["reason"]
    clip = bare[1]["clip 1.3b 96x64x17 dense auto eager"]
    assert clip["mp4"] == "left out: av is not there"
    assert not any("mp4" in name for name in clip["stages"])
    assert "not installed: ImportError" in bare[0]


def test_a_record_names_what_took_most_time(bare: tuple[str, dict[str, Record]]):
    for name, record in bare[1].items():
        if name.split()[0] in ("cold", "peer"):
            continue
        shares = [k["share"] for k in record["kernels"]]
        assert 1 <= len(shares) <= 5 and shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1.001
    for case, name in (("decode 96x64x17 auto", "conv"), ("ceiling", "aten::mm")):
        assert any(name in kernel["name"] for kernel in bare[1][case]["kernels"])


def test_operators_on_a_cpu_are_added_up_by_name_and_those_that_take_most_are_named_first(
    bench: SimpleNamespace,
):
    rows = (("aten::add", 30), ("aten::conv3d", 40), ("a region", 900), ("aten::add", 20))
    events = [SimpleNamespace(name=name, self_cpu_time_total=us) for name, us in rows]
    assert bench.timing.slowest(events, is_cpu=True) == [
        {"name": "aten::add", "share": 0.5556},
        {"name": "aten::conv3d", "share": 0.4444},
    ]


def test_compiled_blocks_share_a_graph_and_change_nothing(bare: tuple[str, dict[str, Record]]):
    compiled = bare[1]["denoise 1.3b 96x64x17 dense auto compile"]
    assert compiled["error"] < 0.05
    assert compiled["compiler"]["unique_graphs"] == 1
    assert not compiled["compiler"]["graph_breaks"]
    clip = bare[1]["clip 1.3b 96x64x17 vsa(sparsity=0.8) auto compile"]
    assert clip["compiler"]["unique_graphs"] == 2, "of the encoder and of the denoiser"


def test_sparse_records_tell_what_is_executed(bare: tuple[str, dict[str, Record]]):
    sparse = {n: r["attention"] for n, r in bare[1].items() if "vsa" in n and "1.3b" in n}
    facts = sparse["kernel 1.3b 96x64x17 vsa(sparsity=0.8) auto"]
    assert facts["backend"] == "masked" and facts["executed_share"] == 1, "so few tokens"
    assert facts["executed_share"] / facts["executed_over_needed"] < 0.5
    assert all(facts == other for other in sparse.values()), "lists are drawn with a seed"
    stages = bare[1]["kernel 1.3b 96x64x17 vsa(sparsity=0.8) auto"]["stages"]
    assert stages["attention"]["tflop"] > stages["kernel"]["tflop"], "the coarse branch too"


def test_a_cold_start_is_the_sum_of_its_stages(bare: tuple[str, dict[str, Record]]):
    stages = bare[1]["cold 1.3b 96x64x17"]["stages"]
    *parts, whole = (stage["s"] for stage in stages.values())
    assert list(stages) == ["python", "imports", "device", "load", "first forward", "cold start"]
    assert whole == pytest.approx(sum(parts), rel=0.02), "medians of two"
    assert stages["load"]["gib"] > 0


def test_one_block_is_multiplied_by_the_number_of_layers(bare: tuple[str, dict[str, Record]]):
    stages = bare[1]["denoise 14b 96x64x17 vsa(sparsity=0.8) auto one block eager"]["stages"]
    names = list(stages)
    assert names[:3] == ["one block", "embedding and head", "one block x 3, estimated"]
    assert stages[names[2]]["s"] == pytest.approx(3 * stages["one block"]["s"], rel=1e-3)
    assert names[4].startswith("4 steps, estimated") and "one block x 3" in names[4]
    assert all(stages[name]["estimated"] for name in names[2:])


# What goes wrong


def test_a_backend_that_cannot_serve_is_recorded_and_the_rest_goes_on(tmp_path: Path):
    flags = ("--cases", "denoise", "--models", "1.3b", "--patterns", "dense", "--modes", "eager")
    done, records = run(tmp_path, *flags, "--backends", "gather", "sdpa")
    assert done.returncode == 1
    assert [r["status"] for r in records] == ["failed", "ok"]
    assert "serves sparse patterns only" in records[0]["reason"]


def test_a_case_that_kills_its_process_is_recorded_and_the_rest_goes_on(tmp_path: Path):
    done, records = run(tmp_path, "--cases", "text", "--case-s", "0.05")
    assert done.returncode == 1
    assert [r["case"] for r in records] == ["text compile", "text eager"]
    assert all("SIGKILL" in r["reason"] for r in records)


KILLER = """
import os, pathlib, signal, sys, time
if any(word.endswith("_h200_cold.py") for word in sys.orig_argv):
    pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
"""


def test_a_cold_start_that_is_killed_leaves_no_file_and_no_process(tmp_path: Path, monkeypatch):
    """Its process kills the one of the cases, which waits for it, and would live on."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    done, records = run(tmp_path, "--cases", "cold")
    assert done.returncode == 1 and "SIGKILL" in records[0]["reason"]
    assert not list(scratch.glob("tmp*")), "nothing but caches of the compiler"
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_after_the_budget_no_case_is_started(tmp_path: Path):
    done, records = run(tmp_path, "--budget-s", "0")
    assert done.returncode == 0
    assert {r["status"] for r in records} == {"not started"}


def test_the_first_cases_are_those_of_the_table():
    first = listed()[:8]
    size = "1.3b 832x480x81"
    assert first == [
        "ceiling",
        f"kernel {size} vsa(sparsity=0.8) auto",
        f"kernel {size} dense auto",
        f"clip {size} vsa(sparsity=0.8) auto compile",
        f"peer {size} dense _native_cudnn compile",
        f"denoise {size} vsa(sparsity=0.8) auto compile",
        f"denoise {size} dense auto compile",
        f"cold {size}",
    ]


def test_the_14b_is_one_block_unless_asked_for():
    shown, full = listed("--models", "14b"), listed("--models", "14b", "--full", "14b")
    denoise = [name for name in shown if name.startswith("denoise")]
    assert denoise and all("one block" in name for name in denoise)
    assert not any(name.startswith(("clip", "peer", "cold")) for name in shown)
    assert any(name.startswith("clip 14b") for name in full)
    assert not any("one block" in name for name in full)


# Its parts


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        names = ("cases", "cold", "parts", "peer", "timing")
        found = {name: importlib.import_module(f"_h200_{name}") for name in names}
        yield SimpleNamespace(**found, script=importlib.import_module("h200"))
        for name in [n for n in sys.modules if n == "h200" or n.startswith("_h200_")]:
            del sys.modules[name]


@pytest.fixture
def case(bench: SimpleNamespace) -> Any:
    """A small case of a comparison."""
    return bench.script.Case("peer", "eager", "96x64x17", "1.3b", "dense", "native")


@pytest.fixture
def args() -> SimpleNamespace:
    how = {"device": "cpu", "dtype": "bfloat16", "tokens": 16, "steps": None, "smoke": True}
    how |= {"repeats": 1, "stage_s": 20.0, "profile": ""}
    return SimpleNamespace(**how, compiler="eager", compile_peer_vae=False)


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", None)],
)
def test_the_peak_of_a_slower_edition_is_not_guessed(
    device: str, peak: float | None, bench: SimpleNamespace
):
    assert bench.timing.peak_of(device) == peak


def test_dense_work_of_the_published_shape_is_what_the_literature_counts(bench: SimpleNamespace):
    config = wan.Config(**bench.parts.DIMS["1.3b"])
    latents = torch.empty(1, 16, 21, 60, 104, device="meta")
    with torch.no_grad():
        _, forward = bench.parts.dit_flop(config, latents, SimpleNamespace(tokens=512))
    assert forward / 1e12 == pytest.approx(283, abs=1)


def test_work_of_decoders_at_the_published_shape_is_what_the_literature_counts_or_less(
    bench: SimpleNamespace,
):
    latents = torch.empty(1, 16, 21, 60, 104, device="meta")
    full = weights.build(lambda: WanVae(WanVaeConfig()))
    assert bench.parts.decoder_flop(full, latents) / 1e12 == pytest.approx(275, rel=0.05)
    tiny = weights.build(lambda: taehv.Decoder(taehv.Config()))
    assert 8 < bench.parts.decoder_flop(tiny, latents) / 1e12 < 11.4, "it widens more cheaply"


def test_executed_work_of_a_tiny_sparse_forward_is_what_the_reference_pattern_needs():
    grid = LatentShape(4, 16, 16).tokens((1, 2, 2))  # 4 whole tiles of 64 tokens
    layout = attention.plan(attention.Vsa(top_k=1), grid)
    gather = registry.module("fastvideo.attention.backends", "gather")
    assert sparse.pairs(layout, gather) == (4 * 64 * 64, 4 * 64 * 64)


def test_weights_are_drawn_never_zero_and_float32_where_the_family_keeps_it(
    bench: SimpleNamespace, args: SimpleNamespace
):
    config = wan.Config(**bench.parts.SMOKE_DIMS["1.3b"], gate_compress=True)
    net = bench.parts.network(lambda: wan.DiT(config), args, wan.KEEP_FLOAT32)
    assert all(bool((p != 0).any()) for p in net.parameters())
    kinds = {n: p.dtype for n, p in net.named_parameters()}
    assert kinds["scale_shift_table"] == torch.float32
    assert kinds["blocks.0.to_gate_compress.weight"] == torch.bfloat16


def test_a_compiler_that_changes_the_result_is_found_out(
    bench: SimpleNamespace, args: SimpleNamespace
):
    def doubling(graph: Any, _: Any) -> Any:
        return lambda *inputs: [2 * x for x in graph(*inputs)]

    net, x = umt5.GatedMlp(umt5.Config(d_model=4, d_ff=8)), torch.randn(2, 4)
    args.compiler = doubling
    with torch.no_grad():
        record = bench.timing.checked(
            lambda: net(x),
            lambda: bench.timing.compile_each([net], args),
            SimpleNamespace(mode="compile"),
            args,
        )
    assert record["error"] == pytest.approx(1)


def test_work_of_one_block_times_layers_and_of_the_rest_is_that_of_the_whole(
    bench: SimpleNamespace, args: SimpleNamespace
):
    words = {"size": "96x64x17", "model": "14b", "pattern": "vsa(sparsity=0.8)"}
    full = bench.script.Case("denoise", "eager", backend="auto", **words)
    one = bench.script.Case("denoise", "eager", backend="auto", extent="one block", **words)
    with torch.no_grad():
        whole = bench.cases.denoise(full, args)["stages"]
        stages = bench.cases.denoise(one, args)["stages"]
    name = "forward, estimated: one block x 3, embedding and head"
    assert stages[name]["tflop"] == whole["forward"]["tflop"]
    assert stages[name]["dense_tflop"] == whole["forward"]["dense_tflop"]
    assert 3 * stages["one block"]["tflop"] < whole["forward"]["tflop"]
    assert "4 steps" in whole


@pytest.mark.full
def test_peer_is_timed_in_turn_with_us_on_the_same_weights(
    bench: SimpleNamespace, case: Any, args: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("diffusers")
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", False)  # it sets this
    args.compiler, args.repeats = "aot_eager", 2
    peer = bench.script.run_case(replace(case, mode="compile"), args)
    assert peer["status"] == "ok", peer["reason"]
    assert max(peer["apart"]["float32"].values()) < 1e-5
    assert 0 < max(peer["apart"]["rounded"].values()) < 0.1
    assert peer["apart"]["float32"].keys() == {"text", "forward", "decode"}
    assert peer["error"] < 0.05 and peer["peer"]["compiled"] == "blocks, fullgraph"
    assert peer["compiler"]["unique_graphs"] == 2, "of our blocks and of theirs"
    for name in ("forward", "text", "3 steps", "decode and copy", "end to end"):
        ours, theirs = peer["stages"][name], peer["stages"][f"{name}, diffusers"]
        low, high = theirs["over_ours_range"]
        assert low <= theirs["over_ours"] <= high
        bounds = theirs["range"][0] / ours["range"][1], theirs["range"][1] / ours["range"][0]
        assert bounds[0] - 0.01 <= low and high <= bounds[1] + 0.01
    assert peer["kernels"] and peer["kernels_diffusers"]


def test_an_mp4_is_a_stage_beyond_the_frames(
    bench: SimpleNamespace, case: Any, args: SimpleNamespace
):
    with torch.no_grad():
        record = bench.cases.clip(replace(case, kind="clip", backend="auto"), args)
    assert "by av" in record["mp4"]
    s = {name: stage["s"] for name, stage in record["stages"].items()}
    assert s["end to end with mp4"] == pytest.approx(s["end to end"] + s["mp4"], rel=1e-3)


@pytest.mark.parametrize(
    "part", ["transformer", *(pytest.param(p, marks=pytest.mark.full) for p in ("vae", "text"))]
)
def test_a_wrong_weight_of_the_peer_is_noticed(
    bench: SimpleNamespace,
    case: Any,
    args: SimpleNamespace,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("diffusers")
    peer, shared = bench.peer, bench.peer.sharing
    two = {
        "transformer": ("blocks.1.attn1.to_q.weight", "blocks.1.attn1.to_k.weight"),
        "vae": (
            "decoder.mid_block.resnets.0.conv1.weight",
            "decoder.mid_block.resnets.0.conv2.weight",
        ),
        "text": (
            "encoder.block.1.layer.1.DenseReluDense.wi_0.weight",
            "encoder.block.1.layer.1.DenseReluDense.wi_1.weight",
        ),
    }[part]

    def swapped(net: Any, ours: Any, *rest: Any) -> Any:
        net, state = shared(net, ours, *rest), ours.state_dict()
        if two[0] in state:
            a, b = state[two[0]], state[two[1]]
            net.load_state_dict({two[0]: b, two[1]: a}, strict=False, assign=True)
        return net

    with torch.no_grad():
        given, z = peer.Given.of(case, args), bench.parts.noise(case, args)
        ours = peer.our_side(given, args)
        right = peer.compared(ours, peer.peer_side(peer.classes(), given, case, args), z)
        assert max(right["float32"].values()) < 1e-5
        monkeypatch.setattr(peer, "sharing", swapped)
        wrong = peer.peer_side(peer.classes(), given, case, args)
        with pytest.raises(ValueError, match="do not compute the same, float32"):
            peer.compared(ours, wrong, z)


def test_too_little_disk_is_told_before_anything_is_written(
    bench: SimpleNamespace,
    case: Any,
    args: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(bench.cold, "SPARE_GIB", 1e9)
    with pytest.raises(OSError, match="GiB are free for files of"):
        bench.cold.prepared(tmp_path, case, args)
    assert not list(tmp_path.iterdir())


def test_shares_are_of_kernels_on_the_device_without_marked_regions(bench: SimpleNamespace):
    def event(name: str, us: int, *, where: str = "CUDA", is_region: bool = False) -> Any:
        kinds = {"device_type": SimpleNamespace(name=where), "is_user_annotation": is_region}
        return SimpleNamespace(name=name, self_device_time_total=us, **kinds)

    events = [event("gemm", 20), event("attend", 60), event("gemm", 20)]
    events += [
        event("launch", 900, where="CPU"),
        event("Torch-Compiled Region", 90, is_region=True),
    ]
    assert bench.timing.slowest(events, is_cpu=False) == [
        {"name": "attend", "share": 0.6},
        {"name": "gemm", "share": 0.4},
    ]
