"""Networks whose every parameter counts."""

from __future__ import annotations

import torch
from torch import nn


def drawn(net: nn.Module, *, seed: int = 0) -> nn.Module:
    """Give every parameter values that matter, gates and zero-born projections too."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            scale = 0.3 if p.ndim < 2 or "table" in name else p[0].numel() ** -0.5
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(centre + scale * torch.randn(p.shape, generator=g))
    return net
