"""A decoder's frames cut into bands of rows, one for each process; exact.

for pixels in stream(vae, z, meshes.axis("sample")): ...   # whole frames, on every process

Each spatial convolution borrows one row of its input from either neighbour and spatial attention
sees the keys of all rows, so that every number is the one that a single process computes. Nothing
is computed twice, in contrast to tiles that overlap and are blended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo.parallel import collectives, rules
from fastvideo.parallel.axis import Axis


@dataclass(frozen=True)
class Rows:
    """This process's band of the rows; `each` counts the latent rows of every process's.

    Above the latents' resolution all counts grow alike, as does what is given here.
    """

    axis: Axis
    each: tuple[int, ...]

    def own(self, z_BCTHW: Tensor) -> Tensor:
        """Cut this band out of whole latents."""
        return collectives.own(z_BCTHW, self.axis, dim=3, sizes=self.each)

    def pad(self, x_BCTHW: Tensor, *, skip: int = 0) -> Tensor:
        """Add the neighbours' nearest rows, zeros at the frame's edges: (B, C, T, H + 2, W).

        In the first `skip` frames the new rows are zeros.
        """
        B, C, T, H, W = x_BCTHW.shape
        out_BTHWC = x_BCTHW.new_empty(B, T, H + 2, W, C)  # the layout that convolutions want
        out_BTHWC[:, :, 1:-1] = x_BCTHW.permute(0, 2, 3, 4, 1)
        out_BTHWC[:, :skip, :: H + 1] = 0
        sent = out_BTHWC[:, skip:]
        above, below = self._swap(sent[:, :, 1].contiguous(), sent[:, :, -2].contiguous())
        sent[:, :, 0], sent[:, :, -1] = above, below
        return out_BTHWC.permute(0, 4, 1, 2, 3)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Join all bands along `dim`, in which whole rows follow one another; on every process."""
        scale = x.shape[dim] // self.each[self.axis.rank]
        sizes = [scale * count for count in self.each]
        return collectives.gather(x, self.axis, dim=dim, sizes=sizes)

    def _swap(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Give the neighbours this band's first and last row; return theirs that lie next to it."""
        ranks, place = self.axis.ranks, self.axis.rank
        above, below = torch.zeros_like(first), torch.zeros_like(last)
        work = []
        if place > 0:
            work += self._exchange(first, above, ranks[place - 1])
        if place + 1 < self.axis.size:
            work += self._exchange(last, below, ranks[place + 1])
        for request in dist.batch_isend_irecv(work):
            request.wait()
        return above, below

    def _exchange(self, given: Tensor, taken: Tensor, peer: int) -> list[Any]:
        send = dist.P2POp(dist.isend, given, peer, self.axis.group)
        return [send, dist.P2POp(dist.irecv, taken, peer, self.axis.group)]


class Decoder(Protocol):
    """Spatially sharded decode: exchanges halo rows with neighbour ranks."""

    def fitting_chunk(self, z: Tensor) -> int:
        """Return how many latent frames of this size it decodes at a time."""
        ...

    def stream(
        self, z_BCTHW: Tensor, chunk: int | None = None, *, rows: Rows | None = None
    ) -> Iterator[Tensor]:
        """Yield pixels (B, C, t, h, w), of the rows in z."""
        ...


def stream(
    decoder: Decoder, z_BCTHW: Tensor, axis: Axis, *, chunk: int | None = None
) -> Iterator[Tensor]:
    """Yield the pixels of `decoder.stream`, whole and on every process of the axis.

    All of them call it with the same latents and take every piece. Raises `ValueError` for more
    processes than latent rows.
    """
    if axis.size == 1:
        yield from decoder.stream(z_BCTHW, chunk)
        return
    height = z_BCTHW.shape[3]
    rules.check_rows(height, axis.size)
    rows = Rows(axis, collectives.shares(height, axis.size))
    if chunk is None:  # the same for all, whose bands may differ by a row
        chunk = decoder.fitting_chunk(z_BCTHW[:, :, :, : max(rows.each)])
    for pixels_BCTHW in decoder.stream(rows.own(z_BCTHW), chunk, rows=rows):
        yield rows.gather(pixels_BCTHW, dim=3)
