"""Every backend file against plain SDPA in float32, on every pattern that it claims to serve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvideo import registry
from fastvideo.attention import Dense, plan
from fastvideo.attention.choice import PACKAGE, Need
from fastvideo.shapes import TokenGrid

BACKENDS = registry.names(PACKAGE)
GRIDS = [TokenGrid(1, 2, 3), TokenGrid(3, 5, 7), TokenGrid(5, 8, 8)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def backend_for(name, layout, dtype, device, needs_grad, num_keys, head_dim):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    backend = registry.module(PACKAGE, name)
    need = Need(layout, dtype, torch.device(device), needs_grad, num_keys, head_dim)
    if reason := backend.unsupported(need):
        pytest.skip(f"{name}: {reason}")
    return backend


def draw(batch, num_queries, num_keys, heads, head_dim, dtype, device):
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, n, heads, head_dim) for n in (num_queries, num_keys, num_keys, num_queries)]
    return [torch.randn(s, generator=g).to(device, dtype) for s in shapes]


def oracle(q, k, v):
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def check(backend, layout, q, k, v, g):
    tolerance = TOLERANCE[q.dtype]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    out = backend.attend(*leaves, layout)
    expected = oracle(*exact)
    assert out.shape == expected.shape
    assert out.dtype == q.dtype
    pairs = [(out, expected)]
    wanted_grads = torch.autograd.grad(expected, exact, g.float())
    pairs += zip(torch.autograd.grad(out, leaves, g), wanted_grads, strict=True)
    with torch.no_grad():  # backends may take another way when nothing is to be differentiated
        pairs.append((backend.attend(q, k, v, layout), expected))
    for actual, wanted in pairs:
        assert (actual.float() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_dense_self_attention_equals_sdpa_forward_and_backward(name, grid, dtype, device):
    layout, n = plan(Dense(), grid, device), grid.num_tokens
    backend = backend_for(name, layout, dtype, device, True, n, 24)
    check(backend, layout, *draw(2, n, n, 3, 24, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_cross_attention_equals_sdpa_forward_and_backward(name, dtype, device):
    backend = backend_for(name, None, dtype, device, True, 13, 48)
    check(backend, None, *draw(3, 70, 13, 2, 48, dtype, device))


@pytest.mark.parametrize("name", BACKENDS)
def test_many_queries_are_served_in_blocks_without_a_seam(name):
    layout = plan(Dense(), TokenGrid(4, 20, 20))
    backend = backend_for(name, layout, torch.float32, "cpu", False, 1600, 8)
    q, k, v, _ = draw(1, 1600, 1600, 2, 8, torch.float32, "cpu")
    with torch.no_grad():
        out = backend.attend(q, k, v, layout)
    assert (out - oracle(q, k, v)).abs().max() <= 1e-5
