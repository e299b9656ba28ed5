"""The causal convolution of Wan's VAE, and the memory that lets a clip be processed chunk by chunk.

Every network here maps a whole clip at once, or chunk after chunk with a `Past` in hand; both give
the same frames. A layer that looks back in time asks the past for the frames before this chunk and
leaves its own last ones there. No state stays on a module, so any number of streams can share one
network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class Rows(Protocol):
    """Neighbouring rows of every frame, at whatever resolution; others hold the rest.

    A network that is given some finds the rest here, where a layer looks beyond its own.
    """

    def pad(self, x_BCTHW: Tensor, *, skip: int = 0) -> Tensor:
        """Add the row above and the row below, zeros at the frame's edges: (B, C, T, H + 2, W).

        In the first `skip` frames the new rows are zeros, which the past overwrites.
        """
        ...

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Join the parts of all along `dim`, in which whole rows follow one another."""
        ...


@dataclass
class Past:
    """What the chunks of one stream left so far: the last frames of every layer that looks back.

    `rows` says which rows of the frames the stream has; None is all of them.
    """

    first: bool = True
    frames: dict[nn.Module, Tensor] = field(default_factory=dict)
    rows: Rows | None = None

    def fill(self, layer: nn.Module, roomy_BCTHW: Tensor, room: int) -> None:
        """Overwrite the first `room` frames by the last that `layer` saw; remember its new last."""
        if layer in self.frames:
            roomy_BCTHW[:, :, :room] = self.frames[layer]
        self.frames[layer] = roomy_BCTHW[:, :, -room:].clone()


def rows_of(past: Past | None) -> Rows | None:
    """Return the rows that a stream has; None is all of them, as in a clip without a past."""
    return None if past is None else past.rows


def starts_clip(past: Past | None) -> bool:
    """Tell whether this chunk holds the clip's first frame; with no past it is the clip."""
    return past is None or past.first


class CausalConv3d(nn.Conv3d):
    """A stride-1 convolution that sees no later frame: in time, it is padded on the left only."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int]) -> None:
        k = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, k, padding=(0, k[1] // 2, k[2] // 2))
        self.room = k[0] - 1

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return as many frames as came in."""
        return self.convolve(F.pad(x_BCTHW, (0, 0, 0, 0, self.room, 0)), past)

    def convolve(self, roomy_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Convolve x behind `self.room` zero frames, which the past overwrites by what it holds."""
        rows = rows_of(past) if self.kernel_size[1] > 1 else None
        if rows is not None:
            roomy_BCTHW = rows.pad(roomy_BCTHW, skip=self.room)
        if past is not None and self.room:
            past.fill(self, roomy_BCTHW, self.room)
        elif self.room and roomy_BCTHW.shape[2] == self.room + 1:  # an image: the rest meets zeros
            image = roomy_BCTHW[:, :, self.room :]
            return F.conv3d(image, self.weight[:, :, self.room :], self.bias, padding=self.padding)
        if rows is not None:
            return F.conv3d(
                roomy_BCTHW, self.weight, self.bias, padding=(0, 0, self.kernel_size[2] // 2)
            )
        return super().forward(roomy_BCTHW)
