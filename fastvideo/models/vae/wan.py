"""Wan's video autoencoder, whole clip or streaming, in the Wan2.1 and the Wan2.2 layout.

    vae = WanVae(WanVaeConfig.parse(json.loads(text)))
    z = vae.normalize(vae.encode(pixels))               # what the denoiser sees
    pixels = vae.decode(vae.denormalize(z))             # or: for frames in vae.stream(...)

A clip has T = 4k+1 frames and k+1 latent frames: the first frame stands alone, then four to one.
The released code walks the clip in chunks of one latent frame; here every layer maps a whole clip
to the same numbers, and `stream` walks it in chunks of any size. Parameter names are those of
diffusers' AutoencoderKLWan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastvideo.models import config_fields
from fastvideo.models.wan_vae.causal import CausalConv3d, Past, Rows
from fastvideo.models.wan_vae.nets import Decoder, Encoder
from fastvideo.shapes import Compression, PixelShape

# Keys of published configs that change nothing; keys beginning with "_" are diffusers' bookkeeping.
TOLERATED = ("clip_output",)

# Statistics of the published Wan2.1 autoencoder; diffusers' defaults for configs that give none.
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# The widest activation of a decoded chunk: for the caches of a CPU, for the memory of a GPU.
CPU_CHUNK_BYTES = 16 * 2**20
GPU_CHUNK_BYTES = 2 * 2**30


@dataclass(frozen=True)
class WanVaeConfig:
    """Dims and latent statistics under diffusers' names ("temperal" too) and defaults (Wan2.1)."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = WAN21_MEAN
    latents_std: tuple[float, ...] = WAN21_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = 4
    scale_factor_spatial: int | None = 8

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, source: str = "the VAE's config") -> Self:
        """Read a diffusers config; raise `ValueError` for keys or dims this family does not have.

        Keys that begin with "_" and those in `TOLERATED` are ignored; all others must be known.
        """
        try:
            made: Self = config_fields.read(cls, values, ignored=TOLERATED)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        return made

    def __post_init__(self) -> None:
        """Refuse dims that cannot be built."""
        stages = len(self.dim_mult)
        for name, values, length in (
            ("temperal_downsample", self.temperal_downsample, stages - 1),
            ("latents_mean", self.latents_mean, self.z_dim),
            ("latents_std", self.latents_std, self.z_dim),
        ):
            if len(values) != length:
                raise ValueError(
                    f"{name} has {len(values)} entries and must have {length} "
                    f"for {stages} stages (dim_mult) and z_dim {self.z_dim}"
                )
        if self.attn_scales or self.dropout:
            raise ValueError("attn_scales must be [] and dropout 0: no Wan VAE has either")
        for name, given, scale in (
            ("scale_factor_temporal", self.scale_factor_temporal, self.temporal_stride),
            ("scale_factor_spatial", self.scale_factor_spatial, self.spatial_stride),
        ):
            if given not in (None, scale):
                raise ValueError(f"{name} is {given} but the dims make it {scale}")

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame after the first."""
        return 1 << sum(self.temperal_downsample)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position along height and width."""
        return (self.patch_size or 1) << (len(self.dim_mult) - 1)


class WanVae(nn.Module):
    """The autoencoder: pixels (B, 3, T, H, W) in [-1, 1], raw latents (B, z_dim, T', H', W')."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        self.config = config
        mult, base, z_dim = config.dim_mult, config.base_dim, config.z_dim
        self.encoder = Encoder(
            config.in_channels,
            2 * z_dim,
            dims=[base * m for m in (1, *mult)],
            num_blocks=config.num_res_blocks,
            temporal=config.temperal_downsample,
            is_residual=config.is_residual,
        )
        self.quant_conv = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = CausalConv3d(z_dim, z_dim, 1)
        base = config.decoder_base_dim or base
        self.decoder = Decoder(
            z_dim,
            config.out_channels,
            dims=[base * m for m in (mult[-1], *mult[::-1])],
            num_blocks=config.num_res_blocks,
            temporal=config.temperal_downsample[::-1],
            is_residual=config.is_residual,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which both directions run and return."""
        return self.post_quant_conv.weight.dtype

    def encode(self, pixels_BCTHW: Tensor, *, chunk: int | None = None) -> Tensor:
        """Return the mean as raw latents (B, z_dim, T', H', W'); `chunk` as in `encode_moments`."""
        return self.encode_moments(pixels_BCTHW, chunk=chunk)[0]

    def encode_moments(
        self, pixels_BCTHW: Tensor, *, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, each (B, z_dim, T', H', W').

        With `chunk` the clip is encoded that many latent frames at a time: the same numbers in less
        memory. Raises `ValueError` for a size that the strides do not divide.
        """
        self._check_pixels(pixels_BCTHW)
        x = _patchify(pixels_BCTHW.to(self.dtype), self.config.patch_size or 1)
        h = self.encoder(x) if chunk is None else self._encode_chunks(x, _checked_chunk(chunk))
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z_BCTHW: Tensor, *, clamp: bool = True) -> Tensor:
        """Decode raw latents (B, z_dim, T', H', W') to pixels.

        A loss wants `clamp=False`: clamped pixels have no gradient, however wrong they are.
        Without gradients the clip is decoded in chunks: faster on a CPU, and in bounded memory.
        """
        self._check_latents(z_BCTHW)
        if torch.is_grad_enabled():
            return self._decode(z_BCTHW, None, clamp=clamp)
        return torch.cat(list(self._decode_chunks(z_BCTHW, None, clamp=clamp)), dim=2)

    def stream(
        self, z_BCTHW: Tensor, chunk: int | None = None, *, rows: Rows | None = None
    ) -> Iterator[Tensor]:
        """Yield the pixels of `decode` from `chunk` latent frames at a time; no gradient is kept.

        The first piece has `temporal_stride - 1` frames less than the others. None for `chunk`
        takes as many latent frames as fit the caches of a CPU or a part of a GPU's memory. With
        `rows` the latents are those of some rows, and so are the pixels.
        """
        self._check_latents(z_BCTHW)
        return self._decode_chunks(z_BCTHW, chunk, clamp=True, rows=rows)

    @torch.no_grad()
    def _decode_chunks(
        self, z: Tensor, chunk: int | None, *, clamp: bool, rows: Rows | None = None
    ) -> Iterator[Tensor]:
        past = Past(rows=rows)
        chunk = self.fitting_chunk(z) if chunk is None else _checked_chunk(chunk)
        for part in _chunks(z, first=chunk, size=chunk):
            yield self._decode(part, past, clamp=clamp)
            past.first = False

    def fitting_chunk(self, z: Tensor) -> int:
        """Return the number of latent frames whose widest activation stays within a budget."""
        c = self.config
        positions = (z[:, 0, 0].numel() << 2 * (len(c.dim_mult) - 1)) * c.temporal_stride
        widest = positions * 2 * (c.decoder_base_dim or c.base_dim) * self.dtype.itemsize
        budget = CPU_CHUNK_BYTES if z.device.type == "cpu" else GPU_CHUNK_BYTES
        return max(1, budget // widest)

    def normalize(self, z_BCTHW: Tensor) -> Tensor:
        """Turn raw latents into the denoiser's: zero mean and unit variance per channel."""
        mean, std = self._statistics(z_BCTHW)
        return ((z_BCTHW.float() - mean) / std).to(z_BCTHW.dtype)

    def denormalize(self, z_BCTHW: Tensor) -> Tensor:
        """Turn the denoiser's latents into raw ones, ready for `decode`."""
        mean, std = self._statistics(z_BCTHW)
        return (z_BCTHW.float() * std + mean).to(z_BCTHW.dtype)

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Adopt statistics of raw latents, measured on a data set; `config` holds them."""
        self.config = dataclasses.replace(
            self.config, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std))
        )

    def _decode(self, z: Tensor, past: Past | None, *, clamp: bool) -> Tensor:
        z = z.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        x = self.decoder(self.post_quant_conv(z), past)
        x = _unpatchify(x, self.config.patch_size or 1)
        return x.clamp(-1, 1) if clamp else x

    def _encode_chunks(self, x: Tensor, chunk: int) -> Tensor:
        past, parts = Past(), []
        stride = self.config.temporal_stride
        for part in _chunks(x, first=1 + (chunk - 1) * stride, size=chunk * stride):
            parts.append(self.encoder(part, past))
            past.first = False
        return torch.cat(parts, dim=2)

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.tensor([self.config.latents_mean, self.config.latents_std], device=z.device)
        mean, std = both.view(2, 1, -1, 1, 1, 1)
        return mean, std

    def _check_pixels(self, x: Tensor) -> None:
        c, shape = self.config, tuple(x.shape)
        channels = c.in_channels // (c.patch_size or 1) ** 2
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(f"pixels {shape} must be (batch, {channels}, frames, height, width)")
        strides = Compression(c.temporal_stride, c.spatial_stride, patch=(1, 1, 1))
        PixelShape(*shape[2:]).latent(strides)

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 5 or z.shape[1] != self.config.z_dim or 0 in z.shape:
            raise ValueError(
                f"latents {tuple(z.shape)} must be "
                f"(batch, {self.config.z_dim}, frames, height, width)"
            )


def init_for_training(vae: WanVae) -> None:
    """Prepare fresh weights: begin with a small, almost constant variance of the latents.

    A log-variance near 0 drowns the mean in noise for the first hundreds of steps.
    """
    conv, z_dim = vae.quant_conv, vae.config.z_dim
    assert conv.bias is not None, "quant_conv has a bias"
    with torch.no_grad():
        conv.weight[z_dim:] *= 0.05
        conv.bias[z_dim:] = -5.0


def _checked_chunk(chunk: int) -> int:
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1 latent frame")
    return chunk


def _chunks(x_BCTHW: Tensor, *, first: int, size: int) -> tuple[Tensor, ...]:
    return x_BCTHW.tensor_split(list(range(first, x_BCTHW.shape[2], size)), dim=2)


def _patchify(x_BCTHW: Tensor, p: int) -> Tensor:
    """Move p x p pixels into channels, ordered (colour, column, row)."""
    B, C, T, H, W = x_BCTHW.shape
    x = x_BCTHW.reshape(B, C, T, H // p, p, W // p, p)
    x = x.permute(0, 2, 3, 5, 1, 6, 4)  # (B, T, H', W', C, column, row)
    return x.reshape(B, T, H // p, W // p, C * p * p).permute(0, 4, 1, 2, 3)


def _unpatchify(x_BCTHW: Tensor, p: int) -> Tensor:
    """Undo `_patchify`; contiguous, as three channels last are ten times slower to write."""
    B, C, T, H, W = x_BCTHW.shape
    x = x_BCTHW.reshape(B, C // p**2, p, p, T, H, W)
    x = x.permute(0, 1, 4, 5, 3, 6, 2)  # (B, colour, T, H, row, W, column)
    return x.reshape(B, C // p**2, T, H * p, W * p)


Config = WanVaeConfig
Vae = WanVae
