"""Shards written so that a kill costs one batch at most: parts first, then a shard of them.

Every file appears whole or not at all, and a shard has the same bytes whenever its parts came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo import weights
from fastvideo_train.data._manifest import num_shards
from fastvideo_train.data._stores import shard_name

Words = Mapping[str, list[Any]]


@dataclass(frozen=True)
class Part:
    """Items `start` to `stop` of a group, written at once."""

    group: str
    shard: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Return the part's file name."""
        return f"{self.group}-{self.shard:05d}-{self.start:07d}.safetensors"


class Parts:
    """The parts and shards of one group of `count` items in a folder."""

    def __init__(self, folder: Path, group: str, *, count: int, shard: int, batch: int) -> None:
        self.folder, self.group = folder, group
        self.shards = [
            [
                Part(group, i, start, min(start + batch, (i + 1) * shard, count))
                for start in range(i * shard, min((i + 1) * shard, count), batch)
            ]
            for i in range(num_shards(count, shard))
        ]

    def missing(self) -> list[Part]:
        """Return the parts that are neither there nor in a shard."""
        return [
            part
            for shard in self.shards
            if not self._shard(shard).is_file()
            for part in shard
            if not self._path(part).is_file()
        ]

    def write(self, part: Part, tensors: Mapping[str, Tensor], words: Words) -> None:
        """Write a part; with the last one of its shard, the shard."""
        texts = {key: json.dumps(value, ensure_ascii=False) for key, value in words.items()}
        weights.save(self._path(part), tensors, texts)
        if part == self.shards[part.shard][-1]:
            self.settle()

    def settle(self) -> None:
        """Write the shards whose parts are all there, and remove parts that are in a shard."""
        for shard in self.shards:
            if not self._shard(shard).is_file():
                if not all(self._path(part).is_file() for part in shard):
                    continue
                self._join(shard)
            for part in shard:
                self._path(part).unlink(missing_ok=True)

    def _join(self, shard: list[Part]) -> None:
        files = [weights.Checkpoint(self._path(part)) for part in shard]
        tensors = {name: torch.cat([f.tensor(name) for f in files]) for name in files[0]}
        texts = [weights.read_metadata(self._path(part)) for part in shard]
        words = {
            key: json.dumps(
                [item for text in texts for item in json.loads(text[key])], ensure_ascii=False
            )
            for key in texts[0]
            if key != "format"
        }
        weights.save(self._shard(shard), tensors, words)

    def _shard(self, shard: list[Part]) -> Path:
        return self.folder / shard_name(self.group, shard[0].shard)

    def _path(self, part: Part) -> Path:
        return self.folder / "parts" / part.file
