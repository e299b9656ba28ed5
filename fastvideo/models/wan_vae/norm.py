"""RMS norm over channels, and its fusion with SiLU, which comes before nearly every convolution.

The fused form works in place in one new tensor, keeps only x for the backward pass, and leaves room
for the frames that the causal convolution after it looks back at.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RmsNorm(nn.Module):
    """Divide each position by the root mean square of its channels, times a gain (1910.07467)."""

    def __init__(self, dim: int, *, num_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * num_axes))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Return the normed x; a position whose channels are all zero stays zero."""
        return x_BCTHW * _inverse_rms(x_BCTHW) * self.gamma.view(-1, 1, 1, 1)

    def with_silu(self, x_BCTHW: Tensor, *, room: int) -> Tensor:
        """Return SiLU of the normed x, behind `room` frames of zeros."""
        if torch.compiler.is_compiling():
            # Writing into part of a fresh tensor breaks the graph, and its strides come out wrong.
            return F.pad(F.silu(self(x_BCTHW)), (0, 0, 0, 0, room, 0))
        out: Tensor = _NormSilu.apply(  # type: ignore[no-untyped-call]
            x_BCTHW, self.gamma.view(-1, 1, 1, 1), room
        )
        return out


class _NormSilu(torch.autograd.Function):
    """y = SiLU(n * gamma) with n = x / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, room: int) -> Tensor:
        ctx.save_for_backward(x, gamma)
        ctx.room = room
        B, C, T, H, W = x.shape
        out = x.new_empty(B, room + T, H, W, C).permute(0, 4, 1, 2, 3)
        out[:, :, :room] = 0
        n = torch.mul(x, _inverse_rms(x), out=out[:, :, room:])
        F.silu(n.mul_(gamma), inplace=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gamma = ctx.saved_tensors
        r = _inverse_rms(x)
        n = x * r
        dn = torch.ops.aten.silu_backward(dy[:, :, ctx.room :], n * gamma)
        along = dn * n
        dgamma = along.sum(dim=(0, 2, 3, 4)).view_as(gamma)
        # rms(n) is 1 whatever x is: what dn holds along n is not passed on
        mean = along.mul_(gamma).mean(dim=1, keepdim=True)
        dx = dn.mul_(gamma).sub_(n.mul_(mean)).mul_(r)
        return dx, dgamma, None


def _inverse_rms(x_BCTHW: Tensor) -> Tensor:
    # the norm sums in float32, also for bf16
    norm: Tensor = torch.linalg.vector_norm(x_BCTHW, dim=1, keepdim=True)
    inverse: Tensor = x_BCTHW.shape[1] ** 0.5 / norm.float().clamp_min(1e-12)
    return inverse.to(x_BCTHW.dtype)
