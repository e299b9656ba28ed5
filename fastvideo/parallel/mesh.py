"""Degrees become named meshes: who works with whom, as values that are passed, never globals.

with joined(device) as own:
    meshes = build(ParallelConfig(ulysses=2, guidance=2), own)
    axis = meshes.axis("ulysses")        # size, this process's place, its group
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastvideo import env
from fastvideo.parallel.axis import Axis
from fastvideo.parallel.degrees import AXES, RUNS, ParallelConfig

_Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Meshes:
    """Every axis of the degrees, and every run of axes that something is spread over."""

    degrees: ParallelConfig
    axes: Mapping[str, Axis]
    device: torch.device
    rank: int = 0

    def axis(self, name: str) -> Axis:
        """Return an axis (`AXES`) or a run of neighbouring ones (`RUNS`)."""
        return self.axes[name]

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @cached_property
    def replicas_by_weights(self) -> DeviceMesh:
        """Mesh of the axes "data" (equal weights) and "weights" (parts of them), for FSDP2."""
        sizes = (self.degrees.data, self.degrees.of("weights"))
        return init_device_mesh(self.device.type, sizes, mesh_dim_names=("data", "weights"))


def alone(device: torch.device | str = "cpu") -> Meshes:
    """Return the meshes of one process."""
    names = (*AXES, *RUNS)
    return Meshes(ParallelConfig(), {name: Axis(name) for name in names}, torch.device(device))


def build(degrees: ParallelConfig, device: torch.device) -> Meshes:
    """Make the meshes of a process group that exists; all its processes call this together.

    Raises `ValueError` if the group has another size than the degrees' product.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    degrees.check(world_size)
    if world_size == 1 and not dist.is_initialized():
        return alone(device)
    made: dict[_Groups, Any] = {(tuple(range(world_size)),): dist.group.WORLD}
    axes = {}
    for name in (*AXES, *RUNS):
        axes[name] = Axis(name)
        groups = _groups(degrees, name)
        if degrees.of(name) > 1:
            if groups not in made:  # equal axes share a group, and so its communicator
                made[groups] = _own_group(groups)
            group = made[groups]
            ref = weakref.ref(group)
            axes[name] = Axis(name, degrees.of(name), dist.get_rank(group), ref)
    return Meshes(degrees, axes, device, dist.get_rank())


@contextmanager
def joined(device: torch.device, *, timeout_s: float = 1800.0) -> Iterator[torch.device]:
    """Join the processes that torchrun, accelerate, deepspeed or SLURM's `srun torchrun` started.

    For the time of a block; yields this process's own device: "cuda" becomes that of its local
    rank, and talks by NCCL, others by gloo. Alone, or where somebody joined already, nothing is
    joined. Raises `ValueError` if there are more processes than devices.

    Whatever holds a group, such as a network of FSDP2, must be gone by the end of the block. Only
    the last reference ends gloo's threads, and a thread that lets go of a tensor while the
    interpreter ends aborts the process (SIGABRT).
    """
    import_module("torch.distributed.nn.functional")  # its defaults keep a group that is there
    if dist.is_initialized():
        yield device
        return
    own = device
    if env.world_size() > 1:
        own = _join(_own(device), timeout=timedelta(seconds=timeout_s))
    try:
        yield own
    finally:
        gc.collect()  # networks hold groups in cycles
        if dist.is_initialized():
            dist.destroy_process_group()


def join(device: torch.device, *, rank: int, size: int, file: str) -> torch.device:
    """Join `size` processes that meet at a new file, for as long as this process lives.

    No launcher started them; each has a device of its own.
    """
    return _join(device, init_method=f"file://{file}", rank=rank, world_size=size)


def _join(device: torch.device, **how: Any) -> torch.device:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **how)
    return device


def _own(device: torch.device) -> torch.device:
    if device != torch.device("cuda"):  # no CUDA, or a number was given
        return device
    local, count = env.local_rank(), torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"this machine has {count} CUDA devices, too few for local rank {local}; start as many"
            " processes as it has devices"
        )
    return torch.device("cuda", local)


def _own_group(groups: _Groups) -> Any:
    """Make all groups, as every process has to, and return the one that this process is in."""
    made = {ranks: dist.new_group(list(ranks)) for ranks in groups}
    return next(group for ranks, group in made.items() if dist.get_rank() in ranks)


def _groups(degrees: ParallelConfig, name: str) -> _Groups:
    """Return the ranks that an axis or a run of neighbouring ones puts together, all its groups."""
    run = RUNS.get(name, (name,))
    first, last = AXES.index(run[0]), AXES.index(run[-1])
    after = math.prod(map(degrees.of, AXES[last + 1 :]))
    before = math.prod(map(degrees.of, AXES[:first]))
    size = degrees.of(name)
    return tuple(
        tuple((i * size + j) * after + k for j in range(size))
        for i in range(before)
        for k in range(after)
    )
