"""FlexAttention compiled: what it serves, its blocks, its compilations."""

from __future__ import annotations

import logging

import pytest
import torch

from fastvideo.attention import Vsa, choose, plan
from fastvideo.attention.backends import flex, gather, reference
from fastvideo.attention.choice import Need
from fastvideo.attention.layout import Lists
from fastvideo.shapes import TokenGrid


def draw(grid, *, batch=1, heads=2, size=16, count=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, grid.num_tokens, heads, size)
    return [torch.randn(shape, generator=g) for _ in range(count)]


def any_lists(tiles, *, count, heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(1, heads, tiles.num, tiles.num, generator=g).argsort(-1)
    return Lists(order[..., :count].sort(-1).values)


def need(layout, *, device="cpu", dtype=torch.float32, grad=False):
    return Need(layout, dtype, torch.device(device), grad, layout.grid.num_tokens, 16)


def test_flex_says_what_it_cannot_serve():
    layout = plan(Vsa(sparsity=0.5), TokenGrid(4, 8, 8))
    assert flex.unsupported(need(layout)) is None
    assert flex.unsupported(need(layout, grad=True)) == "has no backward pass on a CPU"
    assert flex.unsupported(need(layout, grad=True, device="cuda")) is None
    assert "not float64" in flex.unsupported(need(layout, dtype=torch.float64))
    assert "not mps" in flex.unsupported(need(layout, device="mps"))


def test_what_compiles_is_not_chosen_unless_it_is_named(caplog):
    layout = plan(Vsa(sparsity=0.8), TokenGrid(8, 16, 16))
    common = {"layout": layout, "dtype": torch.bfloat16, "device": "cpu", "needs_grad": False}
    assert choose(**common) is gather
    with caplog.at_level(logging.INFO, logger="fastvideo"):
        assert choose("flex", **common) is flex
    known = f"the first call of a size takes about {flex.compile_s():.0f} s more"
    assert known in caplog.text, "what was measured, or 10 s"


@pytest.mark.parametrize(
    ("slots", "on_cpu", "on_gpu"), [(64, 64, 64), (60, 60, 64), (384, 384, 384), (24, 24, 32)]
)
def test_blocks_are_tiles_on_a_cpu_and_what_the_kernel_can_cut_on_a_gpu(slots, on_cpu, on_gpu):
    assert flex._block(slots, torch.device("cpu")) == on_cpu
    assert flex._block(slots, torch.device("cuda")) == on_gpu


def test_flex_equals_the_reference_and_a_second_layout_of_a_size_does_not_compile(caplog):
    grid = TokenGrid(5, 6, 7)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    for seed in range(2):
        layout = plan(Vsa(sparsity=0.5, tile=(2, 3, 4)), grid)
        lists = any_lists(layout.tiles, count=4, seed=seed)
        short = Lists(lists.index_BHNK, torch.full(lists.index_BHNK.shape[:-1], 4 - seed))
        q, k, v = draw(grid, count=3, seed=seed)
        caplog.clear()
        with torch.no_grad(), caplog.at_level(logging.INFO, logger="fastvideo"):
            out = flex.fine(q, k, v, layout.tiles, short)
        assert ("to compile and run" in caplog.text) == (seed == 0)
        torch.testing.assert_close(out, reference.fine(q, k, v, layout.tiles, short))
    assert flex.compile_s() > 0
    assert stats["unique_graphs"] == before + 1


@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(5, 6, 7),
        *(pytest.param(TokenGrid(*g), marks=pytest.mark.full) for g in ((1, 9, 6), (5, 1, 11))),
    ],
    ids=str,
)
def test_flex_in_bfloat16_with_coarse_branch_gate_and_batch_agrees_with_the_reference(grid):
    layout = plan(Vsa(sparsity=0.5, tile=(2, 3, 4)), grid)
    q, k, v, gate = (x.bfloat16() for x in draw(grid, batch=2, heads=3))
    with torch.no_grad():
        out = flex.attend(q, k, v, layout, gate)
        wanted = reference.attend(*(x.float() for x in (q, k, v)), layout, gate.float())
    assert out.dtype == torch.bfloat16
    error = (out.float() - wanted).abs().max()
    assert error <= 2e-2 * wanted.abs().max()


def test_more_sizes_than_pytorch_compiles_of_one_function_are_served(monkeypatch):
    layout = plan(Vsa(sparsity=0.5, tile=(2, 3, 4)), TokenGrid(2, 3, 4))
    limit = torch._dynamo.config.patch(recompile_limit=1)
    lists, eagerly = any_lists(layout.tiles, count=1, heads=1), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: eagerly(f, backend="eager", **how))
    with limit, torch.no_grad():
        for batch in (3, 4, 5):  # sizes that no other test compiles
            q, k, v = draw(layout.grid, batch=batch, heads=1, count=3)
            assert flex.fine(q, k, v, layout.tiles, lists).shape == q.shape
    flex._compiled.cache_clear()
    flex._first_calls.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(4, 4, 4), (3, 5, 4), (2, 3, 4)])
def test_flex_differentiates_on_a_gpu(tile):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    grid = TokenGrid(5, 14, 15)
    tiles = plan(Vsa(sparsity=0.5, tile=tile), grid, "cuda").tiles
    lists = Lists(any_lists(tiles, count=4).index_BHNK.cuda())
    q, k, v, g = (x.cuda() for x in draw(grid, size=64))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    outs = [b.fine(*leaves, tiles, lists) for b in (flex, reference)]
    grads = [torch.autograd.grad(out, leaves, g) for out in outs]
    for actual, wanted in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(actual, wanted, atol=2e-2, rtol=2e-2)
