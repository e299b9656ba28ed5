"""Every strategy trains like one process: losses, resumption, resharding, and what it refuses."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from dmd_by_hand import GAN
from fastvideo_train import loop, strategies
from fastvideo_train.checkpoints import Checkpoints
from fastvideo_train.export import load_run
from fastvideo_train.loop import train
from fastvideo_train.optim import Optimizer, Rows
from fastvideo_train.recipe import OptimSpec, Recipe
from rank_runs import Numbers, losses, losses_of_each, opened, same, small, trained, weights
from tiny_recipes import tiny

from fastvideo.parallel.degrees import ParallelConfig
from tests.ranks import RankError, Ranks

METHODS = ["flow_matching", "vae", "dmd"]
OTHERS = ["decoder", "perflow", "classify", "consistency", "lora"]
STRATEGIES = ["accelerate", "fsdp2"]
# Updates in proportion to clipped gradients: AdamW that divides by almost a constant.
PLAIN_STEPS = ("optim.eps=1", "optim.lr=0.5", "optim.warmup=0", "optim.clip=0.2")


@cache
def alone(method: str, *sets: str, muon: bool = False) -> Numbers:
    """The losses and norms of a single process under `single`."""
    with tempfile.TemporaryDirectory() as folder:
        return losses(0, 1, small(method, *sets, muon=muon), folder)


def worst(got: Numbers, wanted: Numbers) -> float:
    """The largest relative difference of two runs' numbers, which have the same names."""
    assert [one.keys() for one in got] == [one.keys() for one in wanted]
    assert all(any(key.endswith("grad_norm") for key in one) for one in wanted)
    pairs = [(a[key], b[key]) for a, b in zip(got, wanted, strict=True) for key in b]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_those_of_a_single_process(strategy, method, ranks, tmp_path):
    """Muon included: in a float32 run it iterates in float32."""
    recipe = small(method, f"run.strategy={strategy}", muon=True)
    got = {size: ranks(size, losses, recipe, str(tmp_path / str(size))) for size in (1, 2)}
    wanted = alone(method, muon=True)
    assert got[2][0] == got[2][1], "ranks agree on what they log"
    assert len(got[1][0]) == 3 and worst(got[1][0], wanted) == 0.0
    assert worst(got[2][0], wanted) <= 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_of_two_roles_that_reaches_a_third_is_that_of_a_single_process(
    strategy, ranks, tmp_path
):
    """DMD2's GAN term: the student's loss passes through critic and discriminator, which learn."""
    got = ranks(2, losses, small("dmd", *GAN, f"run.strategy={strategy}"), str(tmp_path))[0]
    assert worst(got, alone("dmd", *GAN)) <= 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clipped_steps_as_long_as_gradients_are_those_of_a_single_process(
    strategy, ranks, tmp_path
):
    """Otherwise AdamW, which divides a gradient by its size, would hide a wrong scale."""
    made = {
        "batch": small("flow_matching", *PLAIN_STEPS, f"run.strategy={strategy}"),
        "sequence": small(
            "flow_matching", *PLAIN_STEPS, f"run.strategy={strategy}", "parallel.ulysses=2"
        ),
    }
    wanted = alone("flow_matching", *PLAIN_STEPS)
    assert all(one[f"{role}/grad_norm"] > 0.4 for one in wanted for role in ("student", "text"))
    assert len({round(one["loss"], 2) for one in wanted}) == 3, "steps that move"
    for got in ranks(2, losses_of_each, made, str(tmp_path)):
        assert {name: worst(one, wanted) <= 1e-5 for name, one in got.items()} == {
            "batch": True,
            "sequence": True,
        }


@pytest.mark.parametrize("method", OTHERS)
def test_every_other_method_and_a_lora_train_alike(method, ranks, tmp_path):
    if method == "lora":
        base = tmp_path / "base"
        losses(0, 1, small("flow_matching", "run.steps=1"), str(base))
        sets = [f"roles.{role}.from={base}" for role in ("student", "text")]
        sets += ["roles.student.lora={rank=4, alpha=6.0}", "roles.text.trainable=false"]
        name = "flow_matching"
    else:
        name, sets = method, ["data.workers=0"] if method in ("decoder", "classify") else []
    made = {s: small(name, *sets, f"run.strategy={s}") for s in STRATEGIES}
    wanted = losses(0, 1, small(name, *sets), str(tmp_path / "single"))
    first, second = ranks(2, losses_of_each, made, str(tmp_path))
    assert first == second
    assert max(worst(got, wanted) for got in first.values()) <= 1e-5


def _interrupted(
    rank: int, size: int, recipe: Recipe, folder: str
) -> tuple[Numbers, Numbers, dict[str, Any], dict[str, Any]]:
    """A run without interruption and one with: what is logged, and what is learned."""
    straight, end = weights(rank, size, recipe, f"{folder}/straight")
    first, _ = weights(rank, size, recipe, f"{folder}/stopped", 1)
    rest, resumed = weights(rank, size, recipe, f"{folder}/stopped")
    return straight, [*first, *rest], end, resumed


@pytest.mark.parametrize(
    ("strategy", "method"),
    [  # after a kill, flow_matching under fsdp2 does so too: below
        *(("accelerate", method) for method in METHODS if method != "vae"),
        ("fsdp2", "dmd"),
        *(pytest.param(s, "vae", marks=pytest.mark.full) for s in ("accelerate", "fsdp2")),
    ],
)
def test_a_resumed_run_equals_one_without_interruption_bit_for_bit(
    strategy, method, ranks, tmp_path
):
    recipe = small(method, f"run.strategy={strategy}", muon=True)
    for size in (1, 2):
        answers = ranks(size, _interrupted, recipe, str(tmp_path / str(size)))
        straight, resumed, end, resumed_end = answers[0]
        assert straight == resumed and same(end, resumed_end)


def _killed_while_writing(rank: int, size: int, recipe: Recipe, folder: str) -> None:
    """All die when their parts of the second checkpoint are written, and nothing says so yet."""
    from torch.distributed.checkpoint import FileSystemWriter

    write, count = FileSystemWriter.write_data, itertools.count(1)

    def write_data(writer: Any, *args: Any) -> Any:
        done = write(writer, *args)
        if next(count) == 2:
            done.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    with mock.patch.object(FileSystemWriter, "write_data", write_data):
        losses(rank, size, recipe, folder)


def test_after_a_kill_while_parts_are_written_a_run_ends_as_one_without(ranks, tmp_path):
    recipe, often = (
        small("flow_matching", "run.strategy=fsdp2", f"run.save_every={n}", muon=True)
        for n in (0, 1)
    )
    pool = Ranks()
    try:
        with pytest.raises(RankError, match=r"rank 0 died\nrank 1 died"):
            pool(2, _killed_while_writing, often, str(tmp_path / "killed"))
    finally:
        pool.close()
    store = Checkpoints(tmp_path / "killed/checkpoints")
    assert len([*store.folder.glob(".step-00000002.writing/shards/*.distcp")]) == 2
    assert store.latest() == store.folder / "step-00000001"
    straight, end = ranks(2, weights, recipe, str(tmp_path / "straight"))[0]
    rest, resumed = ranks(2, weights, recipe, str(tmp_path / "killed"))[0]
    assert rest == straight[1:] and same(end, resumed)


def test_an_fsdp2_checkpoint_of_two_ranks_goes_on_with_one_and_with_three(ranks, tmp_path):
    """And what one process stored whole goes on in parts; an export reads either."""
    recipe = small("flow_matching", "run.strategy=fsdp2", "optim.weight_decay=0.1")
    wanted = alone("flow_matching", "optim.weight_decay=0.1")
    ranks(2, losses, recipe, str(tmp_path / "two"), 1)
    assert (tmp_path / "two/checkpoints/step-00000001/shards").is_dir()
    for size in (1, 3):
        folder = shutil.copytree(tmp_path / "two", tmp_path / str(size))
        rest = ranks(size, losses, recipe, str(folder))[0]
        assert worst(rest, wanted[1:]) <= 1e-5
    alone_again = small("flow_matching", "optim.weight_decay=0.1")
    single = losses(0, 1, alone_again, str(tmp_path / "single"), 1)
    rest = ranks(2, losses, recipe, str(tmp_path / "single"))[0]
    assert worst([*single, *rest], wanted) <= 1e-5
    read, whole = (load_run(tmp_path / n).roles["student"].net for n in ("3", "1"))
    for name, param in whole.named_parameters():
        torch.testing.assert_close(dict(read.named_parameters())[name], param, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_an_fsdp2_checkpoint_of_two_networks_under_muon_goes_on_with_three_ranks(ranks, tmp_path):
    """Each network has two optimizers, and both move before and after."""
    recipe = small("dmd", "run.strategy=fsdp2", "run.steps=4", muon=True)
    wanted = alone("dmd", "run.steps=4", muon=True)
    assert [one.keys() for one in wanted[:2]] == [one.keys() for one in wanted[2:]]
    first = ranks(2, losses, recipe, str(tmp_path), 2)[0]
    rest = ranks(3, losses, recipe, str(tmp_path))[0]
    assert len(first) == 2 and worst([*first, *rest], wanted) <= 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulation_recomputation_and_replicas_change_nothing(strategy, ranks, tmp_path):
    sets = ["run.batch=4", "run.accumulate=2"]
    axes = ["parallel.data=2"] if strategy == "accelerate" else ["parallel={data=2, shard=2}"]
    recipe = small("flow_matching", *sets, f"run.strategy={strategy}", "run.recompute=true", *axes)
    size = recipe.parallel.world_size
    got = ranks(size, losses, recipe, str(tmp_path / "run"))[0]
    assert worst(got, alone("flow_matching", *sets)) <= 1e-5


def _replicas_met(rank: int, size: int, recipe: Recipe, folder: str) -> int:
    """How often processes with equal weights exchange gradients of layers in a step."""
    job, calls = opened(recipe, Path(folder), size), []
    replicas = job.world.meshes.replicas_by_weights["data"].get_group()
    plain = torch.distributed.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("group") is replicas)
        return plain(*args, **kwargs)

    torch.distributed.all_reduce = counted
    try:
        list(train(job))
    finally:
        torch.distributed.all_reduce = plain
    return sum(calls)


def test_replicas_exchange_gradients_once_an_update(ranks, tmp_path):
    sets = ("run.strategy=fsdp2", "parallel={data=2, shard=2}", "run.steps=1", "run.batch=4")
    once, thrice = (small("flow_matching", *sets, f"run.accumulate={n}") for n in (1, 3))
    got = ranks(4, _replicas_met, once, str(tmp_path / "once"))
    assert got[0] > 0 and got == ranks(4, _replicas_met, thrice, str(tmp_path / "thrice"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("method", "axes"),
    [
        ("flow_matching", "{ulysses=2}"),
        ("flow_matching", "{ring=2, data=2}"),
        pytest.param("dmd", "{ulysses=2}", marks=pytest.mark.full),
    ],
)
def test_split_sequences_train_alike(method, axes, strategy, ranks, tmp_path):
    if strategy == "fsdp2":
        axes = axes.replace("data", "shard")
    recipe = small(method, f"run.strategy={strategy}", f"parallel={axes}")
    got = ranks(recipe.parallel.world_size, losses, recipe, str(tmp_path / "run"))
    assert all(one == got[0] for one in got)
    assert worst(got[0], alone(method)) <= 1e-5


def _bfloat16(rank: int, size: int, folder: str) -> dict[str, Any]:
    """What a bfloat16 run under fsdp2 keeps whole in float32, and what its validation sees."""
    from torch.distributed.tensor import DTensor

    sets = ("run.strategy=fsdp2", "run.dtype=bfloat16", *PLAIN_STEPS)
    job = opened(small("flow_matching", *sets), Path(folder), size)
    answer = trained(job)
    net = job.roles["student"].net
    whole = {n for n, p in net.named_parameters() if not isinstance(p, DTensor)}
    equal = [torch.equal(p, _everywhere(p)) for n, p in net.named_parameters() if n in whole]
    average = job.strategy.gather("student")
    with job.strategy.averaged() as roles:
        role = roles["student"]
        plain = {n: p.detach().clone() for n, p in role.net.named_parameters()} if not rank else {}
        right = [torch.equal(p, average[n].to(role.compute_dtype(n))) for n, p in plain.items()]
    return {"whole": whole, "equal": equal, "right": right, "answer": answer}


def _apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    return float(sum(abs(a[name] - b[name]).sum() for name in b))


def _everywhere(x: torch.Tensor) -> torch.Tensor:
    mean = x.detach().clone()
    torch.distributed.broadcast(mean, 0)
    return mean


def test_bfloat16_is_as_exact_as_alone_and_keeps_some_parameters_whole_and_all_in_float32(
    ranks, tmp_path
):
    got = ranks(2, _bfloat16, str(tmp_path / "run"))
    keep = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    assert got[0]["whole"] and all(any(k in n for k in keep) for n in got[0]["whole"])
    assert all(got[0]["equal"]) and all(got[1]["equal"]), "the same on every process"
    assert got[0]["right"] and all(got[0]["right"]), "validation sees rounded averages"
    exact, rough = (
        weights(0, 1, small("flow_matching", f"run.dtype={t}", *PLAIN_STEPS), str(tmp_path / t))
        for t in ("float32", "bfloat16")
    )
    ours = got[0]["answer"]
    assert worst(ours[0], exact[0]) <= 2 * worst(rough[0], exact[0])
    for role in exact[1]:
        assert _apart(ours[1][role], exact[1][role]) <= 1.2 * _apart(rough[1][role], exact[1][role])


def _muon_of_rows(rank: int, size: int) -> tuple[float, float]:
    """How far Muon on rows is from Muon on whole matrices, and how far that moved them."""
    import torch.distributed as dist

    spec = OptimSpec(lr=1e-3, muon={"lr": 1e-2, "weight_decay": 0.1})
    shapes = {"a": (4, 3), "b": (7, 5), "c": (7, 5), "d": (2, 6, 3), "bias": (7,), "z": (4, 3)}
    generator = torch.Generator().manual_seed(0)
    draw = {n: torch.randn(2, *s, generator=generator) for n, s in shapes.items()}
    whole = {n: x[0].clone() for n, x in draw.items()}

    def own(x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(size)
        return parts[rank] if rank < len(parts) else x[:0]

    def gather(x_rC: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        counts = [len(p) for p in torch.arange(shape[0]).chunk(size)]
        padded = torch.zeros(max(counts), shape[1])
        padded[: len(x_rC)] = x_rC
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded)
        counts += [0] * (size - len(counts))
        return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)])

    rows = {n: own(w).clone() for n, w in whole.items()}
    optimizers = [Optimizer(whole, spec), Optimizer(rows, spec, Rows(shapes, gather, own))]
    assert optimizers[0].muon_names == optimizers[1].muon_names == ["b", "c", "d"]
    for step in range(3):
        for values, cut in ((whole, lambda x: x), (rows, own)):
            for n, w in values.items():
                w.grad = cut(draw[n][1] * (step + 1)).clone()
        for optimizer in optimizers:
            optimizer.step(step, 3)
    names = optimizers[0].muon_names
    error = max(float((own(whole[n]) - rows[n]).abs().max()) for n in names if len(rows[n]))
    return error, min(float((whole[n] - draw[n][0]).abs().max()) for n in names)


def test_muon_on_rows_makes_the_update_of_whole_matrices(ranks):
    for error, moved in ranks(3, _muon_of_rows):
        assert error <= 1e-3 * moved


@pytest.mark.parametrize(
    ("sets", "size", "message"),
    [
        ([], 2, "'single' trains in one process, not 2; use accelerate .*, fsdp2 or deepspeed"),
        (["run.strategy=accelerate", "parallel.shard=2"], 2, "whole weights.*use data = 2, or"),
        (["run.strategy=fsdp3"], 2, "strategy 'fsdp3' is unknown; did you mean 'fsdp2'"),
        (["run.strategy=fsdp2", "parallel.shard=4"], 2, "shard 4 need 4 processes, not 2"),
        (["run.strategy=fsdp2", "run.compile=true"], 2, "run.compile must be false under"),
        (["run.strategy=fsdp2", "run.strategy_args.zero=2"], 2, "zero in run.strategy_args of"),
        (["run.strategy=accelerate", "run.batch=4"], 3, "run.batch 4 .* of 3.*nearest: 3, 6"),
        (["run.strategy=accelerate", "run.batch=1"], 2, "run.batch 1 .* of 2.*nearest: 2"),
        (["parallel.guidance=2"], 2, "parallel.guidance 2 must be 1 in training"),
        (
            [
                "run.strategy=fsdp2",
                "parallel.ring=2",
                'roles.student.attention={pattern="vsa", args={sparsity=0.5, tile=[1,2,2]}}',
            ],
            2,
            r"roles\.student\.attention: parallel ring=2 cuts sequences.*nearest: ulysses=2",
        ),
        (
            ["run.strategy=accelerate", "parallel.ulysses=2", "run.compile=true"],
            2,
            "run.compile must be false where sequences are split",
        ),
    ],
)
def test_an_impossible_recipe_is_refused_before_a_process_joins(sets, size, message):
    with pytest.raises(ValueError, match=message):
        recipe = tiny("flow_matching", "run.batch=6", *sets)
        loop.check(recipe, recipe.degrees(size))


def test_a_torch_in_which_it_was_not_seen_to_work_is_refused_by_fsdp2(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    recipe = tiny("flow_matching", "run.strategy=fsdp2")
    loop.check(recipe, ParallelConfig())
    with pytest.raises(ValueError, match=r"fsdp2' needs torch 2\.13 or newer, not 2\.11\.0"):
        loop.check(recipe, ParallelConfig(shard=2))


def test_a_method_without_sequences_cannot_split_them():
    with pytest.raises(ValueError, match="method vae has no sequences; use data or shard"):
        loop.check(tiny("vae", "run.strategy=accelerate"), ParallelConfig(ulysses=2))


def test_recomputation_without_a_denoiser_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"run\.recompute is for denoisers that learn"):
        opened(tiny("vae", "run.recompute=true"), tmp_path)


@pytest.mark.parametrize("package", ["accelerate"])
def test_a_missing_package_is_refused_with_the_extra_that_brings_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    recipe = tiny("vae", f"run.strategy={package}")
    with pytest.raises(ValueError, match=rf"needs the package {package}; .*pip install -e '\.\["):
        strategies.find(recipe).check(recipe, ParallelConfig())


def test_damaged_parts_are_one_line_that_names_them(ranks, tmp_path):
    recipe = small("flow_matching", "run.strategy=fsdp2")
    ranks(2, losses, recipe, str(tmp_path), 1)
    store = Checkpoints(tmp_path / "checkpoints")
    path = store.latest()
    assert path is not None
    for part in (path / "shards").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"shards cannot be read"):
        store.read_state(path)
