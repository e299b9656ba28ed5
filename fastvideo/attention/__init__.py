"""Attention: a pattern (a value), its layout at one size, and a backend chosen openly.

layout = plan(parse("dense"), grid, device)
attend = select("auto", layout=layout, num_text_tokens=512, dtype=torch.bfloat16, device=device,
                needs_grad=False, head_dim=128)
out_BLHD = attend(q_BLHD, k_BLHD, v_BLHD, layout=layout)   # self-attention
out_BLHD = attend(q_BLHD, k_BSHD, v_BSHD)                  # cross-attention to the text

Patterns are torch-free, so that a wrong one is refused before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastvideo.attention.pattern import (
    Dense,
    Pattern,
    Sta,
    Vsa,
    check_fits,
    check_gates,
    one_tile,
    parse,
    read,
    unparse,
    write,
)

if TYPE_CHECKING:
    from fastvideo.attention.choice import Attend as Attend
    from fastvideo.attention.choice import Attention as Attention
    from fastvideo.attention.choice import Backend as Backend
    from fastvideo.attention.choice import Need as Need
    from fastvideo.attention.choice import choose as choose
    from fastvideo.attention.choice import plain as plain
    from fastvideo.attention.choice import select as select
    from fastvideo.attention.choice import table as table
    from fastvideo.attention.layout import Layout as Layout
    from fastvideo.attention.layout import Tiles as Tiles
    from fastvideo.attention.layout import plan as plan

_HOMES = {
    "choice": ("Attend", "Attention", "Backend", "Need", "choose", "plain", "select", "table"),
    "layout": ("Layout", "Tiles", "plan"),
}

__all__ = ["Dense", "Pattern", "Sta", "Vsa", "check_fits", "check_gates", "one_tile"]
__all__ += ["parse", "read", "unparse", "write"]
__all__ += [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
