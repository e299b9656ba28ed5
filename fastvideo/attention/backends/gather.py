"""Block-sparse attention in plain PyTorch: the seen tiles are gathered, then multiplied.

Works and can be differentiated on every device without a compiler. Queries are taken in chunks of
tiles, so that what is gathered at a time stays small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastvideo.attention import sparse
from fastvideo.attention.choice import Need
from fastvideo.attention.layout import Layout, Lists, Tiles

_CHUNK_NUMBERS = 1 << 22
"""Numbers of gathered keys and values, and of scores, that exist at a time."""


def unsupported(need: Need) -> str | None:
    """Sparse patterns on every device."""
    return "serves sparse patterns only" if need.is_dense else None


def rank(need: Need) -> int:
    """The one that always works."""
    return 10


def describe(need: Need) -> str:
    """Name the arithmetic."""
    return "gathered tiles, bmm, softmax, bmm"


def attend(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    layout: Layout | None,
    gate_BLHD: Tensor | None = None,
) -> Tensor:
    """Attend under a sparse pattern."""
    assert layout is not None, "cross-attention is dense"
    return sparse.attend(fine, q_BLHD, k_BSHD, v_BSHD, layout, gate_BLHD)


def fine(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, tiles: Tiles, lists: Lists) -> Tensor:
    """Attend chunk by chunk of query tiles; a chunk is computed again in the backward pass."""
    batch, _, heads, size = q_BLHD.shape
    q, k, v = (_tiled(x, tiles) for x in (q_BLHD * (1 / math.sqrt(size)), k_BLHD, v_BLHD))
    index_BHNK = lists.index_BHNK.expand(batch, heads, -1, -1)
    seen_BHNJ = _seen(tiles, lists, index_BHNK)
    per_tile = batch * heads * index_BHNK.shape[-1] * tiles.num_slots * (2 * size + tiles.num_slots)
    step = max(1, _CHUNK_NUMBERS // per_tile)
    parts = []
    for first in range(0, tiles.num, step):
        rows = slice(first, first + step)
        seen = None if seen_BHNJ is None else seen_BHNJ[:, :, rows]
        arguments = (q[:, :, rows], k, v, index_BHNK[:, :, rows], seen)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            parts.append(checkpoint(_chunk, *arguments, use_reentrant=False))
        else:
            parts.append(_chunk(*arguments))
    out_BHNSD = torch.cat(parts, dim=2)
    if tiles.is_uniform:
        return out_BHNSD.flatten(2, 3).transpose(1, 2)
    return out_BHNSD.flatten(2, 3)[:, :, tiles.is_real_NS.flatten()].transpose(1, 2)


def _tiled(x_BLHD: Tensor, tiles: Tiles) -> Tensor:
    """Return (B, H, N, S, D); slots without a token repeat another."""
    x_BHLD = x_BLHD.transpose(1, 2)
    if tiles.is_uniform:
        return x_BHLD.unflatten(2, (tiles.num, -1)).contiguous()
    return x_BHLD[:, :, tiles.slots_NS]


def _seen(tiles: Tiles, lists: Lists, index_BHNK: Tensor) -> Tensor | None:
    """Return which gathered keys are real tokens of listed tiles, (B, H, N, K S); None: all."""
    if tiles.is_uniform and lists.count_BHN is None:
        return None
    real_BHNKS = tiles.is_real_NS[index_BHNK]
    if lists.count_BHN is not None:
        place_K = torch.arange(index_BHNK.shape[-1], device=index_BHNK.device)
        real_BHNKS = real_BHNKS & (place_K < lists.count_BHN[..., None])[..., None]
    return real_BHNKS.flatten(-2)


def _chunk(
    q_BHRSD: Tensor, k_BHNSD: Tensor, v_BHNSD: Tensor, index_BHRK: Tensor, seen: Tensor | None
) -> Tensor:
    batch, heads, rows, slots, size = q_BHRSD.shape
    base = torch.arange(batch * heads, device=index_BHRK.device).view(batch, heads, 1, 1)
    flat = (base * k_BHNSD.shape[2] + index_BHRK).flatten()
    k, v = (
        x.flatten(0, 2).index_select(0, flat).view(batch * heads * rows, -1, size)
        for x in (k_BHNSD, v_BHNSD)
    )
    scores = torch.bmm(q_BHRSD.reshape(-1, slots, size), k.transpose(1, 2))
    if seen is not None:
        scores = scores.masked_fill(~seen.reshape(-1, 1, scores.shape[-1]), -math.inf)
    return torch.bmm(scores.softmax(-1), v).view(q_BHRSD.shape)
