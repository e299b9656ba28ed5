"""Exchanges along an axis, of equal or unequal parts, and what their gradients are.

Forward and backward are collective: every process of the axis calls them in the same order, with
tensors that require gradients on all of them or on none. On an axis of size 1 nothing is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvideo.parallel.axis import Axis

_BUCKET_NUMBERS = 1 << 25
"""Gradients that are summed at a time: 128 MiB in float32."""


def shares(total: int, count: int) -> tuple[int, ...]:
    """Cut `total` things into `count` parts as equal as can be, the larger ones first."""
    return tuple(total // count + (place < total % count) for place in range(count))


def own(x: Tensor, axis: Axis, *, dim: int, sizes: Sequence[int]) -> Tensor:
    """Return this process's part of `dim`, which is cut into `sizes`; nothing is sent."""
    assert x.shape[dim] == sum(sizes), f"{x.shape[dim]} in dim {dim}, not {sum(sizes)}"
    return x.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank])


def exchange(
    x: Tensor, axis: Axis, *, cut: int, cuts: Sequence[int], join: int, joins: Sequence[int]
) -> Tensor:
    """Cut along one dim, give every process its piece, join what arrives along another dim.

    Process i gets `cuts[i]` of dim `cut`, and brings `joins[i]` of dim `join`; either may be 0. So
    a part of the tokens of all heads becomes all tokens of some heads, and the reverse. The result
    is contiguous. One all-to-all, and a copy on each side of it, of which the first is saved if `x`
    lies in memory with `cut` outermost. The gradient is exchanged the other way round.
    """
    if axis.size == 1:
        return x
    assert x.shape[cut] == sum(cuts), f"{x.shape[cut]} in dim {cut}, not {sum(cuts)}"
    assert x.shape[join] == joins[axis.rank], f"{x.shape[join]} in dim {join}, not {joins}"
    return _apply(_Exchange, x, axis, cut, tuple(cuts), join, tuple(joins))


def gather(x: Tensor, axis: Axis, *, dim: int, sizes: Sequence[int]) -> Tensor:
    """Join the parts of all processes along `dim`; process i brings `sizes[i]`.

    For results from which every process computes the same loss: the gradient of a part is the part
    of the gradient, taken without sending anything, and not times the number of processes.
    """
    if axis.size == 1:
        return x
    assert x.shape[dim] == sizes[axis.rank], f"{x.shape[dim]} in dim {dim}, not {sizes}"
    return _apply(_Gather, x, axis, dim, tuple(sizes))


def replicated(x: Tensor, axis: Axis) -> Tensor:
    """Return `x`, which all processes hold alike, as something that each uses a part of.

    Its gradient is the sum of what the processes find, on all of them.
    """
    return x if axis.size == 1 else _apply(_Replicated, x, axis)


@torch.no_grad()
def sum_gradients(params: Iterable[nn.Parameter], axis: Axis) -> None:
    """Replace the gradients of `params` by their sums over the axis, in place.

    For networks that `sequence.spread` has run: after all backward passes of an update, before
    clipping. Summed in float32 or wider and rounded to the gradient's dtype. Parameters without a
    gradient are left so; they must be the same on every process, as must the order.
    """
    if axis.size == 1:
        return
    for grads in _buckets(p.grad for p in params if p.grad is not None):
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        flat = torch.cat([grad.flatten().to(wide) for grad in grads])
        dist.all_reduce(flat, group=axis.group)
        sums = torch.split(flat, [grad.numel() for grad in grads])
        for grad, total in zip(grads, sums, strict=True):
            grad.copy_(total.view_as(grad))


def _buckets(grads: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield neighbours of one dtype, as many as are summed at a time."""
    bucket: list[Tensor] = []
    for grad in grads:
        is_full = sum(x.numel() for x in bucket) + grad.numel() > _BUCKET_NUMBERS
        if bucket and (is_full or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    call: Callable[..., Tensor] = function.apply
    return call(*arguments)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        axis: Axis,
        cut: int,
        cuts: tuple[int, ...],
        join: int,
        joins: tuple[int, ...],
    ) -> Tensor:
        ctx.back = (axis, join, joins, cut, cuts)
        return _exchanged(x, axis, cut, cuts, join, joins)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (_exchanged(grads[0], *ctx.back), None, None, None, None, None)


def _exchanged(
    x: Tensor, axis: Axis, cut: int, cuts: Sequence[int], join: int, joins: Sequence[int]
) -> Tensor:
    sent = x.movedim(cut, 0).contiguous()
    unit = math.prod(sent.shape[1:])
    shape = list(sent.shape)
    shape[0] = cuts[axis.rank]
    place = join + 1 if join < cut else join  # of `join`, with `cut` in front
    shapes = [[*shape[:place], size, *shape[place + 1 :]] for size in joins]
    counts = [math.prod(piece) for piece in shapes]
    got = sent.new_empty(sum(counts))
    dist.all_to_all_single(
        got, sent.view(-1), counts, [size * unit for size in cuts], group=axis.group
    )
    pieces = zip(torch.split(got, counts), shapes, strict=True)
    return torch.cat([piece.view(shape).movedim(0, cut) for piece, shape in pieces], join)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.back = (axis, dim, sizes)
        # Not every transport gathers unequal parts: all are sent as long as the longest.
        sent = x.movedim(dim, 0)
        missing = max(sizes) - len(sent)
        sent = torch.cat([sent, sent.new_zeros(missing, *sent.shape[1:])])
        parts = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(parts, sent, group=axis.group)
        real = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(real).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, dim, sizes = ctx.back
        return (own(grads[0], axis, dim=dim, sizes=sizes), None, None, None)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        total = grads[0].to(wide, memory_format=torch.contiguous_format, copy=True)
        dist.all_reduce(total, group=ctx.axis.group)
        return (total.to(grads[0].dtype), None)
