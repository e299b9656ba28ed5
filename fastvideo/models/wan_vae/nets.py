"""Encoder and decoder of Wan's VAE in both layouts; Wan2.2's has a shortcut around every stage.

Names follow diffusers' AutoencoderKLWan. In the Wan2.1 layout the encoder's stages are one flat
list and every upsampler halves the channels; in Wan2.2 each stage is one block and upsamplers keep
the channels. `temporal` is None for a stage that keeps the size, else whether it changes time too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fastvideo.models.wan_vae.blocks import (
    AvgDown,
    Downsample,
    DupUp,
    MidBlock,
    ResidualBlock,
    Upsample,
    add,
)
from fastvideo.models.wan_vae.causal import CausalConv3d, Past
from fastvideo.models.wan_vae.norm import RmsNorm


class DownBlock(nn.Module):
    """One stage of the Wan2.2 encoder."""

    def __init__(
        self, in_dim: int, out_dim: int, num_blocks: int, *, temporal: bool | None
    ) -> None:
        super().__init__()
        down = temporal is not None
        self.avg_shortcut = AvgDown(
            in_dim, out_dim, time=2 if temporal else 1, space=2 if down else 1
        )
        self.resnets = _resnets(in_dim, out_dim, num_blocks)
        self.downsampler = Downsample(out_dim, temporal=bool(temporal)) if down else None

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return (B, out_dim, T', H', W')."""
        h = x_BCTHW
        for resnet in self.resnets:
            h = resnet(h, past)
        if self.downsampler is not None:
            h = self.downsampler(h, past)
        return add(h, self.avg_shortcut(x_BCTHW, past))


class UpBlock(nn.Module):
    """One stage of the Wan2.1 decoder; its upsampler halves the channels."""

    def __init__(
        self, in_dim: int, out_dim: int, num_blocks: int, *, temporal: bool | None
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_dim, out_dim, num_blocks)
        self.upsamplers = None
        if temporal is not None:
            self.upsamplers = nn.ModuleList([Upsample(out_dim, out_dim // 2, temporal=temporal)])

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return (B, out_dim or half of it, T', H', W')."""
        for resnet in self.resnets:
            x_BCTHW = resnet(x_BCTHW, past)
        return x_BCTHW if self.upsamplers is None else self.upsamplers[0](x_BCTHW, past)


class ResidualUpBlock(nn.Module):
    """One stage of the Wan2.2 decoder; only the last one has neither upsampler nor shortcut."""

    def __init__(
        self, in_dim: int, out_dim: int, num_blocks: int, *, temporal: bool | None
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_dim, out_dim, num_blocks)
        self.upsampler, self.avg_shortcut = None, None
        if temporal is not None:
            self.upsampler = Upsample(out_dim, out_dim, temporal=temporal)
            self.avg_shortcut = DupUp(in_dim, out_dim, time=2 if temporal else 1, space=2)

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return (B, out_dim, T', H', W')."""
        h = x_BCTHW
        for resnet in self.resnets:
            h = resnet(h, past)
        if self.upsampler is None or self.avg_shortcut is None:
            return h
        out: Tensor = self.avg_shortcut(self.upsampler(h, past), x_BCTHW, past)
        return out


class Encoder(nn.Module):
    """Patchified pixels to moments; `dims` are the channels before, between and after stages."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        dims: Sequence[int],
        num_blocks: int,
        temporal: Sequence[bool],
        is_residual: bool,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_dim, dims[0], 3)
        self.down_blocks = nn.ModuleList()
        for (a, b), time in zip(pairwise(dims), [*temporal, None], strict=True):
            if is_residual:
                self.down_blocks.append(DownBlock(a, b, num_blocks, temporal=time))
                continue
            self.down_blocks.extend(_resnets(a, b, num_blocks))
            if time is not None:
                self.down_blocks.append(Downsample(b, temporal=time))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RmsNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], out_dim, 3)

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return (B, out_dim, T', H', W')."""
        x = self.conv_in(x_BCTHW, past)
        for block in self.down_blocks:
            x = block(x, past)
        x = self.mid_block(x, past)
        return self.conv_out.convolve(self.norm_out.with_silu(x, room=2), past)


class Decoder(nn.Module):
    """Latents to patchified pixels; `dims` as in the encoder, from the latents' side."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        dims: Sequence[int],
        num_blocks: int,
        temporal: Sequence[bool],
        is_residual: bool,
    ) -> None:
        super().__init__()
        block = ResidualUpBlock if is_residual else UpBlock
        self.conv_in = CausalConv3d(in_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for i, ((a, b), time) in enumerate(zip(pairwise(dims), [*temporal, None], strict=True)):
            halved = i > 0 and not is_residual  # by the upsampler before
            self.up_blocks.append(block(a // 2 if halved else a, b, num_blocks + 1, temporal=time))
        self.norm_out = RmsNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], out_dim, 3)

    def forward(self, z_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Return (B, out_dim, T', H', W')."""
        x = self.conv_in(z_BCTHW, past)
        x = self.mid_block(x, past)
        for block in self.up_blocks:
            x = block(x, past)
        return self.conv_out.convolve(self.norm_out.with_silu(x, room=2), past)


def _resnets(in_dim: int, out_dim: int, num_blocks: int) -> nn.ModuleList:
    dims = [in_dim] + [out_dim] * num_blocks
    return nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(dims))
