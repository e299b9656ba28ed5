"""The manifest of a folder of latents: what the shards hold and what decided their content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from fastvideo.config import Strict, parse

MANIFEST = "manifest.json"


class Manifest(Strict):
    """What the shards of a folder hold, and all that decides their content."""

    version: Literal[1] = 1
    world: str
    generator_version: int
    seed: int
    split: str
    num_frames: int
    height: int
    width: int
    fps: int
    shard_size: int
    dtype: Literal["float16", "bfloat16", "float32"]
    encoder: str
    raw: Literal[True] = True
    latent_shape: tuple[int, int, int, int]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    count: int

    @property
    def num_shards(self) -> int:
        """Number of shards; the last one may be shorter than the others."""
        return -(-self.count // self.shard_size)

    def shard_count(self, shard: int) -> int:
        """Number of clips in one shard."""
        return min(self.shard_size, self.count - shard * self.shard_size)

    def latent_frames(self, frames: int) -> int:
        """Return the latent frames of the first `frames` frames; `ValueError` names legal ones."""
        stored = self.latent_shape[1]
        stride = max(1, (self.num_frames - 1) // max(1, stored - 1))
        latent, rest = divmod(frames - 1, stride)
        if frames < 1 or rest or latent >= stored:
            low = min(max(0, (frames - 1) // stride), stored - 1) * stride + 1
            near = ", ".join(str(n) for n in (low, low + stride) if n <= self.num_frames)
            rule = f"must be {stride}k+1 and at most {self.num_frames}"
            raise ValueError(f"frames {frames} {rule}; nearest: {near}")
        return latent + 1


def read_manifest(folder: str | Path) -> Manifest:
    """Read a folder's manifest; `ValueError` if there is none or it is wrong."""
    path = Path(folder) / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no latents ({MANIFEST} is missing); fastvideo data encode makes them"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return parse(Manifest, values, source=str(path))
