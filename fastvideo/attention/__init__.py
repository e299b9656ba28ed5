"""Attention: a pattern (a value), its layout at one size, and a backend chosen openly.

layout = plan(parse("dense"), grid, device)
backend = choose("auto", layout=layout, dtype=torch.bfloat16, device=device, needs_grad=False)
out_BLHD = attend(q_BLHD, k_BSHD, v_BSHD, layout=layout, backend=backend)
"""

from __future__ import annotations

from fastvideo.attention.choice import (
    Attend,
    Attention,
    Backend,
    Need,
    attend,
    choose,
    reference,
    select,
    table,
)
from fastvideo.attention.layout import Layout, plan
from fastvideo.attention.pattern import Dense, Pattern, parse

__all__ = [
    "Attend",
    "Attention",
    "Backend",
    "Dense",
    "Layout",
    "Need",
    "Pattern",
    "attend",
    "choose",
    "parse",
    "plan",
    "reference",
    "select",
    "table",
]
