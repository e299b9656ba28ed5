"""Normalisations with few passes over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulated_norm(x_BLC: Tensor, *, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return LN(x) (1 + scale) + shift; shift and scale have shape (B, 1, C) or (B, L, C).

    One modulation for the whole sequence is a layer norm's own weight and bias: a single pass.
    """
    channels = x_BLC.shape[-1:]
    if scale.shape[:2] == (1, 1):
        return F.layer_norm(x_BLC, channels, 1 + scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x_BLC, channels, eps=eps), 1 + scale)


class LayerNorm(nn.LayerNorm):
    """A layer norm whose float32 weights also serve activations of another dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; statistics are taken in float32 whatever the dtype of `x`."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """x / rms(x) times a learned weight (Zhang and Sennrich 1910.07467, eq. 4)."""

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis in float32, and return float32 for whoever computes on."""
        if x.is_cuda:
            return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
        # The CPU has no fused kernel; its composite takes ten times as long as these passes.
        y = x.float()
        inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y * inverse * self.weight.float()
