"""Sparse patterns: tiles, the choice among them, and every block-sparse backend on given lists."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
import torch.nn.functional as F

from fastvideo import registry
from fastvideo.attention import Dense, Sta, Vsa, choose, one_tile, parse, plan, sparse, unparse
from fastvideo.attention.backends import gather, masked, reference
from fastvideo.attention.choice import PACKAGE, Need
from fastvideo.attention.layout import Lists
from fastvideo.shapes import TokenGrid

SPARSE = [
    name for name in registry.names(PACKAGE) if hasattr(registry.module(PACKAGE, name), "fine")
]
INSTANT = [name for name in SPARSE if name != "flex"]  # which compiles each size
# whole tiles, one frame, one row, sizes that no tile divides, smaller than a tile
GRIDS = [
    TokenGrid(4, 8, 8),
    TokenGrid(1, 9, 6),
    TokenGrid(5, 1, 11),
    TokenGrid(5, 6, 7),
    TokenGrid(2, 3, 3),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def draw(grid, *, batch=2, heads=3, size=16, count=4, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, grid.num_tokens, heads, size)
    return [torch.randn(shape, generator=g).to(device, dtype) for _ in range(count)]


def any_lists(tiles, *, batch=2, heads=3, count=None, seed=0):
    """Draw which tiles each query tile sees: other ones in every clip and head."""
    g = torch.Generator().manual_seed(seed)
    count = count or max(1, tiles.num // 2)
    order = torch.rand(batch, heads, tiles.num, tiles.num, generator=g).argsort(-1)
    return Lists(order[..., :count].sort(-1).values.to(tiles.sizes_N.device))


# patterns


@pytest.mark.parametrize(
    ("sparsity", "num", "count"),
    [(0.0, 7, 7), (0.8, 624, 125), (0.9, 624, 63), (0.95, 1200, 61), (0.99, 7, 1)],
)
def test_a_sparsity_selects_as_many_tiles_as_fastwan_was_trained_with(sparsity, num, count):
    assert Vsa(sparsity=sparsity).num_selected(num) == count


def test_a_top_k_beyond_the_tiles_is_all_of_them():
    assert Vsa(top_k=9).num_selected(4) == 4


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vsa", {}, "either sparsity, such as 0.8, or top_k"),
        ("vsa", {"sparsity": 0.5, "top_k": 2}, "either sparsity"),
        ("vsa", {"sparsity": 1.0}, "at least 0 and below 1; nearest: 0.99"),
        ("vsa", {"sparsity": -0.1}, "nearest: 0"),
        ("vsa", {"sparsity": "0.8"}, "sparsity '0.8' must be a number"),
        ("vsa", {"top_k": 0}, "nearest: 1"),
        ("vsa", {"top_k": 1.5}, "whole number"),
        ("vsa", {"sparsity": 0.8, "tile": [4, 0, 4]}, r"nearest: \(4, 1, 4\)"),
        ("vsa", {"sparsity": 0.8, "tile": 4}, "three whole numbers"),
        ("vsa", {"sparsty": 0.8}, "did you mean 'sparsity'"),
        ("sta", {}, "needs windows"),
        ("sta", {"windows": [[3, 0, 3]]}, r"nearest: \(3, 1, 3\)"),
        ("sta", {"windows": [3, 3]}, "three whole numbers"),
        ("vas", {}, "did you mean 'vsa'"),
    ],
)
def test_a_wrong_pattern_is_refused_with_the_rule_and_the_nearest(name, args, message):
    with pytest.raises(ValueError, match=message):
        parse(name, args)


@pytest.mark.parametrize(
    "pattern", [Dense(), Vsa(sparsity=0.8), Vsa(top_k=3, tile=(3, 5, 4)), Sta(((1, 3, 3),))]
)
def test_a_pattern_survives_its_name_and_arguments(pattern):
    assert parse(*unparse(pattern)) == pattern


def test_one_window_may_stand_for_all_heads():
    assert parse("sta", {"windows": [1, 3, 3]}) == Sta(((1, 3, 3),))


# layouts


@pytest.mark.parametrize("tile", [(4, 4, 4), (3, 5, 4), (2, 1, 3)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tiles_hold_every_token_once_in_the_order_of_the_grid(grid, tile):
    layout = plan(Vsa(sparsity=0.5, tile=tile), grid)
    tiles = layout.tiles
    places = list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))
    by_tile: dict[tuple[int, ...], list[int]] = {}
    for i, place in enumerate(places):
        by_tile.setdefault(tuple(p // s for p, s in zip(place, tile, strict=True)), []).append(i)
    assert layout.order_L.tolist() == [i for key in sorted(by_tile) for i in by_tile[key]]
    assert tiles.sizes_N.tolist() == [len(by_tile[key]) for key in sorted(by_tile)]
    for key, part in zip(
        sorted(by_tile), layout.order_L.split(tiles.sizes_N.tolist()), strict=True
    ):
        assert part.tolist() == by_tile[key]
    assert tiles.starts_N.tolist() == [0, *tiles.sizes_N.cumsum(0).tolist()[:-1]]
    x = torch.randn(2, grid.num_tokens)
    assert torch.equal(layout.restore(layout.arrange(x, 1), 1), x)


def test_the_published_sizes_make_the_published_numbers_of_tiles():
    grid = TokenGrid(21, 30, 52)
    sizes = plan(Vsa(sparsity=0.8), grid).tiles.sizes_N
    assert {n: int((sizes == n).sum()) for n in (64, 16, 32, 8)} == {64: 455, 16: 91, 32: 65, 8: 13}
    other = plan(Vsa(sparsity=0.8, tile=(3, 5, 4)), grid).tiles
    assert (other.num, other.num_slots, other.is_uniform) == (546, 60, True)


@pytest.mark.parametrize("windows", [((1, 3, 3),), ((3, 1, 2), (1, 5, 1), (3, 5, 4))])
def test_a_window_is_the_neighbourhood_of_a_centre_moved_inside(windows):
    axes = (3, 5, 4)
    layout = plan(Sta(windows, tile=(1, 1, 1)), TokenGrid(*axes))
    seen = sparse.mask(layout.tiles, layout.lists)[0]
    places = list(itertools.product(*map(range, axes)))
    for h, window in enumerate(windows):
        for q, query in enumerate(places):
            for k, key in enumerate(places):
                inside = all(
                    abs(max(min(a, n - 1 - size // 2), size // 2) - b) <= size // 2
                    or size >= n  # an even window as large as the axis
                    for a, b, n, size in zip(query, key, axes, window, strict=True)
                )
                assert bool(seen[h, q, k]) == inside


def test_a_window_larger_than_the_canvas_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"\(1, 4, 1\) is larger than .*nearest: \(1, 2, 1\)"):
        plan(Sta(((1, 4, 1),), tile=(4, 4, 4)), TokenGrid(4, 8, 8))


def test_a_tile_larger_than_the_canvas_is_one_tile_and_says_that_sparsity_means_nothing():
    vsa, grid = Vsa(sparsity=0.8, tile=(1 << 70, 9, 9)), TokenGrid(3, 5, 4)
    layout, text = plan(vsa, grid), one_tile(vsa, grid)
    assert (layout.tiles.num, layout.sees_all) == (1, True)
    assert text and "sparsity has no effect" in text
    assert one_tile(Vsa(sparsity=0.8, tile=(3, 5, 3)), grid) is None
    assert one_tile(Dense(), grid) is None


def test_few_tiles_are_told_to_bring_no_speed(caplog):
    with caplog.at_level(logging.INFO, logger="fastvideo"):
        plan(Vsa(sparsity=0.8), TokenGrid(5, 8, 8))
        assert "8 tiles of 5x8x8 tokens (frames, rows, columns) are few" in caplog.text
        caplog.clear()
        plan(Vsa(sparsity=0.8), TokenGrid(8, 16, 16))
    assert not caplog.text


# selection


def test_the_best_are_selected_and_of_equals_those_of_lowest_index():
    scores = torch.tensor([[[[1.0, 3.0, 3.0, 2.0, 3.0]], [[0.0, -0.0, -1.0, 0.0, -math.inf]]]])
    assert sparse.select(scores, 2).tolist() == [[[[1, 2]], [[0, 1]]]]
    assert sparse.select(scores, 3).tolist() == [[[[1, 2, 4]], [[0, 1, 3]]]]
    assert sparse.select(scores, 5)[0, 1, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_equals_a_stable_sort(dtype):
    """bfloat16 scores of 200 tiles have many ties."""
    scores = torch.randn(2, 3, 4, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    best = scores.float().sort(dim=-1, descending=True, stable=True).indices[..., :30]
    assert torch.equal(sparse.select(scores, 30), best.sort(-1).values)


def test_scores_of_tiles_in_bfloat16_are_not_rounded():
    q, k = draw(TokenGrid(1, 4, 8), count=2, dtype=torch.bfloat16)
    exact = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / 4
    torch.testing.assert_close(sparse.scores(q, k), exact.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_means_are_those_of_the_tokens_of_each_tile(grid):
    tiles = plan(Vsa(sparsity=0.5), grid).tiles
    (x,) = draw(grid, count=1)
    expected = [part.mean(1) for part in x.split(tiles.sizes_N.tolist(), dim=1)]
    torch.testing.assert_close(sparse.mean(x, tiles), torch.stack(expected, 1))


# the reference


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", [*INSTANT, pytest.param("flex", marks=pytest.mark.full)])
def test_no_sparsity_and_no_gate_is_dense_attention(name, grid):
    layout = plan(Vsa(sparsity=0.0), grid)
    q, k, v, _ = draw(grid)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    backend = backend_for(name, layout, torch.float32, "cpu", needs_grad=False)
    for gate in (torch.zeros_like(q), None):
        out = backend.attend(q, k, v, layout, gate)
        torch.testing.assert_close(out, dense.transpose(1, 2), atol=2e-6, rtol=1e-5)


def test_no_sparsity_is_served_by_dense_attention_beside_the_coarse_branch():
    layout = plan(Vsa(sparsity=0.0), GRIDS[3])
    assert layout.sees_all and not plan(Vsa(sparsity=0.5), GRIDS[3]).sees_all
    backend = choose(layout=layout, dtype=torch.float32, device="cpu", needs_grad=True)
    assert backend is masked
    results = []
    for one in (masked, reference):
        leaves = [x.requires_grad_() for x in draw(GRIDS[3])]
        out = one.attend(*leaves[:3], layout, leaves[3])
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


def test_vsa_equals_its_definition_spelled_out_token_by_token():
    grid = TokenGrid(3, 5, 4)
    layout = plan(Vsa(top_k=2, tile=(2, 2, 4)), grid)
    q, k, v, gate = (x[0, :, 0].double() for x in draw(grid, batch=1, heads=1, seed=3))
    parts = torch.arange(grid.num_tokens).split(layout.tiles.sizes_N.tolist())
    qc, kc, vc = (torch.stack([x[p].mean(0) for p in parts]) for x in (q, k, v))
    rows = []
    for i, part in enumerate(parts):
        scores = qc[i] @ kc.T / 4
        coarse = scores.softmax(0) @ vc
        chosen = sorted(sorted(range(len(parts)), key=lambda j: (-scores[j], j))[:2])
        keys = torch.cat([parts[j] for j in chosen])
        for token in part:
            weights = (q[token] @ k[keys].T / 4).softmax(0)
            rows.append(weights @ v[keys] + coarse * gate[token])
    four = (x[None, :, None] for x in (q, k, v))
    out = reference.attend(*four, layout, gate[None, :, None])
    torch.testing.assert_close(out[0, :, 0], torch.stack(rows))


def test_without_a_gate_the_coarse_branch_does_not_count():
    layout = plan(Vsa(sparsity=0.5), GRIDS[3])
    q, k, v, _ = draw(GRIDS[3])
    zeros = torch.zeros_like(q)
    torch.testing.assert_close(
        reference.attend(q, k, v, layout), reference.attend(q, k, v, layout, zeros)
    )


@pytest.mark.parametrize("name", SPARSE)
def test_gradients_of_both_branches_and_the_gate_are_those_of_finite_differences(name):
    grid = TokenGrid(2, 3, 3)
    layout = plan(Vsa(top_k=2, tile=(1, 2, 2)), grid)
    backend = backend_for(name, layout, torch.float64, "cpu", size=4)
    leaves = [x.double().requires_grad_() for x in draw(grid, batch=1, heads=2, size=4)]
    assert torch.autograd.gradcheck(lambda *x: backend.attend(*x[:3], layout, x[3]), leaves)


# every backend on given lists


def backend_for(name, layout, dtype, device, size=16, needs_grad=True):
    backend = registry.module(PACKAGE, name)
    need = Need(layout, dtype, torch.device(device), needs_grad, layout.grid.num_tokens, size)
    if reason := backend.unsupported(need):
        pytest.skip(f"{name}: {reason}")
    return backend


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", [n for n in SPARSE if n != "reference"])
def test_given_lists_give_the_outputs_and_gradients_of_the_reference(name, grid, dtype, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layout = plan(Vsa(sparsity=0.5, tile=(2, 4, 4)), grid, device)
    backend, tiles = backend_for(name, layout, dtype, device), layout.tiles
    q, k, v, g = draw(grid, dtype=dtype, device=device)
    check(backend, tiles, any_lists(tiles), q, k, v, g)


@pytest.mark.parametrize("name", [n for n in SPARSE if n != "reference"])
def test_windows_of_each_head_give_the_outputs_and_gradients_of_the_reference(name):
    grid = TokenGrid(3, 9, 10)
    layout = plan(Sta(((1, 3, 1), (2, 1, 3), (2, 3, 3)), tile=(2, 3, 4)), grid)
    backend = backend_for(name, layout, torch.float32, "cpu")
    check(backend, layout.tiles, layout.lists, *draw(grid))


@pytest.mark.parametrize("name", SPARSE)
def test_many_tiles_are_served_in_chunks_without_a_seam(name, monkeypatch):
    grid = TokenGrid(3, 10, 10)
    layout = plan(Vsa(top_k=3, tile=(2, 4, 4)), grid)
    backend = backend_for(name, layout, torch.float32, "cpu")
    if "_CHUNK_NUMBERS" in vars(backend):
        monkeypatch.setattr(backend, "_CHUNK_NUMBERS", 1)
    check(backend, layout.tiles, any_lists(layout.tiles, count=3), *draw(grid))


@pytest.mark.parametrize(("std", "most"), [(1, 0.02), (4, 0.03)])
def test_sharp_scores_in_bfloat16_cost_what_their_rounding_costs(std, most):
    """`gather` and `masked` round scores as `bmm` does: by 2 ** -9 of what they are."""
    grid = TokenGrid(8, 16, 16)
    tiles = plan(Vsa(sparsity=0.8), grid).tiles
    q, k, v = draw(grid, batch=1, heads=1, size=64, count=3, dtype=torch.bfloat16)
    lists, q = any_lists(tiles, batch=1, heads=1), q * std
    wanted = reference.fine(q.float(), k.float(), v.float(), tiles, lists)
    for backend in (gather, masked):
        error = (backend.fine(q, k, v, tiles, lists).float() - wanted).abs().max()
        assert error <= most * wanted.abs().max()


def check(backend, tiles, lists, q, k, v, g):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    out, wanted = backend.fine(*leaves, tiles, lists), reference.fine(*exact, tiles, lists)
    assert out.shape == wanted.shape
    assert out.dtype == q.dtype
    pairs = [(out, wanted)]
    wanted_grads = torch.autograd.grad(wanted, exact, g.float())
    pairs += zip(torch.autograd.grad(out, leaves, g), wanted_grads, strict=True)
    with torch.no_grad():
        pairs.append((backend.fine(q, k, v, tiles, lists), wanted))
    for actual, expected in pairs:
        error = (actual.float() - expected).abs().max()
        assert error <= TOLERANCE[q.dtype] * expected.abs().max()
