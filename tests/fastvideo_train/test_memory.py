"""The memory estimate against exact accounting of live tensors; what it refuses and advises."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from alive import Alive
from fastvideo_train import budget, memory
from fastvideo_train import recipe as recipes
from fastvideo_train.loop import Job, train
from fastvideo_train.memory import GIB, Estimate
from fastvideo_train.recipe import Recipe
from fastvideo_train.strategies._masters import Trained
from rank_runs import opened
from tiny_recipes import ROOT, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastvideo import capacity, hub
from fastvideo.cli import main
from fastvideo.config import parse
from fastvideo.models.dit import wan
from fastvideo.parallel.degrees import ParallelConfig

WAN = ROOT / "configs" / "train" / "wan-1.3b"
DIMS = ("attention_head_dim=96", "num_layers=4", "ffn_dim=768", "in_channels=16", "out_channels=16")
CLIPS = ("data.channels=16", "data.frames=9", "data.height=16", "data.width=16", "run.batch=2")


def sized(method: str, *sets: str, muon: bool = False) -> Recipe:
    """A recipe whose activations count, of two steps, so that the second has the moments too."""
    names = ["student", "teacher", "critic"] if method == "dmd" else ["student"]
    words = [f"roles.{name}.config.{one}" for name in names for one in DIMS]
    words += [f"roles.{name}.attention.backend=sdpa" for name in names]
    tree = recipes.dump(tiny(method, "run.steps=2", *CLIPS, *words, *sets))
    for table in (tree["optim"], *(role["optim"] for role in tree["roles"].values())):
        table.pop("muon", None) if not muon else None
    return parse(Recipe, tree, source="test")


def published(name: str, *sets: str) -> tuple[Recipe, ParallelConfig]:
    recipe = recipes.load(WAN / f"{name}.toml", sets=sets)
    return recipe, recipe.parallel


def amount(estimate: Estimate, *whats: str, role: str = "") -> int:
    return sum(p.bytes for p in estimate.parts if p.what in whats and (not role or p.role == role))


def held(one: Trained) -> dict[str, int]:
    """What a learning role holds, counted tensor by tensor."""
    adamw = one.optimizer.adamw
    moments = [t for s in adamw.state.values() for t in s.values() if t.dim()] if adamw else []
    own = {id(m) for m in one.masters.values()}
    copies = [p for p in one.params.values() if id(p) not in own]
    groups = {
        "masters": [m for n, m in one.masters.items() if n in one.copied],
        "weights": [*copies, *(m for n, m in one.masters.items() if n not in one.copied)],
        "optimizer": [*moments, *one.optimizer.muon.state_dict().values()],
        "average": list(one.ema.weights.values()) if one.ema else [],
        "sums": list(one.grads.values()),
    }
    return {what: sum(t.numel() * t.element_size() for t in ts) for what, ts in groups.items()}


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_state_of_a_single_process_is_counted_to_the_byte(dtype, muon, tmp_path):
    recipe = sized("flow_matching", f"run.dtype={dtype}", "run.steps=1", muon=muon)
    job = Job.open(recipe, tmp_path)
    list(train(job))
    estimate = memory.of(recipe, ParallelConfig())
    one = job.strategy._trained["student"]  # type: ignore[attr-defined]
    counted = held(one)
    for what in ("masters", "weights", "optimizer", "average"):
        assert amount(estimate, what, role="student") == counted[what], what
    last = sum(p.numel() * p.element_size() for p in one.params.values())
    assert amount(estimate, "gradients", role="student") == counted["sums"] + last


def _parts_held(rank: int, size: int, recipe: Recipe, folder: str) -> dict[str, int]:
    job = opened(recipe, folder, size)
    one = job.strategy._trained["student"]  # type: ignore[attr-defined]
    return {**held(one), "masters": sum(m.nbytes for m in one.masters.values())}


def test_the_parts_of_fsdp2_are_those_of_two_processes(ranks, tmp_path):
    recipe = sized("flow_matching", "run.strategy=fsdp2")
    estimate = memory.of(recipe, recipe.degrees(2))
    assert estimate.host == 4 * sum(estimate.num_params.values()), "all of it is new"
    for counted in ranks(2, _parts_held, recipe, str(tmp_path)):
        assert counted["masters"] == amount(estimate, "masters", role="student")
        assert counted["optimizer"] == amount(estimate, "optimizer", role="student")
        assert counted["average"] == amount(estimate, "average", role="student")
        assert 2 * counted["sums"] == amount(estimate, "gradients", role="student")


@pytest.mark.parametrize(
    ("method", "dtype", "recompute"),
    [
        ("flow_matching", "bfloat16", True),
        ("flow_matching", "bfloat16", False),
        ("flow_matching", "float32", False),
        ("dmd", "bfloat16", True),
    ],
)
def test_the_estimate_bounds_the_peak_of_a_run_closely(method, dtype, recompute, tmp_path):
    turn = ["method.args.student_every=1"] if method == "dmd" else []
    words = [f"run.dtype={dtype}", f"run.recompute={str(recompute).lower()}", *turn]
    recipe = sized(method, *words)
    with Alive() as alive:
        list(train(Job.open(recipe, tmp_path)))
    assert 1.0 <= memory.of(recipe, ParallelConfig()).total / alive.peak <= 1.15


@pytest.mark.parametrize("recompute", [True, False])
def test_scores_that_attention_keeps_on_a_cpu_are_counted(recompute, tmp_path):
    clips = [
        "data.frames=5",
        "data.height=32",
        "data.width=32",
        f"run.recompute={str(recompute).lower()}",
    ]
    totals = {}
    for backend in ("bmm", "sdpa"):
        words = ["run.dtype=bfloat16", f"roles.student.attention.backend={backend}", *clips]
        recipe = sized("flow_matching", *words)
        with Alive() as alive:
            list(train(Job.open(recipe, tmp_path / backend)))
        totals[backend] = memory.of(recipe, ParallelConfig()).total
        assert 0.99 <= totals[backend] / alive.peak <= 1.2  # batches are not in it
    assert totals["bmm"] > 1.08 * totals["sdpa"]


@pytest.mark.parametrize("recompute", [True, False])
def test_activations_of_the_published_1_3b_are_those_that_autograd_keeps(recompute):
    words = ["run.device=cpu", "run.strategy=single", "parallel.shard=1", "run.batch=1"]
    words += [f"run.recompute={str(recompute).lower()}", "roles.student.config.num_layers=3"]
    dense = ["roles.student.attention.pattern=dense", "roles.student.config.gate_compress=false"]
    recipe, degrees = published("vsa", *words, *dense)
    estimate = memory.of(recipe, degrees, dims=budget.dims_here)
    with FakeTensorMode(), Alive() as alive:
        net = _student(recipe)
        before = alive.now
        if recompute:
            for layer in net.blocks:
                again = partial(checkpoint, layer.forward, use_reentrant=False)
                layer.forward = partial(again, preserve_rng_state=False)
        x = torch.empty(1, 16, 21, 60, 104, dtype=torch.bfloat16)
        text = wan.Conditioning(torch.empty(1, 512, 4096, dtype=torch.bfloat16))
        net(x, torch.empty(1, 1), text).float().square().mean().backward()
    told = amount(estimate, "activations", "activations in passing")
    assert 1.0 <= told / (alive.peak - before) <= 1.2


def _student(recipe: Recipe) -> wan.DiT:
    net = wan.DiT(wan.Config.parse(recipe.roles["student"].config))
    for name, param in net.named_parameters():
        if not any(part in name for part in wan.KEEP_FLOAT32):
            param.data = param.data.bfloat16()
    return net


def test_dmd_of_1_3b_without_parts_agrees_with_the_known_45_to_50_gb():
    recipe, degrees = published("dmd", "run.strategy=single", "parallel.shard=1", "run.batch=1")
    estimate = memory.of(recipe, degrees, dims=budget.dims_here)
    state = amount(estimate, "weights", "masters", "optimizer", "frozen weights")
    bf16_gradients = 2 * 2 * estimate.num_params["student"]  # that count has no float32 sums
    assert 45e9 <= state + bf16_gradients <= 50e9


def test_shards_divide_the_state_and_ulysses_the_activations():
    eight, degrees = published("sparse")
    more, wider = published("sparse", "parallel.shard=16", "run.batch=16")
    small, large = (
        memory.of(r, d, dims=budget.dims_here) for r, d in ((more, wider), (eight, degrees))
    )
    ratio = amount(small, "masters", role="critic") / amount(large, "masters", role="critic")
    assert ratio == pytest.approx(0.5, rel=0.02)
    longer, spread = published("sparse", "parallel.ulysses=4")
    cut = memory.of(longer, spread, dims=budget.dims_here)
    assert amount(cut, "activations") < amount(large, "activations") / 2


# Refusals


def test_a_run_that_is_too_large_is_refused_with_its_parts_and_what_fits(capsys, tmp_path):
    command = ["train", str(WAN / "sparse.toml"), "--dry-run", "--run-dir", str(tmp_path / "r")]
    assert main([*command, "--set", "run.memory_gib=17"]) == 2
    said = capsys.readouterr()
    assert "needs about 18.1 GiB of each device, which has 17.0; largest: " in said.err
    assert "student activations in passing 4." in said.err
    words = said.err.partition("nearest that fits: ")[2].partition(" on ")[0].split(", ")
    assert words and main([*command, *(w for x in words for w in ("--set", x))]) == 0
    assert "memory of each device, estimated" in said.out


def test_a_real_run_is_refused_before_its_networks_are_built(capsys, tmp_path):
    words = ["--smoke", "--run-dir", str(tmp_path / "r"), "--set", "run.memory_gib=1e-4"]
    assert main(["train", str(WAN / "vsa.toml"), *words]) == 2
    assert "wan-1.3b-vsa needs about 0.0 GiB" in capsys.readouterr().err
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_what_nothing_can_shrink_far_enough_is_said(tmp_path):
    recipe, degrees = published("dmd", "run.memory_gib=4")
    with pytest.raises(ValueError, match=r"even .*parallel.* needs \d+\.\d GiB"):
        budget.check(recipe, degrees, dims=budget.dims_here)


@pytest.mark.parametrize(
    ("have", "words"),
    [
        (["run.recompute=false"], "run.recompute=true"),
        (["run.batch=32", "run.accumulate=2"], "run.batch=8, run.accumulate=8"),
        (["run.strategy=single", "parallel.shard=1", "run.batch=1"], "run.strategy=fsdp2"),
    ],
)
def test_the_cheapest_remedy_comes_first(have, words):
    recipe, degrees = published("dmd", *have, "run.memory_gib=24")
    if degrees.world_size == 1:
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"memory_gib": 60})})
    with pytest.raises(ValueError, match=f"nearest that fits: {words}"):
        budget.check(recipe, degrees, dims=budget.dims_here)


def test_a_plan_asks_no_hub(monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "_download", refuse)
    assert main(["train", str(WAN / "sparse.toml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1489.82 M parameters" in out and "is not here yet" in out
    assert "host memory" not in out, "nothing in it starts anew"


def test_a_model_elsewhere_needs_its_dims_in_the_recipe():
    recipe = tiny("flow_matching", "roles.student.from=some/model")
    bare = recipe.roles["student"].model_copy(update={"config": {}})
    with pytest.raises(ValueError, match=r"state them in roles\.student\.config"):
        budget.dims_here(bare, "student")


def test_a_process_on_a_cpu_has_its_share_of_the_machine(monkeypatch):
    recipe = tiny("flow_matching")
    monkeypatch.setattr(capacity, "host_memory", lambda: 6 * GIB)
    assert budget.limit(recipe) == 6 * GIB
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert budget.limit(recipe) == 2 * GIB
    assert budget.limit(tiny("flow_matching", "run.memory_gib=80")) == 80 * GIB, "a plan for others"


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_clips_of_a_world_that_no_memory_holds_are_refused(words, capsys, tmp_path):
    sizes = [w for x in ("height=99200", "width=99200") for w in ("--set", f"data.{x}")]
    recipe = ROOT / "configs/train/nano/vae-image.toml"
    command = ["train", str(recipe), "--smoke", "--run-dir", str(tmp_path / "r"), *sizes]
    assert main([*command, *words]) == 2
    assert "need at least" in capsys.readouterr().err


def test_without_a_known_device_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(capacity, "host_memory", lambda: None)
    recipe = tiny("flow_matching")
    assert budget.limit(recipe) is None
    assert budget.limit(tiny("flow_matching", "run.memory_gib=2.5")) == int(2.5 * GIB)


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_more_positions_than_the_denoiser_has_are_refused_before_a_step(words, capsys, tmp_path):
    sizes = [w for x in ("height=2", "width=2050") for w in ("--set", f"data.{x}")]
    command = ["train", str(WAN / "vsa.toml"), "--smoke", "--run-dir", str(tmp_path / "r"), *sizes]
    assert main([*command, *words]) == 2
    assert "make 1025 positions on an axis; the denoiser of roles." in capsys.readouterr().err
