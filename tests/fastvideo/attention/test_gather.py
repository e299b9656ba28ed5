"""Gathered tiles: what is multiplied, and how the operation differentiates and compiles."""

from __future__ import annotations

import pytest
import torch

from fastvideo.attention import Vsa, plan, sparse
from fastvideo.attention.backends import flex, gather, reference
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


@pytest.mark.parametrize("grid", [TokenGrid(5, 6, 7), TokenGrid(9, 15, 13), TokenGrid(1, 9, 6)])
def test_gather_fills_no_list_beyond_the_next_multiple_of_16_tokens(grid):
    """Lists of up to 1,024 tokens; longer ones grow by 1 / 64 at most."""
    tiles = plan(Vsa(sparsity=0.5), grid).tiles
    lists = any_lists(tiles, count=max(1, tiles.num // 4))
    sight = gather._Sight.of(*gather._tensors(tiles, lists))
    seen_R = sight.size_RK.sum(-1)
    rows = []
    for row_R, size, length in sight.groups():
        assert (tiles.sizes_N[row_R % tiles.num] == size).all()
        over_R = length - seen_R[row_R]
        assert (over_R >= 0).all()
        assert (over_R < (16 if length <= 1024 else max(16, length / 64))).all()
        rows += row_R.tolist()
    assert sorted(rows) == list(range(len(seen_R)))


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
