"""Block-sparse attention in plain PyTorch: the seen tiles are gathered, then multiplied.

Works and can be differentiated on every device without a compiler. A few query tiles are taken at a
time, so that what is gathered for them stays in the cache. Only real tokens are gathered, and only
query tiles of one size are multiplied together. Their key lists are filled up to one length, a
multiple of 16 or more, as far as that costs less than another call: `issued` tells. Scores are
rounded to the input's dtype before the softmax, as `bmm` does: in bfloat16 the result is off by up
to 3 % of its largest value where scores have a deviation of 4, by 1 % where it is 1. To
`torch.compile` it is one opaque operation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvideo.attention import sparse
from fastvideo.attention.choice import Need
from fastvideo.attention.layout import Lists, Tiles

_CHUNK_NUMBERS = 1 << 21
"""Gathered keys, values and scores that exist at a time: few enough for a core's cache."""
_CHUNKS_ON_GPU = 64
"""Times as many on a GPU, which has to be filled."""
_CALL_PAIRS = 1 << 16
"""Pairs of a query and a key that are multiplied in the time that another group's calls take."""
_MULTIPLE = 16
"""Key lists of uneven tiles are filled up to a multiple of so many tokens at least."""
_NUM_LENGTHS = 64
"""A list grows by one part in so many at most; of few lengths, as oneDNN takes ms to meet each."""


def unsupported(need: Need) -> str | None:
    """Sparse patterns on every device."""
    return "serves sparse patterns only" if need.is_dense else None


def describe(need: Need) -> str:
    """Name the arithmetic."""
    return "gathered tiles, bmm, softmax, bmm"


def fine(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, tiles: Tiles, lists: Lists) -> Tensor:
    """Attend chunk by chunk of query tiles; the backward pass makes the weights again."""
    call = _attended if _is_unwatched(q_BLHD, k_BLHD, v_BLHD) else _fine
    out: Tensor = call(q_BLHD, k_BLHD, v_BLHD, *_tensors(tiles, lists))
    return out


def means(x_BLHD: Tensor, tiles: Tiles) -> Tensor:
    """Do what `sparse.mean` does without keeping a float32 copy for the backward pass."""
    if tiles.is_uniform:
        return sparse.mean(x_BLHD, tiles)
    call = _tile_means if _is_unwatched(x_BLHD) else _means
    out: Tensor = call(x_BLHD, tiles.tile_L, tiles.sizes_N)
    return out


attend = sparse.Tiled(fine, means)


def issued(tiles: Tiles, lists: Lists) -> float:
    """Return the pairs of a query and a key that are multiplied, over those that have to be."""
    sight = _Sight.of(*_tensors(tiles, lists))
    done = sum(len(row_R) * size * length for row_R, size, length in sight.groups())
    return done / sparse.work(tiles, lists)[1]


def _is_unwatched(*inputs: Tensor) -> bool:
    """Tell whether neither autograd nor a compiler needs to see an operation.

    Then its function is called as it is: an operation imports torch's compiler on its first call,
    which takes longer than a whole clip of a small model.
    """
    is_learning = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return not is_learning and not torch.compiler.is_compiling()


def _tensors(tiles: Tiles, lists: Lists) -> tuple[Tensor, Tensor | None, Tensor, Tensor, int]:
    """Return what `_Sight.of` takes: operations are made of tensors and numbers only."""
    whole = tiles.num_slots if tiles.is_uniform else 0
    return lists.index_BHNK, lists.count_BHN, tiles.sizes_N, tiles.starts_N, whole


@dataclass(frozen=True)
class _Chunk:
    """Query tiles of one size and their keys, as numbers of blocks in (clip, head, token) order."""

    query_RI: Tensor
    key_RJ: Tensor
    absent_R1P: Tensor | None
    """Which of the last P keys only fill the list up; None if none does."""


@dataclass(frozen=True)
class _Sight:
    """Who sees whom, in blocks of `unit` tokens; a row R is a query tile of a head of a clip."""

    index_RK: Tensor
    size_RK: Tensor
    """Tokens of each listed tile, 0 beyond the list's end."""
    sizes_N: Tensor
    starts_N: Tensor
    unit: int
    is_even: bool
    """Whether all rows have as many queries and keys as each other."""

    @classmethod
    def of(
        cls,
        index_BHNK: Tensor,
        count_BHN: Tensor | None,
        sizes_N: Tensor,
        starts_N: Tensor,
        whole: int,
    ) -> _Sight:
        """Read the lists; `whole` is the size of all tiles, or 0 if they differ."""
        size_BHNK = sizes_N[index_BHNK]
        if count_BHN is not None:
            place_K = torch.arange(index_BHNK.shape[-1], device=index_BHNK.device)
            size_BHNK = size_BHNK.where(place_K < count_BHN[..., None], 0)
        return cls(
            index_RK=index_BHNK.flatten(0, -2),
            size_RK=size_BHNK.flatten(0, -2),
            sizes_N=sizes_N,
            starts_N=starts_N,
            unit=whole or math.gcd(_MULTIPLE, *set(sizes_N.tolist())),
            is_even=bool(whole) and count_BHN is None,
        )

    def groups(self) -> Iterator[tuple[Tensor, int, int]]:
        """Yield rows of equal shape: which, their number of queries, and of keys when filled up."""
        row_R = torch.arange(len(self.index_RK), device=self.index_RK.device)
        if self.is_even:
            yield row_R, self.unit, self.unit * self.index_RK.shape[1]
            return
        total_R = self.size_RK.sum(-1)
        longest = int(total_R.max())
        step = max(_MULTIPLE, 1 << (longest // _NUM_LENGTHS).bit_length() >> 1)
        if self.unit > _MULTIPLE:  # lists of whole tiles need no filling
            step = self.unit
        length_R = (total_R + step - 1) // step * step
        base = longest + step
        shape_R = self.sizes_N[row_R % len(self.sizes_N)] * base + length_R
        shapes = _joined(Counter(shape_R.tolist()), base)
        parts = torch.split(shape_R.argsort(descending=True), [count for _, _, count in shapes])
        for (size, length, _), part_R in zip(shapes, parts, strict=True):
            yield part_R, size, length

    def chunks(self, num_tokens: int, head_dim: int) -> Iterator[_Chunk]:
        """Cut the groups into what is multiplied at a time."""
        num_tiles, num_blocks = len(self.sizes_N), num_tokens // self.unit
        device = self.index_RK.device
        numbers = _CHUNK_NUMBERS * (_CHUNKS_ON_GPU if device.type == "cuda" else 1)
        for group_R, size, length in self.groups():
            step = max(1, numbers // (length * (2 * head_dim + size)))
            block_I = torch.arange(size // self.unit, device=device)
            for row_R in torch.split(group_R, step):
                head_R1 = (row_R // num_tiles * num_blocks)[:, None]
                start_R1 = (self.starts_N[row_R % num_tiles] // self.unit)[:, None]
                key_RJ, absent_R1P = self._keys(row_R, length, num_blocks)
                yield _Chunk(head_R1 + start_R1 + block_I, head_R1 + key_RJ, absent_R1P)

    def _keys(self, row_R: Tensor, length: int, num_blocks: int) -> tuple[Tensor, Tensor | None]:
        """Return the blocks of a head that each row sees, and which tokens are none."""
        index_RK = self.index_RK[row_R]
        if self.is_even:
            return index_RK, None
        num_RK = self.size_RK[row_R] // self.unit
        missing_R1 = length // self.unit - num_RK.sum(-1, keepdim=True)
        num_X = torch.cat([num_RK, missing_R1], dim=1).flatten()
        start_RK = self.starts_N[index_RK] // self.unit
        start_X = torch.cat([start_RK, torch.zeros_like(missing_R1)], dim=1).flatten()
        place_Y = torch.arange(len(row_R) * (length // self.unit), device=row_R.device)
        shift_X = start_X - num_X.cumsum(0) + num_X
        block_Y = shift_X.repeat_interleave(num_X, output_size=len(place_Y)) + place_Y
        key_RJ = block_Y.clamp_(max=num_blocks - 1).view(len(row_R), -1)
        most = int(missing_R1.max()) * self.unit
        if not most:
            return key_RJ, None
        place_P = torch.arange(most, 0, -1, device=row_R.device)
        return key_RJ, (place_P <= missing_R1 * self.unit)[:, None]


def _joined(count: Mapping[int, int], base: int) -> list[tuple[int, int, int]]:
    """Join shapes (size * base + length) of one size; return size, longest length, rows of each.

    From the longest on, as long as what fills the others up costs less than a call of their own.
    """
    found: list[tuple[int, int, int]] = []
    filled = 0
    for shape in sorted(count, reverse=True):
        size, length = divmod(shape, base)
        if found and found[-1][0] == size:
            _, longest, rows = found[-1]
            filled += (longest - length) * size * count[shape]
            if filled <= _CALL_PAIRS:
                found[-1] = (size, longest, rows + count[shape])
                continue
        found.append((size, length, count[shape]))
        filled = 0
    return found


@torch.library.custom_op("fastvideo::gather_attention", mutates_args=())
def _fine(
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    index_BHNK: Tensor,
    count_BHN: Tensor | None,
    sizes_N: Tensor,
    starts_N: Tensor,
    whole: int,
) -> Tensor:
    return _attended(q_BLHD, k_BLHD, v_BLHD, index_BHNK, count_BHN, sizes_N, starts_N, whole)


def _attended(
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    index_BHNK: Tensor,
    count_BHN: Tensor | None,
    sizes_N: Tensor,
    starts_N: Tensor,
    whole: int,
) -> Tensor:
    batch, length, heads, size = q_BLHD.shape
    index_BHNK = index_BHNK.expand(batch, heads, -1, -1)
    sight = _Sight.of(index_BHNK, count_BHN, sizes_N, starts_N, whole)
    q, k, v = (_blocks(x, sight.unit) for x in (q_BLHD * (1 / math.sqrt(size)), k_BLHD, v_BLHD))
    out = torch.empty_like(q)
    for chunk in sight.chunks(length, size):
        weights_RST = _weights(q, k, chunk, size)
        out_RSD = torch.bmm(weights_RST, _take(v, chunk.key_RJ, size))
        _put(out, chunk.query_RI, out_RSD)
    return _restore(out, q_BLHD)


@_fine.register_fake
def _(q_BLHD: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q_BLHD.transpose(1, 2).contiguous()).transpose(1, 2)


@torch.library.custom_op("fastvideo::gather_attention_backward", mutates_args=())
def _gradients(
    grad_BLHD: Tensor,
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    index_BHNK: Tensor,
    count_BHN: Tensor | None,
    sizes_N: Tensor,
    starts_N: Tensor,
    whole: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, size = q_BLHD.shape
    scale = 1 / math.sqrt(size)
    index_BHNK = index_BHNK.expand(batch, heads, -1, -1)
    sight = _Sight.of(index_BHNK, count_BHN, sizes_N, starts_N, whole)
    q, k, v, grad = (_blocks(x, sight.unit) for x in (q_BLHD * scale, k_BLHD, v_BLHD, grad_BLHD))
    wide = torch.promote_types(q.dtype, torch.float32)  # a key adds up what many queries send it
    dq, dk, dv = (
        torch.empty_like(q),
        torch.zeros_like(k, dtype=wide),
        torch.zeros_like(v, dtype=wide),
    )
    for chunk in sight.chunks(length, size):
        weights_RST = _weights(q, k, chunk, size)
        grad_RSD = _take(grad, chunk.query_RI, size)
        _add(dv, chunk.key_RJ, torch.bmm(weights_RST.transpose(1, 2), grad_RSD))
        slope_RST = torch.bmm(grad_RSD, _take(v, chunk.key_RJ, size).transpose(1, 2))
        slope_RST = torch.ops.aten._softmax_backward_data(
            slope_RST, weights_RST, -1, weights_RST.dtype
        )
        _put(dq, chunk.query_RI, torch.bmm(slope_RST, _take(k, chunk.key_RJ, size)) * scale)
        query_RSD = _take(q, chunk.query_RI, size)
        _add(dk, chunk.key_RJ, torch.bmm(slope_RST.transpose(1, 2), query_RSD))
    return _restore(dq, q_BLHD), _restore(dk, k_BLHD), _restore(dv, v_BLHD)


@_gradients.register_fake
def _(grad_BLHD: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in inputs[:3])
    return q, k, v


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.whole = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_BLHD: Tensor) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor, ...] = _gradients(grad_BLHD, *ctx.saved_tensors, ctx.whole)
    return (*grads, None, None, None, None, None)


_fine.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("fastvideo::tile_means", mutates_args=())
def _means(x_BLHD: Tensor, tile_L: Tensor, sizes_N: Tensor) -> Tensor:
    return _tile_means(x_BLHD, tile_L, sizes_N)


def _tile_means(x_BLHD: Tensor, tile_L: Tensor, sizes_N: Tensor) -> Tensor:
    wide = torch.promote_types(x_BLHD.dtype, torch.float32)
    total_BNHD = x_BLHD.new_zeros(len(x_BLHD), len(sizes_N), *x_BLHD.shape[2:], dtype=wide)
    total_BNHD.index_add_(1, tile_L, x_BLHD.to(wide))
    return (total_BNHD / sizes_N.view(-1, 1, 1)).to(x_BLHD.dtype)


@_means.register_fake
def _(x_BLHD: Tensor, tile_L: Tensor, sizes_N: Tensor) -> Tensor:
    return x_BLHD.new_empty(len(x_BLHD), len(sizes_N), *x_BLHD.shape[2:])


def _remember_tiles(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _means_backward(ctx: Any, grad_BNHD: Tensor) -> tuple[Tensor, None, None]:
    tile_L, sizes_N = ctx.saved_tensors
    wide = torch.promote_types(grad_BNHD.dtype, torch.float32)
    share_BNHD = (grad_BNHD.to(wide) / sizes_N.view(-1, 1, 1)).to(grad_BNHD.dtype)
    return share_BNHD.index_select(1, tile_L), None, None


_means.register_autograd(_means_backward, setup_context=_remember_tiles)


def _blocks(x_BLHD: Tensor, unit: int) -> Tensor:
    """Return the tokens of each head of each clip one after another, `unit` of them a row."""
    return x_BLHD.transpose(1, 2).contiguous().view(-1, unit * x_BLHD.shape[-1])


def _restore(blocks: Tensor, like_BLHD: Tensor) -> Tensor:
    batch, length, heads, size = like_BLHD.shape
    return blocks.to(like_BLHD.dtype).view(batch, heads, length, size).transpose(1, 2)


def _take(blocks: Tensor, index_RI: Tensor, size: int) -> Tensor:
    return blocks.index_select(0, index_RI.flatten()).view(len(index_RI), -1, size)


def _put(blocks: Tensor, index_RI: Tensor, x_RSD: Tensor) -> None:
    blocks.index_copy_(0, index_RI.flatten(), x_RSD.reshape(-1, blocks.shape[1]))


def _add(blocks: Tensor, index_RI: Tensor, x_RSD: Tensor) -> None:
    wide = x_RSD.to(blocks.dtype).reshape(-1, blocks.shape[1])
    blocks.index_add_(0, index_RI.flatten(), wide)


def _weights(q: Tensor, k: Tensor, chunk: _Chunk, size: int) -> Tensor:
    """Return softmax(q k) of a chunk, (R, S, T), zero where a list is only filled up."""
    q_RSD, k_RTD = _take(q, chunk.query_RI, size), _take(k, chunk.key_RJ, size)
    scores_RST = torch.bmm(q_RSD, k_RTD.transpose(1, 2))
    if chunk.absent_R1P is not None:
        tail_RSP = scores_RST[..., -chunk.absent_R1P.shape[-1] :]
        tail_RSP.masked_fill_(chunk.absent_R1P, -math.inf)
    return scores_RST.softmax(-1)
