"""Attention: a pattern (a value), its layout at one size, and a backend chosen openly.

layout = plan(parse("dense"), grid, device)
attend = select("auto", layout=layout, num_text_tokens=512, dtype=torch.bfloat16, device=device,
                needs_grad=False, head_dim=128)
out_BLHD = attend(q_BLHD, k_BLHD, v_BLHD, layout=layout)   # self-attention
out_BLHD = attend(q_BLHD, k_BSHD, v_BSHD)                  # cross-attention to the text
"""

from __future__ import annotations

from fastvideo.attention.choice import (
    Attend,
    Attention,
    Backend,
    Need,
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
    "choose",
    "parse",
    "plan",
    "reference",
    "select",
    "table",
]
