"""The order of attention backends: the first line that holds, of a backend that can serve, wins.

A line is a backend, when it stands there, and the measurement behind its place. Times without a
machine were taken on two cores of Zen 4 in bfloat16 (`inference/bench/attention.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastvideo import cpu
from fastvideo.attention.layout import Layout
from fastvideo.attention.pattern import Dense

_AMX_TRAINS_FASTER_BELOW = 1000  # keys
_MASKED_FASTER_UP_TO = 512  # tokens in uneven tiles


@dataclass(frozen=True)
class Need:
    """What is asked of a backend. `layout` None means unordered keys, as in cross-attention."""

    layout: Layout | None
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool
    num_keys: int | None = None
    head_dim: int = 128

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        return self.layout is None or self.layout.pattern == Dense()


@dataclass(frozen=True)
class Place:
    """A backend's place in the order, when it holds, and why."""

    backend: str
    holds: Callable[[Need], bool]
    why: str


def place(backend: str, need: Need) -> int:
    """Return the index of a backend's first line that holds; behind all lines if none does."""
    lines = (i for i, line in enumerate(ORDER) if line.backend == backend and line.holds(need))
    return next(lines, len(ORDER))


def _always(need: Need) -> bool:
    return True


def _sees_all(need: Need) -> bool:
    return need.layout is not None and need.layout.sees_all


def _on_gpu(need: Need) -> bool:
    return need.device.type == "cuda"


def _few_keys_on_cpu(need: Need) -> bool:
    is_half = need.dtype in (torch.bfloat16, torch.float16)
    if need.device.type != "cpu" or need.num_keys is None or not is_half:
        return False
    return not cpu.has_amx() or (need.needs_grad and need.num_keys < _AMX_TRAINS_FASTER_BELOW)


def _small_and_uneven_on_cpu(need: Need) -> bool:
    if need.layout is None or need.layout.tiles is None or need.num_keys is None:
        return False
    is_small = need.num_keys <= _MASKED_FASTER_UP_TO
    return need.device.type == "cpu" and is_small and not need.layout.tiles.is_uniform


ORDER = (
    Place("masked", _sees_all, "nothing is left out: dense attention by the fastest dense backend"),
    Place("triton", _on_gpu, "fused sparse kernels; not yet timed on a GPU"),
    Place(
        "bmm", _few_keys_on_cpu, "half of SDPA's time at 1,344 tokens; with AMX in training only"
    ),
    Place("flash", _always, "whoever installed it wants it"),
    Place("sdpa", _always, "the standard of dense attention"),
    Place("masked", _small_and_uneven_on_cpu, "0.5 to 1.4 of gather's time at 320 to 450 tokens"),
    Place("gather", _always, "3.9 times as fast as SDPA at 8,192 tokens and sparsity 0.8"),
    Place("bmm", _always, "float32 and many keys: SDPA is as fast or faster"),
    Place("flex", _always, "3.5 times as slow as gather on a CPU, and compiles for 9 s"),
    Place("masked", _always, "multiplies what is not seen too"),
    Place("reference", _always, "to be read and compared with"),
    Place("triton", _always, "interpreted, for tests"),
)
