"""Sinusoidal features of a diffusion time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoid(t: Tensor, channels: int, *, base: float = 1e4) -> Tensor:
    """Return cos then sin of t base^(-i / half) on a new last axis (1706.03762, section 3.5).

    `t` is in 0..1000. Frequencies are float32 exponentials as in diffusers: float64 ones differ by
    1e-4 near t = 1000.
    """
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(base) * index / half)
    angle = t.float()[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
