"""What is exchanged arrives where it should, in unequal parts too, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastvideo.parallel import collectives, mesh
from fastvideo.parallel.collectives import exchange, gather, own, replicated, shares
from fastvideo.parallel.degrees import ParallelConfig


def axis_of(size: int) -> mesh.Axis:
    return mesh.build(ParallelConfig(ulysses=size), torch.device("cpu")).axis("ulysses")


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def swapped(rank: int, size: int, tokens: int, heads: int, dtype: torch.dtype) -> tuple[bool, bool]:
    """Turn tokens into heads; say whether the result and the gradient are the slices they are."""
    axis = axis_of(size)
    of_tokens, of_heads = shares(tokens, size), shares(heads, size)
    whole = numbered(2, tokens, heads, 3).to(dtype)  # what all processes hold together
    x = own(whole, axis, dim=1, sizes=of_tokens).clone().requires_grad_()
    out = exchange(x, axis, cut=2, cuts=of_heads, join=1, joins=of_tokens)
    is_right = torch.equal(out, own(whole, axis, dim=2, sizes=of_heads)) and out.is_contiguous()
    # Each process weighs what it got; the weights come back to those who sent it.
    out.backward(own(-whole, axis, dim=2, sizes=of_heads))
    return is_right, torch.equal(x.grad, own(-whole, axis, dim=1, sizes=of_tokens))


def joined(rank: int, size: int, total: int) -> tuple[bool, bool]:
    axis, sizes = axis_of(size), shares(total, size)
    whole = numbered(2, total, 3)
    x = own(whole, axis, dim=1, sizes=sizes).clone().requires_grad_()
    out = gather(x, axis, dim=1, sizes=sizes)
    (out**2).sum().backward()  # the same loss on every process
    return torch.equal(out, whole), torch.equal(x.grad, 2 * x.detach())


def added(rank: int, size: int) -> list[float]:
    x = torch.ones(2, requires_grad=True)
    out = replicated(x, axis_of(size))
    (out * torch.tensor([1.0, 10.0**rank])).sum().backward()
    return x.grad.tolist()


def summed(rank: int, size: int) -> list[object]:
    """Sum gradients of two dtypes and none, in buckets that hold one or two of them."""
    collectives._BUCKET_NUMBERS = 4
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float64)
    params = [nn.Parameter(torch.zeros(3 - i % 2, dtype=dtype)) for i, dtype in enumerate(dtypes)]
    for i, p in enumerate(params):
        p.grad = None if i == 3 else torch.full_like(p, 10.0**rank + i)
    before = params[0].grad
    collectives.sum_gradients(params, axis_of(size))
    assert params[0].grad is before, "sums are made in place"
    return [None if p.grad is None else (p.grad.dtype, p.grad.tolist()) for p in params]


def test_shares_differ_by_one_at_most_and_may_be_nothing():
    assert shares(12, 8) == (2, 2, 2, 2, 1, 1, 1, 1)
    assert shares(10, 4) == (3, 3, 2, 2)
    assert shares(3, 4) == (1, 1, 1, 0)


@pytest.mark.parametrize("size, tokens, heads", [(2, 7, 3), (3, 7, 10), (4, 9, 3), (4, 8, 4)])
def test_an_exchange_turns_tokens_into_heads_and_its_gradient_turns_back(
    ranks, size, tokens, heads
):
    for dtype in (torch.float32, torch.bfloat16):
        assert ranks(size, swapped, tokens, heads, dtype) == [(True, True)] * size


@pytest.mark.parametrize("size, total", [(2, 7), (3, 3), (3, 8), (4, 3)])
def test_gathered_parts_are_whole_and_the_gradient_of_a_part_is_its_own(ranks, size, total):
    assert ranks(size, joined, total) == [(True, True)] * size


def test_the_gradient_of_what_all_hold_is_the_sum_of_what_they_find(ranks):
    assert ranks(3, added) == [[3.0, 111.0]] * 3


def test_gradients_are_summed_over_the_axis_in_place_in_their_dtypes(ranks):
    expected = [
        (torch.float32, [11.0] * 3),
        (torch.float32, [13.0] * 2),
        (torch.bfloat16, [15.0] * 3),
        None,
        (torch.float64, [19.0] * 3),
    ]
    assert ranks(2, summed) == [expected] * 2


def test_one_process_exchanges_nothing():
    axis, x = mesh.alone().axis("ulysses"), torch.ones(1, 2, 3)
    assert exchange(x, axis, cut=2, cuts=(3,), join=1, joins=(2,)) is x
    assert gather(x, axis, dim=1, sizes=(2,)) is x
    assert replicated(x, axis) is x
