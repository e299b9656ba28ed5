"""A decoder that is small and fast rather than exact: TAEHV's, at its published or at other widths.

    net = Decoder(Config.parse(values))
    pixels = net.decode(z)                       # a whole clip
    for part in net.stream(z, chunk=4): ...      # the same frames, piece by piece

Tensor names and arithmetic are those of madebyollin/taehv (taehv.py at 115aaa7), whose `taew2_1`
decodes Wan2.1. In contrast to a VAE it takes the denoiser's *normalised* latents. Frames are a
batch of images to 2-D convolutions; time passes only through blocks that also see the frame before,
at their own level, and through layers that make two frames of one. From T latent frames these grow
s * T frames, s the temporal stride. The first s - 1 are dropped; 1 + s * (T - 1) stay, as a causal
VAE has them. The network's own pixels are in [0, 1]; here they leave in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo.layers.upsample import doubling_kernel
from fastvideo.log import logger
from fastvideo.models.taehv_config import TaehvConfig
from fastvideo.models.vae.wan import WAN21_MEAN, WAN21_STD

# Widest activation of a chunk: one that stays in a core's share of the cache, or in spare memory.
CPU_CHUNK_BYTES = 4 << 20
GPU_CHUNK_BYTES = 1 << 30


@dataclass
class Past:
    """What the chunks of one stream left so far: the last frame that each block saw."""

    first: bool = True
    frames: dict[nn.Module, Tensor] = field(default_factory=dict)


class Clamp(nn.Module):
    """Latents softly limited to [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x's shape."""
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """Three convolutions of a frame beside the one before it, around a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv3x3(2 * dim, dim), nn.ReLU(), _conv3x3(dim, dim), nn.ReLU(), _conv3x3(dim, dim)
        )

    def forward(self, x_NCHW: Tensor, batch: int, past: Past | None) -> Tensor:
        """Return x's shape, N being the frames of all clips, clip after clip."""
        h = _relu(self.conv[0](self._with_previous(x_NCHW, batch, past)))
        h = _relu(self.conv[2](h))
        h = self.conv[4](h)
        return _relu(h + x_NCHW if torch.is_grad_enabled() else h.add_(x_NCHW))

    def _with_previous(self, x_NCHW: Tensor, batch: int, past: Past | None) -> Tensor:
        x_BTHWC = torch.unflatten(x_NCHW.permute(0, 2, 3, 1), 0, (batch, -1))
        before = None if past is None else past.frames.get(self)
        if before is None:
            before = torch.zeros_like(x_BTHWC[:, :1])
        if past is not None:
            past.frames[self] = x_BTHWC[:, -1:].clone()
        shifted = torch.cat([before, x_BTHWC[:, :-1]], dim=1)
        return torch.cat([x_BTHWC, shifted], dim=-1).flatten(0, 1).permute(0, 3, 1, 2)


class TGrow(nn.Module):
    """Make `stride` frames of one, at every position alone."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(dim, dim * stride, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N * stride, C, H, W)."""
        x = F.linear(x_NCHW.permute(0, 2, 3, 1), self.conv.weight.flatten(1))  # N H W sC
        if self.stride > 1:
            x = torch.unflatten(x, -1, (self.stride, -1)).permute(0, 3, 1, 2, 4)
            x = x.contiguous().flatten(0, 1)
        return x.permute(0, 3, 1, 2)


class Widen(nn.Conv2d):
    """A 3x3 convolution, after every pixel was repeated 2x2 if it `doubles`."""

    def __init__(self, in_dim: int, out_dim: int, *, doubles: bool) -> None:
        super().__init__(in_dim, out_dim, 3, padding=1, bias=False)
        self.doubles = doubles

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N, out_dim, H', W')."""
        if not self.doubles:
            return super().forward(x_NCHW)
        return F.conv_transpose2d(x_NCHW, doubling_kernel(self.weight), stride=2, padding=1)


class TaehvDecoder(nn.Module):
    """Normalised latents (B, z_dim, T, H, W) to pixels (B, 3, 1 + s(T - 1), H', W')."""

    def __init__(self, config: TaehvConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        layers: list[nn.Module] = [Clamp(), _conv3x3(c.z_dim, c.widths[0]), nn.ReLU()]
        stages = zip(pairwise(c.widths), c.num_blocks, c.space, c.time, strict=True)
        for (width, wider), count, doubles, grows in stages:
            layers += [MemBlock(width) for _ in range(count)]
            # The place of the published upsampling, which `Widen` does: a 1x1 layer before it
            # gives the same on a quarter of the positions.
            layers += [nn.Identity(), TGrow(width, 1 + grows)]
            layers += [Widen(width, wider, doubles=doubles)]
        layers += [nn.ReLU(), _conv3x3(c.widths[-1], 3 * c.patch_size**2)]
        self.decoder = nn.Sequential(*layers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which it runs and returns."""
        return cast(nn.Conv2d, self.decoder[1]).weight.dtype

    def decode(self, z_BCTHW: Tensor, *, clamp: bool = True) -> Tensor:
        """Decode normalised latents to pixels in [-1, 1].

        A loss wants `clamp=False`: clamped pixels have no gradient, however wrong they are.
        Without gradients the clip is decoded in chunks: faster on a CPU, and in bounded memory.
        """
        self._check_latents(z_BCTHW)
        if torch.is_grad_enabled():
            return self._decode(z_BCTHW, None, clamp=clamp)
        return torch.cat(list(self._decode_chunks(z_BCTHW, None, clamp=clamp)), dim=2)

    def stream(self, z_BCTHW: Tensor, chunk: int | None = None) -> Iterator[Tensor]:
        """Yield the pixels of `decode` from `chunk` latent frames at a time; no gradient is kept.

        The first piece has `temporal_stride - 1` frames less than the others. None for `chunk`
        takes as many latent frames as fit a CPU's caches or a part of a GPU's memory.
        """
        self._check_latents(z_BCTHW)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk {chunk} must be at least 1 latent frame")
        return self._decode_chunks(z_BCTHW, chunk, clamp=True)

    @torch.no_grad()
    def _decode_chunks(self, z: Tensor, chunk: int | None, *, clamp: bool) -> Iterator[Tensor]:
        past = Past()
        chunk = self._fitting_chunk(z) if chunk is None else chunk
        for part in z.tensor_split(list(range(chunk, z.shape[2], chunk)), dim=2):
            yield self._decode(part, past, clamp=clamp)
            past.first = False

    def _fitting_chunk(self, z: Tensor) -> int:
        """Return the number of latent frames whose widest activation stays within a budget."""
        c, cell, widest = self.config, z[:, 0, 0].numel(), 0
        for stage, width in enumerate(c.widths):
            positions = cell << (2 * sum(c.space[:stage]) + sum(c.time[:stage]))
            widest = max(widest, 2 * width * positions * self.dtype.itemsize)
        return max(1, (CPU_CHUNK_BYTES if z.device.type == "cpu" else GPU_CHUNK_BYTES) // widest)

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Note by which statistics the latents were normalised; `config` holds them."""
        self.config = dataclasses.replace(
            self.config, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std))
        )

    def _decode(self, z_BCTHW: Tensor, past: Past | None, *, clamp: bool) -> Tensor:
        batch, c = len(z_BCTHW), self.config
        x = z_BCTHW.to(self.dtype).transpose(1, 2).flatten(0, 1)  # BT C H W
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.decoder:
            if isinstance(layer, MemBlock):
                x = layer(x, batch, past)
            else:
                x = _relu(x) if isinstance(layer, nn.ReLU) else layer(x)
        x = torch.unflatten(F.pixel_shuffle(x.contiguous(), c.patch_size), 0, (batch, -1))
        if past is None or past.first:
            x = x[:, c.temporal_stride - 1 :]  # these belong to the time before the clip
        pixels = x.transpose(1, 2) * 2 - 1  # B 3 T' H' W'
        return pixels.clamp(-1, 1) if clamp else pixels

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 5 or z.shape[1] != self.config.z_dim or 0 in z.shape:
            raise ValueError(
                f"latents {tuple(z.shape)} must be "
                f"(batch, {self.config.z_dim}, frames, height, width)"
            )


@torch.no_grad()
def init_for_training(net: TaehvDecoder) -> None:
    """Prepare fresh weights: a grey clip whose frames copy each other, and signals of even size.

    Torch's own draw is scaled to He et al.'s (1502.01852), under which signals keep their size.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.mul_(math.sqrt(6))  # a variance of 2 / fan-in in place of 1 / (3 fan-in)
            if layer.bias is not None:
                layer.bias.zero_()
    for layer in net.decoder:
        if isinstance(layer, MemBlock):
            cast(nn.Conv2d, layer.conv[4]).weight.mul_(0.1)  # begins near the shortcut
        elif isinstance(layer, TGrow):
            copies = torch.eye(layer.conv.in_channels).repeat(layer.stride, 1)
            layer.conv.weight.copy_(copies[:, :, None, None])
    head = cast(nn.Conv2d, net.decoder[-1])
    assert head.bias is not None, "the head has a bias"
    head.weight.mul_(0.1)
    head.bias.fill_(0.5)


def dims_of(tensors: Mapping[str, Tensor], *, source: str | Path) -> TaehvConfig:
    """Read the dims of a published file, which has no config, from the shapes of its tensors.

    Published decoders double rows and columns in every stage. One of 16 channels is taken for
    Wan2.1's, as its file does not say (HunyuanVideo's looks the same). Raises `ValueError` if the
    tensors are no decoder of this family.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    grows = [i for i in range(len(shapes)) if f"decoder.{i}.conv.weight" in shapes]
    try:
        channels = shapes["decoder.1.weight"][1]
        rows = [shapes[f"decoder.{i}.conv.weight"] for i in grows]  # (frames * width, width, 1, 1)
        head = shapes[f"decoder.{grows[-1] + 3}.weight"]  # (3 * patch * patch, width, 3, 3)
    except (KeyError, IndexError):
        raise ValueError(f"{source} holds no decoder of the taehv family") from None
    is_wan = channels == len(WAN21_MEAN)
    origin = "taken for Wan2.1's" if is_wan else "of an unknown VAE"
    logger.info("%s has no config: its latents of %d channels are %s", source, channels, origin)
    return TaehvConfig(
        z_dim=channels,
        widths=(*(row[1] for row in rows), head[1]),
        num_blocks=tuple(j - i - 3 for i, j in pairwise((1, *grows))),
        space=(True,) * len(rows),
        time=tuple(row[0] > row[1] for row in rows),
        patch_size=math.isqrt(head[0] // 3),
        latents_mean=WAN21_MEAN if is_wan else (),
        latents_std=WAN21_STD if is_wan else (),
    )


def _conv3x3(in_dim: int, out_dim: int) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, 3, padding=1)


def _relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=not torch.is_grad_enabled())


Config = TaehvConfig
Decoder = TaehvDecoder
