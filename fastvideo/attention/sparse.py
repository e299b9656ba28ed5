"""What all block-sparse backends share: means of tiles, the choice among them, and their sum.

A backend of this kind is one function, `fine(q, k, v, tiles, lists)`: exact attention of every
query over the tokens of the tiles that its tile sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvideo.attention.layout import Layout, Lists, Tiles


class Fine(Protocol):
    """Attention of q (B, L, H, D) over the listed tiles of k and v, scale 1 / sqrt(D)."""

    def __call__(
        self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, tiles: Tiles, lists: Lists
    ) -> Tensor: ...


def attend(
    fine: Fine,
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    layout: Layout | None,
    gate_BLHD: Tensor | None = None,
    means: Callable[[Tensor, Tiles], Tensor] | None = None,
) -> Tensor:
    """Attend under the layout's sparse pattern (VSA 2505.13389, section 2.3).

    For VSA, `gate_BLHD` weighs the coarse branch, which is left out without one. `means` is a
    backend's own way to do what `mean` does.
    """
    assert layout is not None, "cross-attention is dense"
    tiles = layout.tiles
    assert tiles is not None, f"{layout.pattern} has no tiles"
    if layout.lists is not None:
        assert gate_BLHD is None, f"{layout.pattern} has no coarse branch to weigh"
        return fine(q_BLHD, k_BLHD, v_BLHD, tiles, layout.lists)
    assert layout.num_selected, f"nothing says what {layout.pattern} sees"
    q_BNHD, k_BNHD = ((means or mean)(x, tiles) for x in (q_BLHD, k_BLHD))
    scores_BHNN = scores(q_BNHD, k_BNHD)
    lists = Lists(select(scores_BHNN, layout.num_selected))
    out_BLHD = fine(q_BLHD, k_BLHD, v_BLHD, tiles, lists)
    if gate_BLHD is None:
        return out_BLHD
    coarse_BNHD = coarse(scores_BHNN, (means or mean)(v_BLHD, tiles))
    spread_BLHD = coarse_BNHD.to(out_BLHD.dtype).index_select(1, tiles.tile_L)
    return torch.addcmul(out_BLHD, spread_BLHD, gate_BLHD)


@dataclass(frozen=True)
class Tiled:
    """The `attend` of a backend that is no more than its `fine`, and its `means` of tiles."""

    fine: Fine
    means: Callable[[Tensor, Tiles], Tensor] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, gate: Tensor | None = None
    ) -> Tensor:
        """Attend under a sparse pattern, (B, L, H, D)."""
        return attend(self.fine, q, k, v, layout, gate, self.means)


def scores(q_BNHD: Tensor, k_BNHD: Tensor) -> Tensor:
    """Return the scores of tiles for tiles, (B, H, N, N), in float32 or wider.

    They are few beside those of tokens; in bfloat16 they would be rounded by 0.4 %, and many equal.
    """
    wide = torch.promote_types(q_BNHD.dtype, torch.float32)
    q_BHND, k_BHND = (x.transpose(1, 2).to(wide) for x in (q_BNHD, k_BNHD))
    return (q_BHND * (1 / math.sqrt(q_BHND.shape[-1]))) @ k_BHND.transpose(-1, -2)


def coarse(scores_BHNN: Tensor, v_BNHD: Tensor) -> Tensor:
    """Return dense attention of the tiles' means, (B, N, H, D), in the dtype of the scores."""
    out_BHND = scores_BHNN.softmax(-1) @ v_BNHD.transpose(1, 2).to(scores_BHNN.dtype)
    return out_BHND.transpose(1, 2)


def mean(x_BLHD: Tensor, tiles: Tiles) -> Tensor:
    """Return the mean of each tile, (B, N, H, D).

    Summed in float32 and rounded to the input's dtype; a small tile counts as much as a whole one.
    """
    wide = torch.promote_types(x_BLHD.dtype, torch.float32)
    if tiles.is_uniform:
        x_BNSHD = x_BLHD.reshape(len(x_BLHD), tiles.num, -1, *x_BLHD.shape[2:])
        return x_BNSHD.mean(2, dtype=wide).to(x_BLHD.dtype)
    batch, _, heads, size = x_BLHD.shape
    total = torch.zeros(batch, tiles.num, heads, size, dtype=wide, device=x_BLHD.device)
    total = total.index_add(1, tiles.tile_L, x_BLHD.to(wide))
    return (total / tiles.sizes_N.view(-1, 1, 1)).to(x_BLHD.dtype)


@torch.no_grad()
def select(scores_BHNN: Tensor, count: int) -> Tensor:
    """Return the `count` best keys of each query, in rising order, int64 (B, H, N, count).

    Of equal scores the lowest index wins, on every device: a score's bits and its index together
    make one whole number, and no two of these are equal.
    """
    num = scores_BHNN.shape[-1]
    assert 1 <= count <= num < 1 << 20, f"{count} of {num} tiles"
    index_N = torch.arange(num, device=scores_BHNN.device)
    if count == num:
        return index_N.expand(*scores_BHNN.shape[:-1], num)
    bits = (scores_BHNN.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    key = (rising << 20) + (num - 1 - index_N)
    return key.topk(count, dim=-1, sorted=False).indices.sort(-1).values


def work(tiles: Tiles, lists: Lists, *, multiple: int = 1) -> tuple[int, int]:
    """Return the pairs of a query and a key that are multiplied, and those that have to be.

    Of every row of the lists, if a tile's tokens are rounded up to a `multiple`. For logs and
    benchmarks: it waits for the device.
    """
    count, index = lists.count_BHN, lists.index_BHNK
    place_K = torch.arange(index.shape[-1], device=index.device)
    found = []
    for step in (multiple, 1):
        size_N = (tiles.sizes_N + step - 1) // step * step
        size_BHNK = size_N[index]
        if count is not None:
            size_BHNK = size_BHNK.where(place_K < count[..., None], 0)
        found.append(int((size_BHNK.sum(-1) * size_N).sum()))
    return found[0], found[1]


def dense_share(tiles: Tiles, lists: Lists) -> float:
    """Return all pairs of a query and a key, over those that have to be multiplied."""
    all_pairs = len(tiles.tile_L) ** 2 * math.prod(lists.index_BHNK.shape[:2])
    return all_pairs / work(tiles, lists)[1]


def pairs(layout: Layout, backend: Any = None) -> tuple[float, float]:
    """Return the pairs of a query and a key that a head multiplies, and those that it has to.

    backend: a module of `fastvideo.attention.backends`, or None for one that wastes nothing. What
    VSA selects is drawn with a seed, for four heads, as scores of random weights are.
    """
    tiles, lists = layout.tiles, layout.lists
    if tiles is None:
        return layout.grid.num_tokens**2, layout.grid.num_tokens**2
    if lists is None:
        generator = torch.Generator().manual_seed(0)
        scores_BHNN = torch.randn(1, 4, tiles.num, tiles.num, generator=generator)
        lists = Lists(select(scores_BHNN.to(tiles.sizes_N.device), layout.num_selected))
    heads, needed = math.prod(lists.index_BHNK.shape[:2]), work(tiles, lists)[1]
    share = 1.0 if backend is None else vars(backend)["issued"](tiles, lists)
    return share * needed / heads, needed / heads


def mask(tiles: Tiles, lists: Lists) -> Tensor:
    """Return which token sees which, bool (B or 1, H or 1, L, L): for references and tests."""
    return seen(lists, tiles.num)[..., tiles.tile_L, :][..., tiles.tile_L]


def seen(lists: Lists, num: int) -> Tensor:
    """Return which of `num` tiles sees which, bool (B or 1, H or 1, N, N)."""
    index_BHNK = lists.index_BHNK
    if lists.count_BHN is not None:
        place_K = torch.arange(index_BHNK.shape[-1], device=index_BHNK.device)
        index_BHNK = torch.where(place_K < lists.count_BHN[..., None], index_BHNK, num)
    shape = (*index_BHNK.shape[:-1], num + 1)  # the last column takes what does not count
    seen_BHNN = torch.zeros(shape, dtype=torch.bool, device=index_BHNK.device)
    return seen_BHNN.scatter_(-1, index_BHNK, True)[..., :num]
