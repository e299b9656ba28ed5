"""Sparse patterns by dense arithmetic: for canvases too small to gather from, and for no sparsity.

Where every tile is seen, the fine branch is dense attention, by the backend that is fastest at it.
Otherwise the scores of all tokens for all tokens are made, and those that are not seen masked.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastvideo.attention import choice, sparse
from fastvideo.attention.backends import gather
from fastvideo.attention.choice import Backend, Need
from fastvideo.attention.layout import Layout, Lists, Tiles

means, issued = gather.means, sparse.dense_share
MAX_KEYS = 2048
_BLOCK_SCORES = 1 << 18
"""Scores made at a time in inference, few enough for a core's cache, but those of a head."""


def unsupported(need: Need) -> str | None:
    """Sparse patterns, as long as training can keep the scores of all heads in memory."""
    if need.layout is None or need.is_dense:
        return "serves sparse patterns only"
    if need.num_keys is not None and need.num_keys > MAX_KEYS and not need.layout.sees_all:
        return f"keeps all scores in memory, so at most {MAX_KEYS} keys, not {need.num_keys}"
    return None


def describe(need: Need) -> str:
    """Name the arithmetic."""
    assert need.layout is not None, "a sparse pattern has a layout"
    return "every tile is seen: dense" if need.layout.sees_all else "bmm, mask, softmax, bmm"


def attend(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    layout: Layout | None,
    gate_BLHD: Tensor | None = None,
) -> Tensor:
    """Attend under a sparse pattern."""
    inner = _whole if layout and layout.sees_all else fine
    return sparse.attend(inner, q_BLHD, k_BSHD, v_BSHD, layout, gate_BLHD, means)


def fine(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, tiles: Tiles, lists: Lists) -> Tensor:
    """Attend with a mask added to the scores, which are rounded to the input's dtype."""
    batch, length, heads, size = q_BLHD.shape
    seen_BHNN = sparse.seen(lists, tiles.num)
    mask_BHNN = q_BLHD.new_zeros(seen_BHNN.shape).masked_fill_(~seen_BHNN, -math.inf)
    q_RLD, k_RLD, v_RLD = (
        x.transpose(1, 2).reshape(-1, length, size).contiguous()
        for x in (q_BLHD * (1 / math.sqrt(size)), k_BLHD, v_BLHD)
    )
    inputs = (mask_BHNN.expand(batch, heads, -1, -1).flatten(0, 1), q_RLD, k_RLD, v_RLD)
    step = len(q_RLD)
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        step = max(1, _BLOCK_SCORES // length**2)
    chunks = zip(*(torch.split(x, step) for x in inputs), strict=True)
    out_RLD = torch.cat([_attend(tiles.tile_L, *chunk) for chunk in chunks])
    return out_RLD.view(batch, heads, length, size).transpose(1, 2)


def _attend(
    tile_L: Tensor, mask_RNN: Tensor, q_RLD: Tensor, k_RLD: Tensor, v_RLD: Tensor
) -> Tensor:
    mask_RLL = mask_RNN.index_select(-2, tile_L).index_select(-1, tile_L)
    weights_RLL = torch.baddbmm(mask_RLL, q_RLD, k_RLD.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights_RLL, v_RLD)


def _whole(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, tiles: Tiles, lists: Lists) -> Tensor:
    """Attend to all tokens; the compiler, which cannot look into a choice, gets SDPA."""
    if torch.compiler.is_compiling():
        return choice.plain(q_BLHD, k_BLHD, v_BLHD)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BLHD, k_BLHD, v_BLHD))
    where = (q_BLHD.dtype, q_BLHD.device, needs_grad, k_BLHD.shape[1], q_BLHD.shape[-1])
    return _dense(*where).attend(q_BLHD, k_BLHD, v_BLHD, None)


@functools.lru_cache(maxsize=64)
def _dense(
    dtype: torch.dtype, device: torch.device, needs_grad: bool, num_keys: int, head_dim: int
) -> Backend:
    """Choose the dense backend, once for each kind of call."""
    return choice.choose(
        layout=None,
        dtype=dtype,
        device=device,
        needs_grad=needs_grad,
        num_keys=num_keys,
        head_dim=head_dim,
    )
