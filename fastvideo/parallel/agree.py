"""What processes tell each other in words: what the first one says, and who failed first."""

from __future__ import annotations

import weakref
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from fastvideo.parallel.axis import Axis

T = TypeVar("T")
_FAILED = "fastvideo/failed"


def world_group() -> Axis:
    """Return all processes that have joined, as one axis."""
    return Axis("world", dist.get_world_size(), dist.get_rank(), weakref.ref(dist.group.WORLD))


def broadcast_object(value: T, axis: Axis, device: torch.device) -> T:
    """Return the value that the axis' first process has; it is pickled, its tensors on the CPU."""
    if axis.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=axis.ranks[0], group=axis.group, device=device)
    return box[0]


def is_first_to_fail() -> bool:
    """Claim to be the first of all processes that failed; True for one of them.

    That one tells its error before it leaves the others, whose own errors only follow from it.
    """
    try:
        return _get_default_store().add(_FAILED, 1) == 1
    except RuntimeError:  # the process that held the store is gone: better told twice than never
        return True
