"""Every random draw is a function of (seed, purpose, step, rank), so that it can be made again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, purpose: str, step: int = 0, rank: int = 0) -> int:
    """Derive a 63-bit seed from its arguments; the same on every machine and Python version."""
    key = f"{seed}/{purpose}/{step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, purpose: str, step: int = 0, rank: int = 0) -> np.random.Generator:
    """Return a NumPy generator for one purpose at one step."""
    import numpy as np

    return np.random.default_rng(derive(seed, purpose, step, rank))


def torch_generator(seed: int, purpose: str, step: int = 0, rank: int = 0) -> torch.Generator:
    """Return a CPU generator for one purpose at one step."""
    import torch

    return torch.Generator("cpu").manual_seed(derive(seed, purpose, step, rank))


def noise(
    shape: tuple[int, ...], *, seed: int, purpose: str, step: int = 0, rank: int = 0
) -> torch.Tensor:
    """Draw float32 standard normal noise on the CPU, so that every device starts alike."""
    import torch

    return torch.randn(shape, generator=torch_generator(seed, purpose, step, rank))


def clip_seeds(seed: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Give each of `count` clips its seed: seed + b for clip b, or its own of a sequence."""
    if isinstance(seed, int):
        return tuple(range(seed, seed + count))
    if len(seed) != count:
        raise ValueError(f"{len(seed)} seeds for {count} clips; give one for each, or one number")
    return tuple(seed)


def clip_noise(
    shape: tuple[int, ...], *, seeds: Sequence[int], purpose: str, step: int = 0
) -> torch.Tensor:
    """Draw noise (len(seeds), *shape); a clip's noise depends on its own seed alone."""
    import torch

    return torch.stack([noise(shape, seed=s, purpose=purpose, step=step) for s in seeds])
