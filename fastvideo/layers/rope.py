"""Rotary positions in three axes: channel pairs turn by an angle of frame, row or column."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvideo.shapes import TokenGrid


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Split a head's channels among frame, row, column; the last two get 2 (head_dim // 6) each."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def turns(
    grid: TokenGrid,
    *,
    head_dim: int,
    device: torch.device,
    frame_T: Tensor | None = None,
    theta: float = 1e4,
) -> Tensor:
    """Return (cos, sin) per channel pair: float32 (L, head_dim / 2, 2), tokens in t, h, w order.

    `frame_T` places the frames in time; the default counts from 0. Angles are made in float64: at
    position 1000 a float32 angle is wrong by 1e-4 (RoFormer 2104.09864, eq. 15).
    """
    # Metal has no float64.
    exact = torch.float32 if device.type == "mps" else torch.float64
    counts = (grid.frames, grid.height, grid.width)
    parts = []
    for axis, (count, size) in enumerate(zip(counts, axis_sizes(head_dim), strict=True)):
        position = torch.arange(count, dtype=exact, device=device)
        if axis == 0 and frame_T is not None:
            position = frame_T.to(device, exact)
        exponent = torch.arange(0, size, 2, dtype=exact, device=device) / size
        angle = torch.outer(position, theta**-exponent)
        turn = torch.stack((angle.cos(), angle.sin()), dim=-1).float()
        shape = [1, 1, 1, *turn.shape[1:]]
        shape[axis] = count
        parts.append(turn.view(shape).expand(*counts, -1, -1))
    return torch.cat(parts, dim=-2).flatten(0, 2)


def rotate(x_BLHD: Tensor, turn_LF2: Tensor) -> Tensor:
    """Turn each adjacent channel pair (a, b) into (a cos - b sin, a sin + b cos), in float32."""
    pairs = x_BLHD.float().reshape(*x_BLHD.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():
        # Compilers fuse real arithmetic and know no complex numbers.
        (a, b), (cos, sin) = pairs.unbind(-1), turn_LF2[:, None].unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    # Eagerly, one complex product is 15 times faster on a CPU than strided reads of a and b.
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(turn_LF2)[:, None]
    return torch.view_as_real(turned).flatten(-2)
