"""What a pattern needs to know of a size, worked out once per shape: order, tiles, sight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.attention.pattern import Dense, Pattern, Sta, Tile, check_fits
from fastvideo.log import logger
from fastvideo.shapes import TokenGrid

_FEW_TILES = 16


@dataclass(frozen=True, eq=False)
class Tiles:
    """A sequence cut into tiles, which follow one another without padding.

    Tile n holds tokens `starts_N[n]` to `starts_N[n] + sizes_N[n]` of the sequence; those at the
    far edges of the grid may be smaller than the others.
    """

    grid: TokenGrid
    """Tiles on every axis; they are numbered in t, h, w order."""
    sizes_N: Tensor
    """int64, tokens of each tile."""
    starts_N: Tensor
    tile_L: Tensor
    """Tile of each token."""
    num_slots: int
    """Tokens of a whole tile."""
    is_uniform: bool
    """Whether every tile is whole."""

    @property
    def num(self) -> int:
        """Number of tiles."""
        return self.grid.num_tokens


@dataclass(frozen=True, eq=False)
class Lists:
    """Which key tiles each query tile sees: `index[..., :count]`, in rising order.

    `index_BHNK` is int64 of shape (B or 1, H or 1, N, K), `count_BHN` of the shape before K; None
    means that all K count.
    """

    index_BHNK: Tensor
    count_BHN: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """A pattern at one size.

    Token i of the sequence is token `order_L[i]` of the grid; None means t, h, w order. Sparse
    patterns have `tiles`, and `lists` if they see the same whatever the tokens say; else each query
    tile selects `num_selected` key tiles.
    """

    pattern: Pattern
    grid: TokenGrid
    order_L: Tensor | None = None
    tiles: Tiles | None = None
    lists: Lists | None = None
    num_selected: int = 0

    @property
    def sees_all(self) -> bool:
        """Whether every token sees every token, as it does under a sparsity of 0."""
        if self.tiles is None:
            return True
        if self.lists is None:
            return self.num_selected == self.tiles.num
        count = self.lists.count_BHN
        return count is None or bool((count == self.tiles.num).all())

    def arrange(self, x: Tensor, dim: int) -> Tensor:
        """Put axis `dim` from grid order into this layout's order."""
        return x if self.order_L is None else x.index_select(dim, self.order_L)

    def restore(self, x: Tensor, dim: int) -> Tensor:
        """Put axis `dim` from this layout's order back into grid order."""
        return x if self.order_L is None else x.index_select(dim, self.order_L.argsort())


def plan(pattern: Pattern, grid: TokenGrid, device: torch.device | str = "cpu") -> Layout:
    """Lay `pattern` out over `grid`, with index tensors on `device`; dense keeps grid order.

    Raises `ValueError` for a window that is larger than the grid.
    """
    if isinstance(pattern, Dense):
        return Layout(pattern, grid)
    check_fits(pattern, grid)
    order_L, tiles = _cut(grid, pattern.tile, torch.device(device))
    if isinstance(pattern, Sta):
        return Layout(pattern, grid, order_L, tiles, _windows(pattern, tiles))
    if 1 < tiles.num < _FEW_TILES:  # 2505.13389 has 100s
        size = f"{grid.frames}x{grid.height}x{grid.width} tokens (frames, rows, columns)"
        text = "vsa: %d tiles of %s are few: below about %d, sparsity brings no speed"
        logger.info(text, tiles.num, size, _FEW_TILES)
    num_selected = pattern.num_selected(tiles.num)
    return Layout(pattern, grid, order_L, tiles, num_selected=num_selected)


def _cut(grid: TokenGrid, tile: Tile, device: torch.device) -> tuple[Tensor, Tiles]:
    """Order tokens by tile, tiles and the tokens in each by t, h, w."""
    axes = (grid.frames, grid.height, grid.width)
    tile = (min(tile[0], axes[0]), min(tile[1], axes[1]), min(tile[2], axes[2]))
    counts = TokenGrid(*(-(-n // size) for n, size in zip(axes, tile, strict=True)))
    number = torch.zeros(axes, dtype=torch.int64, device=device)
    for axis, (length, size) in enumerate(zip(axes, tile, strict=True)):
        per_axis = (counts.frames, counts.height, counts.width)[axis]
        place = torch.arange(length, device=device) // size
        number = number * per_axis + place.view([-1 if a == axis else 1 for a in range(3)])
    sorted_L, order_L = number.flatten().sort(stable=True)
    sizes_N = torch.bincount(sorted_L, minlength=counts.num_tokens)
    slots = math.prod(tile)
    return order_L, Tiles(
        grid=counts,
        sizes_N=sizes_N,
        starts_N=sizes_N.cumsum(0) - sizes_N,
        tile_L=sorted_L,
        num_slots=slots,
        is_uniform=bool((sizes_N == slots).all()),
    )


def _windows(pattern: Sta, tiles: Tiles) -> Lists:
    """List the tiles of every window: |centre - j| <= k // 2, with the centre moved inside."""
    axes = (tiles.grid.frames, tiles.grid.height, tiles.grid.width)
    seen_HNN = torch.stack([_window(window, axes) for window in pattern.windows])
    count_HN = seen_HNN.sum(-1)
    # The tiles that are seen come first, in rising order.
    index_HNK = (~seen_HNN).int().argsort(dim=-1, stable=True)[..., : int(count_HN.max())]
    device = tiles.sizes_N.device
    return Lists(index_HNK[None].to(device), count_HN[None].to(device))


def _window(window: Tile, axes: tuple[int, int, int]) -> Tensor:
    parts = []
    for size, n in zip(window, axes, strict=True):
        half, j = size // 2, torch.arange(n)
        high = max(half, n - 1 - half)
        centre = j.clamp(min(half, high), high)
        parts.append((centre[:, None] - j).abs() <= half)
    t, h, w = parts
    seen = torch.einsum("ad,be,cf->abcdef", t.float(), h.float(), w.float())
    return seen.bool().reshape(math.prod(axes), math.prod(axes))
