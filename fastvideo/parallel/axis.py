"""Who shares an axis of a mesh with whom: all that what runs along it has to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """The processes that this one shares an axis with; alone (size 1) it needs no group."""

    name: str
    size: int = 1
    rank: int = 0
    group: Any = None

    @property
    def ranks(self) -> list[int]:
        """Global ranks along the axis, in order."""
        return [0] if self.group is None else dist.get_process_group_ranks(self.group)
