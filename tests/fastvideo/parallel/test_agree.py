from __future__ import annotations

import torch
import torch.distributed as dist

from fastvideo.parallel import agree, mesh
from fastvideo.parallel.degrees import ParallelConfig


def asked(rank: int, size: int) -> tuple[object, object, bool]:
    device = torch.device("cpu")
    meshes = mesh.build(ParallelConfig(data=2, guidance=2), device)
    own = {"seed": rank, "noise": torch.full((2,), float(rank))}
    of_clip = agree.broadcast_object(own, meshes.axis("sample"), device)
    of_all = agree.broadcast_object(own, agree.world_group(), device)
    is_first = agree.is_first_to_fail()
    dist.barrier()  # the store lives with the first process
    return (of_clip["seed"], of_clip["noise"].tolist()), of_all["seed"], is_first


def test_the_first_of_an_axis_decides_and_one_process_tells_why_all_failed(ranks):
    of_clips, of_all, firsts = zip(*ranks(4, asked), strict=True)
    assert of_clips == ((0, [0.0, 0.0]),) * 2 + ((2, [2.0, 2.0]),) * 2
    assert of_all == (0,) * 4
    assert sorted(firsts) == [False, False, False, True]


def test_one_process_keeps_its_own_value():
    value = object()
    assert agree.broadcast_object(value, mesh.alone().axis("sample"), torch.device("cpu")) is value
