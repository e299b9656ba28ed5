"""Gathered tiles: what is multiplied, and how the operation differentiates and compiles."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastvideo.attention import Vsa, plan, sparse
from fastvideo.attention.backends import flex, gather, masked, reference
from fastvideo.attention.layout import Lists
from fastvideo.shapes import TokenGrid

WAN = TokenGrid(21, 30, 52)  # 81 frames of 480 x 832


def draw(grid, *, batch=1, heads=2, size=16, count=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, grid.num_tokens, heads, size)
    return [torch.randn(shape, generator=g) for _ in range(count)]


def any_lists(tiles, *, count, heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(1, heads, tiles.num, tiles.num, generator=g).argsort(-1)
    return Lists(order[..., :count].sort(-1).values)


# issued work


def test_work_counts_the_pairs_that_the_mask_shows():
    tiles = plan(Vsa(sparsity=0.5, tile=(2, 3, 4)), TokenGrid(5, 6, 7)).tiles
    lists = any_lists(tiles, count=5)
    short = Lists(lists.index_BHNK, torch.randint(1, 6, lists.index_BHNK.shape[:-1]))
    for some in (lists, short):
        needed = int(sparse.mask(tiles, some).sum())
        assert sparse.work(tiles, some) == (needed, needed)


def test_work_of_tiles_that_are_rounded_up_is_that_of_a_whole_number_of_them():
    tiles = plan(Vsa(sparsity=0.0, tile=(2, 4, 4)), TokenGrid(3, 5, 4)).tiles  # 32, 8, 16 and 4
    every = Lists(torch.arange(tiles.num).expand(1, 1, tiles.num, -1))
    assert sorted(tiles.sizes_N.tolist()) == [4, 8, 16, 32]
    assert sparse.work(tiles, every, multiple=16) == ((16 + 16 + 16 + 32) ** 2, 60**2)


def test_gather_multiplies_what_it_must_where_flex_fills_every_edge_tile_up():
    tiles = plan(Vsa(sparsity=0.8), WAN).tiles
    lists = any_lists(tiles, count=125)
    assert 1.0 <= gather.issued(tiles, lists) < 1.02
    assert flex.issued(tiles, lists) == pytest.approx((39936 / 32760) ** 2, rel=0.02)


def test_whole_tiles_of_any_size_issue_no_more_than_they_need():
    tiles = plan(Vsa(sparsity=0.8, tile=(3, 5, 4)), WAN).tiles
    lists = any_lists(tiles, count=110)
    assert gather.issued(tiles, lists) == flex.issued(tiles, lists) == 1.0


@pytest.mark.parametrize("join", [0, gather._CALL_PAIRS], ids=["apart", "joined"])
@pytest.mark.parametrize("grid", [TokenGrid(5, 6, 7), TokenGrid(9, 15, 13), TokenGrid(1, 9, 6)])
def test_gather_fills_lists_to_a_multiple_of_16_tokens_or_as_far_as_another_call_would_cost(
    grid, join, monkeypatch
):
    """Lists of up to 1,024 tokens; longer ones grow by 1 / 64 at most before they are joined."""
    monkeypatch.setattr(gather, "_CALL_PAIRS", join)
    tiles = plan(Vsa(sparsity=0.5), grid).tiles
    lists = any_lists(tiles, count=max(1, tiles.num // 4))
    sight = gather._Sight.of(*gather._tensors(tiles, lists))
    seen_R = sight.size_RK.sum(-1)
    rows = []
    for row_R, size, length in sight.groups():
        assert (tiles.sizes_N[row_R % tiles.num] == size).all()
        over_R = length - seen_R[row_R]
        step = 16 if length <= 1024 else max(16, length / 64)
        assert (over_R >= 0).all()
        assert int((over_R - step).clamp_min(0).sum()) * size <= join
        assert join or (over_R < step).all()
        rows += row_R.tolist()
    assert sorted(rows) == list(range(len(seen_R)))


def test_joined_lists_are_fewer_calls_and_give_the_same():
    grid = TokenGrid(5, 9, 10)
    tiles = plan(Vsa(sparsity=0.5), grid).tiles
    lists, (q, k, v) = any_lists(tiles, count=4), draw(grid, count=3)
    sight = gather._Sight.of(*gather._tensors(tiles, lists))
    sizes = {size for _, size, _ in sight.groups()}
    assert len(list(sight.groups())) == len(sizes), "one for each size of a tile"
    torch.testing.assert_close(
        gather.fine(q, k, v, tiles, lists), reference.fine(q, k, v, tiles, lists)
    )


def test_a_sparsity_that_rises_compiles_twice_at_most():
    """With its first value, then with any: how many tiles are selected is data to the compiler."""
    grid = TokenGrid(4, 8, 8)
    leaves = [x.requires_grad_() for x in draw(grid)]

    def attend(q, k, v, gate, layout, backend):
        return backend.attend(q, k, v, layout, gate)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for backend in (gather, masked):
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for sparsity in (0.0, 0.1, 0.3, 0.5, 0.8):
            layout = plan(Vsa(sparsity=sparsity, tile=(2, 2, 4)), grid)
            out = compiled(*leaves, layout, backend)
            torch.testing.assert_close(out, reference.attend(*leaves[:3], layout, leaves[3]))
            torch.autograd.grad(out.sum(), leaves)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= before + 2


MEMORY = """
import torch
from fastvideo.attention import Vsa, plan
from fastvideo.attention.backends import gather
from fastvideo.shapes import TokenGrid
torch.set_num_threads(1)
def call(grid):
    layout = plan(Vsa(sparsity=0.8), grid)
    q = torch.zeros(1, grid.num_tokens, 4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        gather.attend(q, q, q, layout, q)
def peak():  # ru_maxrss would begin with that of the process that started this one
    status = open("/proc/self/status").read().split()
    return int(status[status.index("VmHWM:") + 1]) // 1024
call(TokenGrid(4, 4, 4))
before = peak()
call(TokenGrid(8, 32, 33))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux notes the peak")
def test_a_forward_adds_a_few_times_its_inputs_to_the_memory():
    """8,448 uneven tokens: q is 4 MiB, the scores of all pairs would be 544 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 4 < int(done.stdout) < 120, "MiB"


# gather


def test_gradients_arrive_whatever_wants_them():
    grid = TokenGrid(3, 5, 4)
    layout = plan(Vsa(sparsity=0.5, tile=(2, 2, 4)), grid)
    q, k, v, gate = draw(grid)
    for x in (q, k, v, gate):
        x.requires_grad_()
        grads = []
        for backend in (gather, reference):
            out = backend.attend(q, k, v, layout, gate)
            grads.append(torch.autograd.grad(out.square().sum(), x)[0])
        torch.testing.assert_close(*grads)
        x.requires_grad_(False)


def test_gather_passes_pytorch_s_own_checks_of_an_operation():
    grid = TokenGrid(3, 5, 4)
    tiles = plan(Vsa(sparsity=0.5, tile=(2, 2, 4)), grid).tiles
    leaves = [x.requires_grad_() for x in draw(grid, count=3)]
    arguments = (*leaves, *gather._tensors(tiles, any_lists(tiles, count=2)))
    torch.library.opcheck(torch.ops.fastvideo.gather_attention.default, arguments)
    means = (leaves[0], tiles.tile_L, tiles.sizes_N)
    torch.library.opcheck(torch.ops.fastvideo.tile_means.default, means)


def test_gather_is_one_operation_to_the_compiler():
    grid = TokenGrid(3, 5, 4)
    layout = plan(Vsa(sparsity=0.5, tile=(2, 2, 4)), grid)
    leaves = [x.requires_grad_() for x in draw(grid)]

    def attend(q, k, v, gate):
        return gather.attend(q, k, v, layout, gate)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    out, wanted = compiled(*leaves), attend(*leaves)
    torch.testing.assert_close(out, wanted)
    grads = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, wanted))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


UNWATCHED = """
import sys, torch
from fastvideo.attention import Vsa, plan
from fastvideo.attention.backends import gather
from fastvideo.shapes import TokenGrid
for grid in (TokenGrid(4, 4, 4), TokenGrid(3, 5, 4)):
    layout = plan(Vsa(sparsity=0.5, tile=(2, 2, 4)), grid)
    q = torch.randn(1, grid.num_tokens, 2, 16)
    gather.attend(q, q, q, layout, q)
assert "torch._dynamo" not in sys.modules, "nobody compiles here"
leaf = q.clone().requires_grad_()
gather.attend(leaf, q, q, layout, q)
assert "torch._dynamo" in sys.modules, "an operation imports it: the test would notice"
"""


def test_inference_does_not_import_the_compiler_which_takes_longer_than_a_small_clip():
    command = [sys.executable, "-c", UNWATCHED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inference_and_training_attend_to_the_same_bit():
    grid = TokenGrid(3, 5, 4)
    layout = plan(Vsa(sparsity=0.5, tile=(2, 2, 4)), grid)
    q, k, v, gate = draw(grid)
    unwatched = gather.attend(q, k, v, layout, gate)
    watched = gather.attend(q.requires_grad_(), k, v, layout, gate)
    assert torch.equal(unwatched, watched)
