"""Ring attention (2310.01889): queries stay, keys and values travel from process to process.

Every process holds a part of the tokens. In as many steps as there are processes it attends to the
block of keys and values at hand, while these move on to the next process and the last one's arrive;
log-sum-exps join the steps into exact attention (`partial`). Backward, keys and values travel
once more, and with each block the sum of its gradients, in float32, until both are home.

Dense attention only: a block is seen whole, by all queries. Each process sends its keys and values
size - 1 times forward; backward as often again, and the float32 gradients size times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo.parallel import partial
from fastvideo.parallel.axis import Axis


def attend(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, axis: Axis, *, sizes: Sequence[int]
) -> Tensor:
    """Attend from this process's tokens to those of all, (B, L, H, D) in the dtype of q.

    Process i of the axis holds `sizes[i]` tokens, at least one. Softmax in float32 or wider.
    """
    assert q_BLHD.shape == k_BLHD.shape == v_BLHD.shape, "self-attention has as many keys"
    assert q_BLHD.shape[1] == sizes[axis.rank], f"{q_BLHD.shape[1]} tokens, not {sizes}"
    call: Callable[..., Tensor] = _Ring.apply
    return call(q_BLHD, k_BLHD, v_BLHD, axis, tuple(sizes))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, axis: Axis, sizes: tuple[int, ...]
    ) -> Tensor:
        q_BHLD = q_BLHD.transpose(1, 2)
        kv_2BHLD = torch.stack([k_BLHD.transpose(1, 2), v_BLHD.transpose(1, 2)])
        blocks = _travel(kv_2BHLD, axis, sizes)
        out_BHLD, lse_BHL = partial.attend(q_BHLD, *next(blocks))
        for k_BHSD, v_BHSD in blocks:
            part = partial.attend(q_BHLD, k_BHSD, v_BHSD)
            out_BHLD, lse_BHL = partial.join(out_BHLD, lse_BHL, *part)
        out_BHLD = out_BHLD.to(q_BLHD.dtype)
        ctx.save_for_backward(q_BHLD, kv_2BHLD, out_BHLD, lse_BHL)
        ctx.axis, ctx.sizes = axis, sizes
        return out_BHLD.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLD, kv_2BHLD, out_BHLD, lse_BHL = ctx.saved_tensors
        axis, sizes = ctx.axis, ctx.sizes
        grad_BHLD = grads[0].transpose(1, 2)
        wide = partial.wider(q_BHLD)
        delta_BHL = (out_BHLD.to(wide) * grad_BHLD.to(wide)).sum(-1)
        dq_BHLD = torch.zeros_like(q_BHLD, dtype=wide)
        homeward: _Parcel | None = None
        for step, (k_BHSD, v_BHSD) in enumerate(_travel(kv_2BHLD, axis, sizes)):
            dq, dk, dv = partial.gradients(grad_BHLD, q_BHLD, k_BHSD, v_BHSD, lse_BHL, delta_BHL)
            dq_BHLD += dq
            dkv_2BHSD = torch.stack([dk, dv])
            if homeward is not None:  # what the block's earlier hosts have found
                dkv_2BHSD += homeward.arrived()
            homeward = _Parcel(dkv_2BHSD, axis, sizes[(axis.rank - step - 1) % axis.size])
        assert homeward is not None, "a ring has a process"
        dk_BHLD, dv_BHLD = homeward.arrived()
        found = (x.to(q_BHLD.dtype).transpose(1, 2) for x in (dq_BHLD, dk_BHLD, dv_BHLD))
        return (*found, None, None)


class _Parcel:
    """A block on its way to the next process, while another one, of `size` tokens, comes in."""

    def __init__(self, sent: Tensor, axis: Axis, size: int) -> None:
        self._sent = sent  # kept until it is delivered
        self._got = sent.new_empty(*sent.shape[:3], size, sent.shape[4])
        ranks = axis.ranks
        after, before = ranks[(axis.rank + 1) % axis.size], ranks[axis.rank - 1]
        calls = [
            dist.P2POp(dist.isend, sent, after, axis.group),
            dist.P2POp(dist.irecv, self._got, before, axis.group),
        ]
        self._works = dist.batch_isend_irecv(calls)

    def arrived(self) -> Tensor:
        """Wait for what comes in, and return it."""
        for work in self._works:
            work.wait()
        return self._got


def _travel(own_2BHLD: Tensor, axis: Axis, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Yield this process's block, then its predecessors'; the next arrives while one is used."""
    block = own_2BHLD
    for step in range(1, axis.size):
        parcel = _Parcel(block, axis, sizes[(axis.rank - step) % axis.size])
        yield block
        block = parcel.arrived()
    yield block
