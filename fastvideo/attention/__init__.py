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
    plain,
    select,
    table,
)
from fastvideo.attention.layout import Layout, Tiles, plan
from fastvideo.attention.pattern import Dense, Pattern, Sta, Vsa, parse, unparse

__all__ = [
    "Attend",
    "Attention",
    "Backend",
    "Dense",
    "Layout",
    "Need",
    "Pattern",
    "Sta",
    "Tiles",
    "Vsa",
    "choose",
    "parse",
    "plain",
    "plan",
    "select",
    "table",
    "unparse",
]
