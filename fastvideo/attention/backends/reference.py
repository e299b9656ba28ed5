"""Every pattern in its plainest form: the specification of all other backends.

Scores of all tokens for all tokens, those that are not seen set to minus infinity, in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvideo.attention import sparse
from fastvideo.attention.choice import Need
from fastvideo.attention.layout import Layout, Lists, Tiles

MAX_KEYS = 4096
issued = sparse.dense_share


def unsupported(need: Need) -> str | None:
    """All patterns on all devices, as long as a square of scores is bearable."""
    if need.num_keys is not None and need.num_keys > MAX_KEYS:
        return f"makes all scores in float32, so at most {MAX_KEYS} keys, not {need.num_keys}"
    return None


def describe(need: Need) -> str:
    """Name the arithmetic."""
    return "masked softmax in float32"


def attend(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    layout: Layout | None,
    gate_BLHD: Tensor | None = None,
) -> Tensor:
    """Attend under any pattern, in float32 or wider, and round the result to the dtype of q."""
    wide = torch.promote_types(q_BLHD.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_BLHD, k_BSHD, v_BSHD))
    if layout is None or layout.tiles is None:
        return _attend(q, k, v, None).to(q_BLHD.dtype)
    gate = None if gate_BLHD is None else gate_BLHD.to(wide)
    return sparse.attend(fine, q, k, v, layout, gate).to(q_BLHD.dtype)


def fine(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, tiles: Tiles, lists: Lists) -> Tensor:
    """Attend with a mask of who sees whom."""
    return _attend(q_BLHD, k_BLHD, v_BLHD, sparse.mask(tiles, lists))


def _attend(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, seen_BHLS: Tensor | None) -> Tensor:
    scores_BHLS = torch.einsum("blhd,bshd->bhls", q_BLHD, k_BSHD) / math.sqrt(q_BLHD.shape[-1])
    if seen_BHLS is not None:
        scores_BHLS = scores_BHLS.masked_fill(~seen_BHLS, -math.inf)
    return torch.einsum("bhls,bshd->blhd", scores_BHLS.softmax(-1), v_BSHD)
