"""A small classifier of clips: what is in them, and features to compare them by.

    net = Classifier(Config.parse(values))
    judged = net(pixels_BCTHW)         # features (B, F), logits per attribute, a sketch
    net.labels(judged)                 # [{"shape": "star", ...}, ...]

Frames pass a residual 2-D stack one by one; convolutions over time then see motion, and only at the
end is time averaged away. Besides naming attributes, the features must redraw a tiny sketch of the
clip: labels alone would make all clips of one prompt equal, and diversity unmeasurable. All
normalisation is by clip, so that a clip's features do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvideo.models import config_fields

VERSION = 1  # raise it when the same weights give other features
SKETCH = (4, 8, 8)  # frames, rows and columns of the sketch


@dataclass(frozen=True)
class ClipsConfig:
    """Dims, and the legal values of each attribute.

    A clip is looked at as `frames` evenly spaced frames of `side` x `side` pixels, whatever its own
    size; `side` is a multiple of 32.
    """

    attributes: Mapping[str, tuple[str, ...]]
    frames: int = 16
    side: int = 64
    width: int = 16
    features: int = 32

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Read a config strictly; `ValueError` for unknown keys and illegal dims."""
        if not values.get("attributes"):
            raise ValueError("attributes must give the legal values of at least one attribute")
        attributes = {name: tuple(found) for name, found in values["attributes"].items()}
        made: Self = config_fields.read(cls, {**values, "attributes": attributes})
        if made.side < 32 or made.side % 32:
            raise ValueError(f"side {made.side} must be a multiple of 32")
        if made.width < 8 or made.width % 8:
            raise ValueError(f"width {made.width} must be a multiple of 8")
        if min(made.frames, made.features) < 1:
            raise ValueError("frames and features must be at least 1")
        return made


@dataclass(frozen=True)
class Judged:
    """Features (B, F), logits (B, values) of each attribute, and a sketch (B, 3, *SKETCH)."""

    features_BF: Tensor
    logits: Mapping[str, Tensor]
    sketch_BCTHW: Tensor


class ClipClassifier(nn.Module):
    """See the module; about 0.4 M parameters at the default dims."""

    def __init__(self, config: ClipsConfig) -> None:
        super().__init__()
        self.config = config
        c = config.width
        self.stem = nn.Conv2d(3, c, 5, stride=2, padding=2)
        self.blocks = nn.Sequential(_Block(c, 2 * c), _Block(2 * c, 4 * c), _Block(4 * c, 4 * c, 1))
        self.flatten = nn.Conv2d(4 * c, 6 * c, config.side // 16)  # keeps where things are
        self.time = nn.Sequential(_Time(6 * c), _Time(6 * c), _Time(6 * c))
        self.feature = nn.Linear(6 * c, config.features)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.features, len(v)) for name, v in config.attributes.items()}
        )
        self.sketch = nn.Linear(config.features, 3 * SKETCH[0] * SKETCH[1] * SKETCH[2])

    def forward(self, pixels_BCTHW: Tensor) -> Judged:
        """Judge clips of any size and length, pixels in [-1, 1] or bytes."""
        x = self.resample(pixels_BCTHW).to(self.stem.weight.dtype)  # B 3 T S S
        frames = x.transpose(1, 2).flatten(0, 1)  # BT 3 S S
        h = self.blocks(self.stem(frames))  # BT 4c S/8 S/8
        h = self.flatten(F.avg_pool2d(F.silu(h), 2)).flatten(1)  # BT 6c
        h_BCT = h.reshape(len(x), self.config.frames, -1).transpose(1, 2)  # B 6c T
        h = F.silu(self.time(h_BCT)).mean(2)  # B 6c
        features = self.feature(h)  # B F
        return Judged(
            features,
            {name: head(features) for name, head in self.heads.items()},
            self.sketch(features).reshape(-1, 3, *SKETCH),
        )

    def resample(self, pixels_BCTHW: Tensor) -> Tensor:
        """Return evenly spaced frames of the network's size, (B, 3, frames, side, side).

        Area averages: a clip looks the same at any resolution. A short clip repeats frames. Bytes
        become float32 in [-1, 1].
        """
        count, side = self.config.frames, self.config.side
        last = pixels_BCTHW.shape[2] - 1
        at = torch.linspace(0, last, count, dtype=torch.float64).round().long()
        chosen = pixels_BCTHW[:, :, at.to(pixels_BCTHW.device)]
        if chosen.dtype == torch.uint8:
            chosen = chosen.float() / 127.5 - 1
        flat = chosen.transpose(1, 2).flatten(0, 1)
        small = F.interpolate(flat, size=(side, side), mode="area")
        return small.reshape(-1, count, 3, side, side).transpose(1, 2)

    def target(self, pixels_BCTHW: Tensor) -> Tensor:
        """Return the sketch that the features of a clip should redraw, (B, 3, *SKETCH)."""
        return F.adaptive_avg_pool3d(self.resample(pixels_BCTHW), SKETCH)

    def labels(self, judged: Judged) -> list[dict[str, str]]:
        """Return the likeliest value of each attribute, clip by clip."""
        best = {name: logits.argmax(1).tolist() for name, logits in judged.logits.items()}
        values = self.config.attributes
        return [
            {name: values[name][row[i]] for name, row in best.items()}
            for i in range(len(judged.features_BF))
        ]

    def targets(self, truths: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """Return the index of each true value, (B,) per attribute; `ValueError` if unknown."""
        found: dict[str, Tensor] = {}
        for name, legal in self.config.attributes.items():
            for truth in truths:
                if truth.get(name) not in legal:
                    known = ", ".join(legal)
                    raise ValueError(f"{name} {truth.get(name)!r} is unknown (known: {known})")
            found[name] = torch.tensor([legal.index(truth[name]) for truth in truths])
        return found


class _Block(nn.Module):
    """Two 3x3 convolutions and a short cut; halves the side unless `stride` is 1."""

    def __init__(self, inner: int, outer: int, stride: int = 2) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(inner // 8, inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1)
        self.norm2 = nn.GroupNorm(outer // 8, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.short = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, inner, H, W) -> (N, outer, H / stride, W / stride)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        pooled = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        out: Tensor = self.short(pooled) + h
        return out


class _Time(nn.Module):
    """A residual convolution over time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.conv = nn.Conv1d(channels, channels, 5, padding=2)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        out: Tensor = x_BCT + self.conv(F.silu(self.norm(x_BCT)))
        return out


Config = ClipsConfig
Classifier = ClipClassifier
