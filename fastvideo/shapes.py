"""Pixel, latent and token shapes, and the arithmetic between them; nothing else computes one."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Compression:
    """How a family shrinks a clip: the VAE by `temporal` and `spatial`, the DiT by `patch` thw."""

    temporal: int = 4
    spatial: int = 8
    patch: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        """Refuse a family that does not shrink by whole numbers."""
        if min(self.temporal, self.spatial, *self.patch) < 1:
            raise ValueError(f"{self} must have factors of at least 1")

    @property
    def pixel_multiple(self) -> tuple[int, int]:
        """Height and width of a clip must be multiples of these."""
        return self.spatial * self.patch[1], self.spatial * self.patch[2]


@dataclass(frozen=True)
class PixelShape:
    """A clip in pixels."""

    frames: int
    height: int
    width: int

    def latent(self, c: Compression) -> LatentShape:
        """Return the latent shape; raise `ValueError` naming the nearest legal values."""
        _check("num_frames", self.frames, c.temporal, f"{c.temporal}k+1", first=1)
        for name, value, multiple in zip(
            ("height", "width"), (self.height, self.width), c.pixel_multiple, strict=True
        ):
            _check(name, value, multiple, f"a multiple of {multiple}", first=multiple)
        frames = (self.frames - 1) // c.temporal + 1
        return LatentShape(frames, self.height // c.spatial, self.width // c.spatial)


@dataclass(frozen=True)
class LatentShape:
    """A clip in latents: what the denoiser sees, without batch and channels."""

    frames: int
    height: int
    width: int

    def tokens(self, patch: tuple[int, int, int]) -> TokenGrid:
        """Return the token grid; raise `ValueError` if a patch does not divide the latents."""
        sizes = (self.frames, self.height, self.width)
        if any(size % p for size, p in zip(sizes, patch, strict=True)):
            raise ValueError(f"latents {sizes} (t, h, w) are not divisible by patches {patch}")
        t, h, w = (size // p for size, p in zip(sizes, patch, strict=True))
        return TokenGrid(t, h, w)

    def pixels(self, c: Compression) -> PixelShape:
        """Return the clip that decodes from these latents."""
        frames = (self.frames - 1) * c.temporal + 1
        return PixelShape(frames, self.height * c.spatial, self.width * c.spatial)


@dataclass(frozen=True)
class TokenGrid:
    """The DiT's tokens before they are flattened in t, h, w order."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """Length of the flattened sequence."""
        return self.frames * self.height * self.width

    @property
    def longest(self) -> int:
        """The most positions on an axis, of which a rotary table has only so many."""
        return max(self.frames, self.height, self.width)


def _check(name: str, value: int, stride: int, rule: str, *, first: int) -> None:
    """Raise `ValueError` unless value is first, first + stride, first + 2 stride, ..."""
    if value >= first and (value - first) % stride == 0:
        return
    low = first + max(0, value - first) // stride * stride
    near = f"{low}, {low + stride}" if value > first else f"{first}"
    raise ValueError(f"{name} {value} must be {rule} for this model; nearest: {near}")


def parse_size(text: str, *, source: str = "--size") -> tuple[int, int]:
    """Read `224x128` (width x height, by any of x, X, * and \u00d7) as (width, height)."""
    found = isinstance(text, str) and re.fullmatch(r"\s*(\d+)\s*[xX*\u00d7]\s*(\d+)\s*", text)
    if not found:
        raise ValueError(
            f"size {text!r} in {source}: must look like WIDTHxHEIGHT, for example 224x128"
        )
    return int(found[1]), int(found[2])
