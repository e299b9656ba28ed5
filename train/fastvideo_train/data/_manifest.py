"""The manifest of a folder of latents: what the shards hold and what decided their content.

Version 1 holds the clips of a world, all of one size; version 2 those of videos, in buckets, and
the states of their captions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from fastvideo.config import Strict, parse
from fastvideo_train.data.buckets import Rules

MANIFEST = "manifest.json"

Shape = tuple[int, int, int, int]


class Stored(Strict):
    """What both kinds say: how latents are stored, and the hash of the weights that made them."""

    shard_size: int
    dtype: Literal["float16", "bfloat16", "float32"]
    encoder: str
    raw: Literal[True] = True
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]


class Manifest(Stored):
    """What the shards of a world's clips hold, and all that decides their content."""

    version: Literal[1] = 1
    world: str
    generator_version: int
    seed: int
    split: str
    num_frames: int
    height: int
    width: int
    fps: int
    latent_shape: Shape
    count: int

    @property
    def num_shards(self) -> int:
        """Number of shards; the last one may be shorter than the others."""
        return num_shards(self.count, self.shard_size)

    def shard_count(self, shard: int) -> int:
        """Number of clips in one shard."""
        return min(self.shard_size, self.count - shard * self.shard_size)


class BucketManifest(Strict):
    """One size and length of videos; `planned` counts those that were to be encoded."""

    name: str = Field(pattern=r"^\d+x\d+x\d+$")  # a part of file names
    num_frames: int
    latent_shape: Shape
    planned: int


class TextManifest(Strict):
    """The states of distinct prompts; encoder, tokenizer and the prompts themselves as hashes."""

    encoder: str
    tokenizer: str
    prompts: str
    max_tokens: int
    count: int


class VideoManifest(Stored):
    """What the shards of a folder of videos hold, and all that decides their content.

    `clips` is the hash of `clips.jsonl`, which lists every video with its own hash and caption.
    """

    version: Literal[2] = 2
    clips: str
    rules: Rules
    batch: int
    compute: str
    buckets: tuple[BucketManifest, ...]
    text: TextManifest


AnyManifest = Manifest | VideoManifest


def num_shards(count: int, shard_size: int) -> int:
    """Number of shards that so many clips take."""
    return -(-count // shard_size)


def latent_frames(frames: int, num_frames: int, stored: int) -> int:
    """Return the latent frames of the first `frames` of `num_frames` frames.

    `stored` is how many latent frames those are; `ValueError` names the legal lengths.
    """
    stride = max(1, (num_frames - 1) // max(1, stored - 1))
    latent, rest = divmod(frames - 1, stride)
    if frames < 1 or rest or latent >= stored:
        low = min(max(0, (frames - 1) // stride), stored - 1) * stride + 1
        near = ", ".join(str(n) for n in (low, low + stride) if n <= num_frames)
        rule = f"must be {stride}k+1 and at most {num_frames}"
        raise ValueError(f"frames {frames} {rule}; nearest: {near}")
    return latent + 1


def read_manifest(folder: str | Path) -> AnyManifest:
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
    kind: type[AnyManifest] = Manifest
    if isinstance(values, dict) and values.get("version") == 2:
        kind = VideoManifest
    return parse(kind, values, source=str(path))


def differences(have: Strict, want: Strict, *, but: tuple[str, ...] = ()) -> list[str]:
    """List what another manifest says instead: `key ours, not theirs`."""
    old, new = have.model_dump(), want.model_dump()
    return [
        f"{key} {old.get(key)!r}, not {value!r}"
        for key, value in new.items()
        if key not in but and old.get(key) != value
    ]
