"""The Triton backend: kernels in Triton's interpreter and compiled for GPUs, its reasons, its work.

The interpreter is switched on before Triton is imported, so those tests run in a process of their
own, which runs this file again.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastvideo.attention import Dense, Sta, Vsa, plan
from fastvideo.attention.backends import gather, reference, triton
from fastvideo.attention.choice import Need
from fastvideo.attention.layout import Lists
from fastvideo.shapes import TokenGrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GRID = TokenGrid(5, 4, 5)


def draw(grid, *, batch=2, heads=2, size=16, count=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, batch, grid.num_tokens, heads, size, generator=g).unbind()


def any_lists(tiles, *, batch=2, heads=2, count=2):
    g = torch.Generator().manual_seed(1)
    order = torch.rand(batch, heads, tiles.num, tiles.num, generator=g)
    return Lists(order.argsort(-1)[..., :count].sort(-1).values.to(tiles.sizes_N.device))


def check(tiles, lists, q, k, v, grad, *, expected=reference.fine, tolerance=1e-5):
    results = []
    for fine, leaves in ((triton.fine, (q, k, v)), (expected, (q.float(), k.float(), v.float()))):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = fine(*leaves, tiles, lists)
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))))
    for actual, wanted in zip(*results, strict=True):
        assert actual.dtype == q.dtype
        assert (actual.float() - wanted).abs().max() <= tolerance * wanted.abs().max()


# in the interpreter

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")


@pytest.mark.skipif(INTERPRETED, reason="it is what runs the others")
def test_the_kernels_agree_with_the_reference_in_the_interpreter():
    pytest.importorskip("triton", minversion="3.7", reason="older ones need NumPy below 2.4")
    command = [sys.executable, "-m", "pytest", "-k", "interpreted", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [*command, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


@interpreted
@pytest.mark.parametrize(
    ("grid", "tile", "size", "batch"),
    [
        (GRID, (2, 4, 4), 16, 1),  # whole, half and quarter tiles
        (TokenGrid(1, 3, 9), (4, 4, 4), 24, 2),  # one frame, rest of a chunk, odd heads
        (TokenGrid(5, 4, 5), (5, 4, 4), 16, 1),  # a tile of two blocks
    ],
)
def test_interpreted_given_lists_give_the_reference(grid, tile, size, batch):
    tiles = plan(Vsa(top_k=1, tile=tile), grid).tiles
    lists = any_lists(tiles, batch=batch, count=min(2, tiles.num))
    check(tiles, lists, *draw(grid, batch=batch, size=size))


@interpreted
def test_interpreted_windows_of_each_head_give_the_reference():
    layout = plan(Sta(((1, 1, 1), (2, 1, 2)), tile=(3, 4, 3)), GRID)
    check(layout.tiles, layout.lists, *draw(GRID))


@interpreted
def test_interpreted_tiles_that_nobody_sees_have_no_gradient():
    tiles = plan(Vsa(top_k=1, tile=(2, 4, 4)), GRID).tiles
    lists = Lists(torch.ones(1, 1, tiles.num, 1, dtype=torch.int64))
    check(tiles, lists, *draw(GRID, batch=1))


@interpreted
def test_interpreted_strided_tensors_and_an_expanded_gradient_give_the_reference():
    tiles = plan(Vsa(top_k=1, tile=(3, 4, 5)), GRID).tiles
    (qkv,) = draw(GRID, batch=1, size=48, count=1)
    q, k, v = qkv.split(16, dim=-1)
    assert not q.is_contiguous()
    check(tiles, any_lists(tiles, batch=1), q, k, v, torch.ones(()).expand(q.shape))


@interpreted
def test_interpreted_attention_with_a_coarse_branch_and_gate_gives_the_reference():
    layout = plan(Vsa(top_k=2, tile=(2, 4, 4)), GRID)
    results = []
    for backend in (triton, reference):
        leaves = [x.clone().requires_grad_() for x in draw(GRID, batch=1)]
        out = backend.attend(*leaves[:3], layout, leaves[3])
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@interpreted
def test_interpreted_calls_in_two_threads_give_what_each_gives_alone():
    calls = []
    for i, grid in enumerate((GRID, TokenGrid(3, 4, 4))):
        tiles = plan(Vsa(top_k=1, tile=(2, 4, 4)), grid).tiles
        calls.append((*draw(grid, count=3, seed=i), tiles, any_lists(tiles)))
    alone = [triton.fine(*call) for call in calls]
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda i: triton.fine(*calls[i % 2]), range(10))
        assert all(torch.equal(out, alone[i % 2]) for i, out in enumerate(found))


# without running a kernel


@pytest.mark.parametrize(
    ("need", "message"),
    [
        ({"pattern": Dense()}, "sparse patterns only"),
        ({"head_dim": 320}, "at most 128 channels, not 320"),
        ({}, "needs an NVIDIA GPU, not cpu"),
    ],
)
def test_a_need_that_is_not_served_gets_the_reason(need, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(triton, "_is_interpreted", lambda: False)
    layout = plan(need.get("pattern", Vsa(top_k=1)), GRID)
    head_dim = need.get("head_dim", 128)
    reason = triton.unsupported(
        Need(layout, torch.bfloat16, torch.device("cpu"), False, head_dim=head_dim)
    )
    assert message in reason


def test_without_triton_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    need = Need(plan(Vsa(top_k=1), GRID), torch.bfloat16, torch.device("cuda"), False)
    assert "not installed" in triton.unsupported(need)


@pytest.mark.parametrize(("tile", "most"), [((4, 4, 4), 1.02), ((3, 5, 4), 1.15)])
def test_at_the_published_size_little_more_is_executed_than_needed(tile, most):
    """Padded tiles of 4x4x4 would execute 1.49 times as much (facts/methods.md, 3.1)."""
    tiles = plan(Vsa(sparsity=0.8, tile=tile), TokenGrid(21, 30, 52)).tiles
    lists = any_lists(tiles, batch=1, count=Vsa(sparsity=0.8).num_selected(tiles.num))
    assert 1 <= triton.issued(tiles, lists) <= most


# compiled without a GPU

TYPES = {
    **dict.fromkeys(("lse", "delta"), "*fp32"),
    **dict.fromkeys(("starts", "sizes"), "*i64"),
    **dict.fromkeys(("spans", "chunks", "used"), "*i32"),
    "seen": "*i1",
    "strides": ("i32",) * 4,
}
CONSTANTS = {"HEAD": 128, "BLOCK_M": 64, "BLOCK_N": 64, "NUM": 624, "BLOCK": 1024, "PARTS": 4}


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize(("capability", "product"), [(90, "wgmma.mma_async"), (100, "tcgen05.mma")])
@pytest.mark.parametrize("name", ["forward", "backward_q", "backward_kv", "pack", "means"])
def test_kernels_compile_for_hopper_and_blackwell_and_use_their_tensor_cores(
    name, capability, product
):
    compiler = pytest.importorskip("triton.compiler")
    kernels = triton._kernels()
    kernel = vars(kernels)[name]
    view = kernels.View("*bf16", "i32", "i32", "i32")
    known = TYPES | {"work": kernels.Work(*["*i32"] * 3, *["i32"] * 3, "fp32", "fp32")}
    constants = {n: CONSTANTS[n] for n in kernel.arg_names if n in CONSTANTS}
    types = {n: "constexpr" if n in constants else known.get(n, view) for n in kernel.arg_names}
    # As at run time: all addresses and strides are multiples of 16.
    is_round = lambda kind: kind.startswith("*") or kind == "i32"  # noqa: E731
    rounds = {}
    for i, kind in enumerate(types.values()):
        parts = {(i,): kind} if isinstance(kind, str) else {(i, j): x for j, x in enumerate(kind)}
        rounds |= {at: [["tt.divisibility", 16]] for at, x in parts.items() if is_round(x)}
    if name == "pack":
        rounds.pop((kernel.arg_names.index("strides"), 3))  # neighbours
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    source = compiler.ASTSource(kernel, types, constants, rounds)
    warps = 8 if name == "backward_kv" else 4
    built = compiler.compile(source, target=target, options={"num_warps": warps, "num_stages": 3})
    assert (product in built.asm["ptx"]) == (name not in ("pack", "means"))
    assert built.metadata.shared <= 227 * 1024


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 96, 128])
@pytest.mark.parametrize("tile", [(4, 4, 4), (3, 5, 4)])
def test_a_published_size_on_a_gpu_agrees_with_gather(tile, size):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    grid = TokenGrid(21, 30, 52)
    tiles = plan(Vsa(sparsity=0.8, tile=tile), grid, "cuda").tiles
    tensors = [x.to("cuda", torch.bfloat16) for x in draw(grid, batch=1, size=size)]
    lists = any_lists(tiles, batch=1, count=Vsa(sparsity=0.8).num_selected(tiles.num))
    check(tiles, lists, *tensors, expected=gather.fine, tolerance=2e-2)


@pytest.mark.gpu
def test_a_second_call_on_a_gpu_never_waits_for_it():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layout = plan(Vsa(sparsity=0.8), TokenGrid(5, 30, 52), "cuda")
    leaves = [x.to("cuda", torch.bfloat16) for x in draw(layout.grid, batch=1, size=128)]
    leaves = [x.requires_grad_() for x in leaves]
    for mode in ("default", "error"):  # the first call tunes, and reads the layout
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            triton.attend(*leaves[:3], layout, leaves[3]).backward(leaves[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
