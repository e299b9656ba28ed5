"""What a pattern needs to know of a size, worked out once per shape: the order of the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.attention.pattern import Pattern
from fastvideo.shapes import TokenGrid


@dataclass(frozen=True, eq=False)
class Layout:
    """A pattern at one size.

    Token i of the sequence is token `order_L[i]` of the grid; None means t, h, w order.
    """

    pattern: Pattern
    grid: TokenGrid
    order_L: Tensor | None = None

    def arrange(self, x: Tensor, dim: int) -> Tensor:
        """Put axis `dim` from grid order into this layout's order."""
        return x if self.order_L is None else x.index_select(dim, self.order_L)

    def restore(self, x: Tensor, dim: int) -> Tensor:
        """Put axis `dim` from this layout's order back into grid order."""
        return x if self.order_L is None else x.index_select(dim, self.order_L.argsort())


def plan(pattern: Pattern, grid: TokenGrid, device: torch.device | str = "cpu") -> Layout:
    """Lay `pattern` out over `grid`, with index tensors on `device`; dense keeps grid order."""
    return Layout(pattern, grid)
