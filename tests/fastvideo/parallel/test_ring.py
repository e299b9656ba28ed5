"""Ring attention equals attention of one process, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.parallel import mesh, partial, ring
from fastvideo.parallel.collectives import own, shares
from fastvideo.parallel.degrees import ParallelConfig


def drawn(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, tokens, 3, 8, generator=g) for _ in range(4))
    return [x.to(dtype) for x in (3 * q, k, v, grad)]  # scores that differ


def relative(a: Tensor, b: Tensor, scale: Tensor) -> float:
    return ((a.float() - b.float()).abs().max() / scale.float().abs().max()).item()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def errors(rank: int, size: int, tokens: int, dtype: torch.dtype) -> list[float]:
    """Return the errors of the output and the gradients of q, k, v, relative to the largest."""
    axis = mesh.build(ParallelConfig(ring=size), torch.device("cpu")).axis("ring")
    sizes = shares(tokens, size)
    *inputs, grad = drawn(tokens, dtype)
    whole = [x.float().clone().requires_grad_() for x in inputs]
    expected = attended(*whole)
    expected.backward(grad.float())
    mine = [own(x, axis, dim=1, sizes=sizes).clone().requires_grad_() for x in inputs]
    out = ring.attend(*mine, axis, sizes=sizes)
    assert out.dtype == dtype
    out.backward(own(grad, axis, dim=1, sizes=sizes))
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(mine, whole, strict=True))]
    return [relative(a, own(b, axis, dim=1, sizes=sizes), b) for a, b in pairs]


@pytest.mark.parametrize("size, tokens", [(2, 7), (3, 11), (4, 37), (4, 4)])
def test_a_ring_equals_one_process_in_float32(ranks, size, tokens):
    assert max(map(max, ranks(size, errors, tokens, torch.float32))) <= 1e-5


def test_a_ring_in_bfloat16_rounds_only_its_results(ranks):
    assert max(map(max, ranks(3, errors, 11, torch.bfloat16))) <= 2**-8


def test_parts_of_the_keys_join_exactly_whatever_is_computed_at_a_time(monkeypatch):
    monkeypatch.setattr(partial, "_BLOCK_SCORES", 150)  # two or three queries
    q, k, v, _ = (x.transpose(1, 2) for x in drawn(13, torch.float64))
    parts = [partial.attend(q, k[:, :, cut], v[:, :, cut]) for cut in (slice(4), slice(4, 13))]
    out, lse = partial.join(*parts[0], *parts[1])
    whole, whole_lse = partial.attend(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(lse, whole_lse)


def test_gradients_by_parts_add_up_whatever_is_computed_at_a_time(monkeypatch):
    monkeypatch.setattr(partial, "_BLOCK_SCORES", 150)
    q, k, v, grad = (x.transpose(1, 2).requires_grad_() for x in drawn(13, torch.float64))
    out = F.scaled_dot_product_attention(q, k, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    with torch.no_grad():
        lse, delta = partial.attend(q, k, v)[1], (out * grad).sum(-1)
        cuts = (slice(4), slice(4, 13))
        parts = [partial.gradients(grad, q, k[:, :, cut], v[:, :, cut], lse, delta) for cut in cuts]
    torch.testing.assert_close(parts[0][0] + parts[1][0], dq)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 2), dk)
    torch.testing.assert_close(torch.cat([part[2] for part in parts], 2), dv)
