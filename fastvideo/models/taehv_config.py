"""Dims of a TAEHV decoder, checked without torch, so that a request can be refused early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fastvideo.models import config_fields


@dataclass(frozen=True)
class TaehvConfig:
    """Dims of the network; the defaults are those of `taew2_1.pth` for Wan2.1.

    Each stage has `num_blocks` blocks of its width, then doubles rows and columns (`space`) and
    frames (`time`) or not; `widths` has one entry more, for the head. The head makes squares of
    `patch_size` pixels. `latents_mean` and `latents_std` are the statistics by which the latents
    that it was trained on were normalised; empty if that is not known.
    """

    z_dim: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)
    num_blocks: tuple[int, ...] = (3, 3, 3)
    space: tuple[bool, ...] = (True, True, True)
    time: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Read a config; raise `ValueError` for keys or dims that this family does not have."""
        made: Self = config_fields.read(cls, values)
        return made

    def __post_init__(self) -> None:
        """Refuse dims that cannot be built."""
        stages = len(self.widths) - 1
        for name in ("num_blocks", "space", "time"):
            if len(getattr(self, name)) != stages:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries and must have {stages},"
                    f" one less than widths"
                )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.z_dim):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries and must have none or"
                    f" {self.z_dim} (z_dim)"
                )
        if stages < 1 or min(self.z_dim, self.patch_size, *self.widths, *self.num_blocks) < 1:
            raise ValueError("z_dim, patch_size, widths and num_blocks must be at least 1")

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame after the first."""
        return 1 << sum(self.time)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position along height and width."""
        return self.patch_size << sum(self.space)


Config = TaehvConfig
