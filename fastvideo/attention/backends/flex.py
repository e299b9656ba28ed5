"""Block-sparse attention compiled by PyTorch: FlexAttention over tiles padded to equal blocks.

The first call of a size compiles, some 10 s on a free core, so it is never chosen by itself: ask
for it by name. Edge tiles are filled up to whole blocks, which costs what `issued` says.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.attention import sparse
from fastvideo.attention.choice import Need
from fastvideo.attention.first_calls import FirstCalls
from fastvideo.attention.layout import Lists, Tiles

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMPILE_S = 10.0
"""Estimate until one was measured: 5 to 36 s were seen on Zen 4, most under load."""
_GPU_BLOCK = 64


def unsupported(need: Need) -> str | None:
    """Sparse patterns on CPUs and NVIDIA GPUs; PyTorch has no backward pass for CPUs."""
    if need.is_dense:
        return "serves sparse patterns only"
    if need.device.type not in ("cpu", "cuda"):
        return f"compiles for cpu and cuda, not {need.device.type}"
    if need.device.type == "cpu" and need.needs_grad:
        return "has no backward pass on a CPU"
    if need.dtype not in _DTYPES:
        return f"needs float32, bfloat16 or float16, not {str(need.dtype).removeprefix('torch.')}"
    return None


def describe(need: Need) -> str:
    """Name the kernel and what its first call costs."""
    return f"compiled FlexAttention; the first call of a size takes about {compile_s():.0f} s more"


def fine(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, tiles: Tiles, lists: Lists) -> Tensor:
    """Attend block by block; log the seconds of a call that compiles."""
    batch, _, heads, _ = q_BLHD.shape
    block = _block(tiles.num_slots, q_BLHD.device)
    num = lists.index_BHNK.shape[-1]
    # FlexAttention wants room for every block in every list.
    index_BHNN = F.pad(lists.index_BHNK.int(), (0, tiles.num - num)).expand(batch, heads, -1, -1)
    count_BHN = index_BHNN.new_full(index_BHNN.shape[:-1], num)
    if lists.count_BHN is not None:
        count_BHN = lists.count_BHN.int().expand(batch, heads, -1).contiguous()
    token_X, is_real_X = _slots(tiles, block)
    arguments = (q_BLHD, k_BLHD, v_BLHD, token_X, is_real_X, count_BHN, index_BHNN.contiguous())
    if torch.compiler.is_compiling():
        out_BXHD = _flex(*arguments, block)
    else:
        needs_grad = tuple(torch.is_grad_enabled() and x.requires_grad for x in arguments[:3])
        key = (q_BLHD.shape, q_BLHD.dtype, q_BLHD.device, tiles.num, block, needs_grad)
        out_BXHD = _first_calls().timed(key, lambda: _compiled(key)(*arguments, block))
    place_L = tiles.tile_L * block + torch.arange(len(tiles.tile_L), device=q_BLHD.device)
    return out_BXHD.index_select(1, place_L - tiles.starts_N[tiles.tile_L])


attend = sparse.Tiled(fine)


def issued(tiles: Tiles, lists: Lists) -> float:
    """Return the pairs of a query and a key that are multiplied, over those that have to be."""
    block = _block(tiles.num_slots, tiles.sizes_N.device)
    done, needed = sparse.work(tiles, lists, multiple=block)
    return done / needed


def compile_s() -> float:
    """Return the seconds that the slowest compilation so far took, or an estimate before any."""
    return max(_first_calls().seconds.values(), default=_COMPILE_S)


def _block(num_slots: int, device: torch.device) -> int:
    """Return the tokens of a block: those of a tile; on a GPU as many as its kernel can cut.

    There 60 tokens take 64, 384 stay 384, 24 take 32.
    """
    if device.type == "cpu":
        return num_slots
    fitting = next((size for size in (16, 32) if num_slots <= size), 0)
    return fitting or -(-num_slots // _GPU_BLOCK) * _GPU_BLOCK


def _slots(tiles: Tiles, block: int) -> tuple[Tensor, Tensor]:
    """Return the token in each slot of all blocks, and whether there is one."""
    slot_S = torch.arange(block, device=tiles.sizes_N.device)
    is_real_NS = slot_S < tiles.sizes_N[:, None]
    token_NS = tiles.starts_N[:, None] + slot_S.where(is_real_NS, 0)
    return token_NS.flatten(), is_real_NS.flatten()


def _flex(
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    token_X: Tensor,
    is_real_X: Tensor,
    count_BHN: Tensor,
    index_BHNN: Tensor,
    block: int,
) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def is_seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_real_X[key]

    q, k, v = (x.transpose(1, 2).index_select(2, token_X) for x in (q_BLHD, k_BLHD, v_BLHD))
    mask = BlockMask.from_kv_blocks(
        count_BHN,
        index_BHNN,
        BLOCK_SIZE=block,
        mask_mod=is_seen,
        seq_lengths=(len(token_X), len(token_X)),
        compute_q_blocks=any(x.requires_grad for x in (q, k, v)),
    )
    options: Any = None
    if q.is_cuda:  # its own choices need not divide our blocks
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        options = dict.fromkeys(names, min(block, _GPU_BLOCK))
    out: Tensor = flex_attention(q, k, v, block_mask=mask, kernel_options=options)
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=64)
def _compiled(key: Hashable) -> Callable[..., Tensor]:
    """Return `_flex` compiled: all of it, as what runs uncompiled would not heed the lists.

    A function of its own for each kind of call: PyTorch gives up on one that is compiled too often,
    and counts by its code.
    """
    copy = types.FunctionType(
        _flex.__code__.replace(), _flex.__globals__, _flex.__name__, closure=_flex.__closure__
    )
    return torch.compile(copy, dynamic=False, fullgraph=True)


@functools.cache
def _first_calls() -> FirstCalls:
    return FirstCalls("flex")
