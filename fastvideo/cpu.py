"""What this processor computes natively, whichever way the installed torch tells it."""

from __future__ import annotations

import torch


def has_bfloat16() -> bool:
    """Tell whether bfloat16 products are instructions here; every CPU can emulate them slowly."""
    return _has("avx512_bf16", older="_is_avx512_bf16_supported") or _has(
        "amx_bf16", older="_is_amx_tile_supported"
    )


def has_amx() -> bool:
    """Tell whether there are AMX tiles."""
    return _has("amx_tile", older="_is_amx_tile_supported")


def _has(ability: str, *, older: str) -> bool:
    """Ask `torch.cpu.get_capabilities`, or before torch 2.12 the private question `older`."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities().get(ability) is True
    return hasattr(torch.cpu, older) and bool(getattr(torch.cpu, older)())
