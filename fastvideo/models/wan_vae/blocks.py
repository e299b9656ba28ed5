"""The blocks of Wan's VAE: residual block, attention, resampling and shortcuts without parameters.

Attribute names are those of diffusers' AutoencoderKLWan, so that its checkpoints load by name.
Tensors travel as (B, C, T, H, W) in channels_last_3d memory, in which (B T H W, C) is a view:
attention works on that view, spatial layers on (B T, C, H, W), and nothing is copied to change the
layout.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo.layers.upsample import doubling_kernel
from fastvideo.models.wan_vae.causal import CausalConv3d, Past, rows_of, starts_clip
from fastvideo.models.wan_vae.norm import RmsNorm


class ResidualBlock(nn.Module):
    """Two times norm, SiLU and causal convolution, around a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3)
        self.norm2 = RmsNorm(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3)
        self.conv_shortcut = None if in_dim == out_dim else nn.Conv3d(in_dim, out_dim, 1)

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return (B, out_dim, T, H, W)."""
        h = self.conv1.convolve(self.norm1.with_silu(x_BCTHW, room=2), past)
        h = self.conv2.convolve(self.norm2.with_silu(h, room=2), past)
        return add(h, x_BCTHW if self.conv_shortcut is None else self.conv_shortcut(x_BCTHW))


class AttentionBlock(nn.Module):
    """Single-head attention among the positions of each frame, around a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RmsNorm(dim, num_axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return x's shape; frames do not see each other, of the past only the rows matter."""
        B, C, T, H, W = x_BCTHW.shape
        x = _to_BTHWC(self.norm(x_BCTHW)).reshape(B * T, 1, H * W, C)
        q, k, v = _pointwise(self.to_qkv, x).chunk(3, dim=-1)
        if (rows := rows_of(past)) is not None:
            k, v = rows.gather(torch.stack([k, v]), dim=-2)
        x = _pointwise(self.proj, F.scaled_dot_product_attention(q, k, v))
        return add(_to_BCTHW(x.view(B, T, H, W, C)), x_BCTHW)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return x's shape."""
        x_BCTHW = self.resnets[0](x_BCTHW, past)
        x_BCTHW = self.attentions[0](x_BCTHW, past)
        x_BCTHW = self.resnets[1](x_BCTHW, past)
        return x_BCTHW


class Downsample(nn.Module):
    """Halve height and width, and with `temporal` the frames after the first: 2n+1 -> n+1."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return (B, C, T', H/2, W/2)."""
        x = F.pad(_frames_as_batch(x_BCTHW), (0, 1, 0, 1))  # only the right and bottom edge
        x = self.resample[1](x)
        x = _batch_as_frames(x, x_BCTHW.shape[0])
        return x if self.time_conv is None else self._halve_time(x, past)

    def _halve_time(self, x: Tensor, past: Past | None) -> Tensor:
        assert self.time_conv is not None, "only a temporal downsampler halves time"
        if past is not None:
            x = F.pad(x, (0, 0, 0, 0, 1, 0))
            past.fill(self.time_conv, x, 1)
        if not starts_clip(past):
            later: Tensor = self.time_conv(x)
            return later
        x = x if past is None else x[:, :, 1:]
        first = x[:, :, :1]  # passes as it is
        return first if x.shape[2] == 1 else torch.cat([first, self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Double height and width, and with `temporal` the frames after the first: n+1 -> 2n+1."""

    def __init__(self, dim: int, out_dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, out_dim, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return (B, out_dim, T', 2H, 2W)."""
        if self.time_conv is not None:
            x_BCTHW = self._double_time(x_BCTHW, past)
        conv, edge = cast(nn.Conv2d, self.resample[1]), 1
        if (rows := rows_of(past)) is not None:
            x_BCTHW, edge = (
                rows.pad(x_BCTHW),
                3,
            )  # two rows more are made of each row that was added
        x = _frames_as_batch(x_BCTHW)
        kernel = doubling_kernel(conv.weight)
        x = F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=(edge, 1))
        return _batch_as_frames(x, x_BCTHW.shape[0])

    def _double_time(self, x: Tensor, past: Past | None) -> Tensor:
        assert self.time_conv is not None, "only a temporal upsampler doubles time"
        split = int(starts_clip(past))  # the clip's first frame stays single, unseen by the rest
        first, x = x[:, :, :split], x[:, :, split:]
        if x.shape[2] == 0:
            return first
        pairs = _to_BTHWC(self.time_conv(x, past))
        pairs = torch.unflatten(pairs, -1, (2, -1))  # (B, T, H, W, 2, C)
        doubled = pairs.movedim(4, 2).contiguous().flatten(1, 2)
        return _to_BCTHW(torch.cat([_to_BTHWC(first), doubled], dim=1) if split else doubled)


class AvgDown(nn.Module):
    """Shortcut around a downsampler: move space and time into channels, average groups of those."""

    def __init__(self, in_dim: int, out_dim: int, *, time: int, space: int) -> None:
        super().__init__()
        if in_dim * time * space**2 % out_dim:
            raise ValueError(
                f"a residual down block cannot go from {in_dim} to {out_dim} channels with stride "
                f"{time}x{space}x{space}: {in_dim * time * space**2} must be a multiple of "
                f"{out_dim}; change dim_mult"
            )
        self.out_dim, self.time, self.space = out_dim, time, space

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return (B, out_dim, T', H/space, W/space)."""
        if starts_clip(past):
            x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, self.time - 1, 0))
        B, C, T, H, W = x_BCTHW.shape
        t, s = self.time, self.space
        x = x_BCTHW.reshape(B, C, T // t, t, H // s, s, W // s, s)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, T', H', W', C, t, s, s)
        x = x.reshape(B, T // t, H // s, W // s, self.out_dim, -1).mean(dim=-1)
        return _to_BCTHW(x)


class DupUp(nn.Module):
    """Shortcut around an upsampler: repeat channels, move them into time and space."""

    def __init__(self, in_dim: int, out_dim: int, *, time: int, space: int) -> None:
        super().__init__()
        repeats, rest = divmod(out_dim * time * space**2, in_dim)
        if rest or repeats not in (1, space, space**2, time * space**2):
            raise ValueError(
                f"a residual up block cannot go from {in_dim} to {out_dim} channels with stride "
                f"{time}x{space}x{space}: channels must stay or halve; change dim_mult"
            )
        # The repeats fill the last axes of (channel, time, row, column): there, broadcast instead.
        self.column = 1 if repeats >= space else space
        self.row = 1 if repeats >= space**2 else space
        self.sub = 1 if repeats >= time * space**2 else time
        self.out_dim, self.time, self.space = out_dim, time, space

    def forward(self, h_BCTHW: Tensor, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return the upsampled h plus x brought to its size; h's memory may be reused."""
        x = _to_BTHWC(x_BCTHW)
        x = torch.unflatten(x, -1, (self.out_dim, self.sub, self.row, self.column))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, T, time, H, row, W, column, C), some of them 1
        h = _to_BTHWC(h_BCTHW)
        if not starts_clip(past):
            return _to_BCTHW(self._add(h, x))
        single = self._add(h[:, :1], x[:, :1, -1:])  # of the clip's first frame, the last copy
        if h.shape[1] == 1:
            return _to_BCTHW(single)
        return _to_BCTHW(torch.cat([single, self._add(h[:, 1:], x[:, 1:])], dim=1))

    def _add(self, h_BTHWC: Tensor, x: Tensor) -> Tensor:
        s, t = self.space, h_BTHWC.shape[1] // x.shape[1]
        cells = h_BTHWC
        for axis, size in ((3, s), (2, s), (1, t)):
            cells = torch.unflatten(cells, axis, (-1, size))
        return add(cells, x).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def add(fresh: Tensor, x: Tensor) -> Tensor:
    """Return the sum, in the memory of `fresh`, which nobody else holds, if autograd permits."""
    return fresh + x if torch.is_grad_enabled() else fresh.add_(x)


def _to_BTHWC(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW.permute(0, 2, 3, 4, 1)


def _to_BCTHW(x_BTHWC: Tensor) -> Tensor:
    return x_BTHWC.permute(0, 4, 1, 2, 3)


def _pointwise(conv: nn.Conv2d, x_NHLC: Tensor) -> Tensor:
    return F.linear(x_NHLC, conv.weight.flatten(1), conv.bias)


def _frames_as_batch(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def _batch_as_frames(x_NCHW: Tensor, batch: int) -> Tensor:
    return torch.unflatten(x_NCHW, 0, (batch, -1)).transpose(1, 2)
