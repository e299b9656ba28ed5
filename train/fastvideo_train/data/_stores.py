"""Shards read back: groups of clips of one size, and which of them a step takes."""

from __future__ import annotations

import bisect
import itertools
import json
import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastvideo import rng, weights
from fastvideo_train.data._manifest import AnyManifest, Manifest, Shape, num_shards


@dataclass(frozen=True)
class Shard:
    """The clips of one file, mapped."""

    latents_NCTHW: Tensor
    captions: list[str]
    ids: list[str]


@dataclass(frozen=True)
class Group:
    """Clips of one size and length; `purpose` names the draw of their order."""

    purpose: str
    num_frames: int
    latent_shape: Shape
    shards: list[Shard]

    def __len__(self) -> int:
        return self._starts[-1]

    def place(self, index: int) -> tuple[Shard, int]:
        """Return the shard of a clip and its row there."""
        shard = bisect.bisect_right(self._starts, index) - 1
        return self.shards[shard], index - self._starts[shard]

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((len(s.ids) for s in self.shards), initial=0))


def open_groups(folder: Path, manifest: AnyManifest) -> list[Group]:
    """Map all shards; raise `ValueError` for one that is missing, or if there is no clip at all."""
    if isinstance(manifest, Manifest):
        names = [shard_name("", i) for i in range(manifest.num_shards)]
        shards = _open(folder, names)
        if any(len(s.ids) != manifest.shard_count(i) for i, s in enumerate(shards)):
            raise _unfinished(folder, names[-1], len(names))
        return [Group("epoch", manifest.num_frames, manifest.latent_shape, shards)]
    groups = []
    for bucket in manifest.buckets:
        count = num_shards(bucket.planned, manifest.shard_size)
        shards = _open(folder, [shard_name(bucket.name, i) for i in range(count)])
        purpose = f"epoch/{bucket.name}"
        groups.append(Group(purpose, bucket.num_frames, bucket.latent_shape, shards))
    filled = [group for group in groups if len(group)]
    if not filled:
        raise ValueError(f"{folder} holds no clip: none of its videos could be encoded")
    return filled


def shard_name(group: str, index: int) -> str:
    """Return the file name of one shard of a group; a world's only group has no name."""
    return f"{group}-{index:05d}.safetensors" if group else f"{index:05d}.safetensors"


def check_whole(folder: Path, manifest: AnyManifest) -> None:
    """Raise `ValueError` for a shard that is missing, without opening one."""
    if isinstance(manifest, Manifest):
        names = [shard_name("", i) for i in range(manifest.num_shards)]
    else:
        counts = {b.name: b.planned for b in manifest.buckets} | {"text": manifest.text.count}
        names = [
            shard_name(name, i)
            for name, count in counts.items()
            for i in range(num_shards(count, manifest.shard_size))
        ]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise _unfinished(folder, absent[0], len(names))


@dataclass(frozen=True)
class Rota:
    """Which group a step's batch comes from, and the how-manyth of that group it is.

    Steps go in rounds in which every group has batches in proportion to its clips, in an order
    drawn from (seed, round).
    """

    counts: tuple[int, ...]
    seed: int
    _round: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Remember the rounds drawn last."""
        object.__setattr__(self, "_round", lru_cache(maxsize=2)(self._drawn))

    def place(self, step: int) -> tuple[int, int]:
        """Return (group, number of the group's batches before this one)."""
        if len(self.counts) == 1:
            return 0, step
        shares = self._shares
        turn, position = divmod(step, sum(shares))
        order, earlier = self._round(turn)
        group = int(order[position])
        return group, turn * shares[group] + int(earlier[position])

    @property
    def _shares(self) -> list[int]:
        common = math.gcd(*self.counts)
        return [count // common for count in self.counts]

    def _drawn(self, turn: int) -> tuple[Any, Any]:
        shares = self._shares
        order = np.repeat(np.arange(len(shares)), shares)
        order = rng.numpy_generator(self.seed, "data/buckets", turn).permutation(order)
        earlier = np.zeros(len(order), np.int64)
        for group, share in enumerate(shares):
            earlier[order == group] = np.arange(share)
        return order, earlier


def _open(folder: Path, names: list[str]) -> list[Shard]:
    shards = []
    for name in names:
        if not (folder / name).is_file():
            raise _unfinished(folder, name, len(names))
        words = weights.read_metadata(folder / name)
        latents = weights.Checkpoint(folder / name).tensor("latents")
        captions, ids = json.loads(words["captions"]), json.loads(words["ids"])
        shards.append(Shard(latents, captions, ids))
    return shards


def _unfinished(folder: Path, name: str, count: int) -> ValueError:
    return ValueError(
        f"latents in {folder} are unfinished: {name} of {count} shards is missing; run the same"
        " encode command again"
    )
