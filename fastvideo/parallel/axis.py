"""Who shares an axis of a mesh with whom: all that what runs along it has to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """The processes that this one shares an axis with; alone (size 1) it needs no group.

    ref: a weak reference to the group: a script may keep an axis, in its model, until it ends, and
    a group must not last that long (`mesh.joined`).
    """

    name: str
    size: int = 1
    rank: int = 0
    ref: Callable[[], Any] | None = None

    @property
    def group(self) -> Any:
        """The process group, while its processes are joined."""
        return None if self.ref is None else self.ref()

    @property
    def ranks(self) -> list[int]:
        """Global ranks along the axis, in order."""
        return [0] if self.group is None else dist.get_process_group_ranks(self.group)
