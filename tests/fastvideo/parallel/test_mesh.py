from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fastvideo.parallel import agree, mesh
from fastvideo.parallel.degrees import ParallelConfig, parse


def places(rank: int, size: int, degrees: ParallelConfig) -> dict[str, tuple[int, list[int]]]:
    meshes = mesh.build(degrees, torch.device("cpu"))
    return {name: (axis.rank, axis.ranks) for name, axis in meshes.axes.items() if axis.size > 1}


def groups(rank: int, size: int, degrees: ParallelConfig) -> tuple[int, bool, bool]:
    axes = mesh.build(degrees, torch.device("cpu")).axes
    made = {id(axis.group) for axis in axes.values() if axis.group is not None}
    same = axes["ulysses"].group is axes["sequence"].group
    return len(made), same, axes["sample"].group is dist.group.WORLD


def sums(rank: int, size: int, degrees: ParallelConfig, name: str) -> int:
    axis = mesh.build(degrees, torch.device("cpu")).axis(name)
    one = torch.tensor(10**rank)
    dist.all_reduce(one, group=axis.group)
    return int(one)


def test_degrees_that_make_another_product_are_refused_with_what_would_fit():
    with pytest.raises(ValueError, match=r"shard 2 x ulysses 2 need 4 processes, not 8; data = 2"):
        ParallelConfig(shard=2, ulysses=2).check(8)
    with pytest.raises(ValueError, match="start a multiple of 3 processes"):
        ParallelConfig(ulysses=3).check(8)
    ParallelConfig(shard=2, ulysses=2, data=2).check(8)


def test_data_fills_what_the_processes_leave():
    assert ParallelConfig(ulysses=2).filled(8) == ParallelConfig(data=4, ulysses=2)
    assert ParallelConfig(ulysses=2).filled(8, "shard") == ParallelConfig(shard=4, ulysses=2)
    with pytest.raises(ValueError, match="need 3 processes, not 8"):
        ParallelConfig(ulysses=3).filled(8)
    with pytest.raises(ValueError, match="need 2 processes, not 8"):
        ParallelConfig(data=2).filled(8)


def test_words_become_degrees_and_an_unknown_axis_is_named():
    assert parse("ulysses=2, guidance=2") == ParallelConfig(ulysses=2, guidance=2)
    assert parse("") == ParallelConfig()
    with pytest.raises(ValueError, match="ulises"):
        parse("ulises=2")
    with pytest.raises(ValueError, match="such as ulysses=2"):
        parse("ulysses")
    with pytest.raises(ValueError, match="guidance"):
        parse("guidance=3")


def test_one_process_is_alone_on_every_axis():
    alone = mesh.alone()
    assert {axis.size for axis in alone.axes.values()} == {1}
    assert alone.axis("sample").ranks == [0]
    assert mesh.build(ParallelConfig(), torch.device("cpu")) == alone


def test_equal_axes_share_one_group(ranks):
    assert ranks(4, groups, ParallelConfig(guidance=2, ulysses=2)) == [(3, True, True)] * 4


def test_the_last_axis_holds_neighbours_and_runs_of_axes_are_flat(ranks):
    first, _, third, _ = ranks(4, places, ParallelConfig(guidance=2, ulysses=2))
    assert first == {
        "guidance": (0, [0, 2]),
        "ulysses": (0, [0, 1]),
        "sequence": (0, [0, 1]),
        "sample": (0, [0, 1, 2, 3]),
        "weights": (0, [0, 1, 2, 3]),
    }
    assert third["guidance"] == (1, [0, 2])
    assert third["sample"] == (2, [0, 1, 2, 3])


def test_a_group_adds_what_its_own_ranks_hold(ranks):
    assert ranks(4, sums, ParallelConfig(data=2, ring=2), "sequence") == [11, 11, 1100, 1100]
    assert ranks(4, sums, ParallelConfig(data=2, ring=2), "batch") == [101, 1010, 101, 1010]


def parted(rank: int, size: int) -> tuple[list[bool], list[bool]]:
    meshes = mesh.build(ParallelConfig(guidance=2), torch.device("cpu"))
    axes = [meshes.axis("guidance"), meshes.axis("sample"), agree.world_group()]
    before = [axis.group is not None for axis in axes]
    dist.destroy_process_group()
    return before, [axis.group is not None for axis in axes]


def test_an_axis_that_is_kept_does_not_keep_its_group(ranks):
    assert ranks(2, parted) == [([True] * 3, [False] * 3)] * 2


def test_one_process_leaves_a_group_that_a_block_made():
    """As DeepSpeed makes one, alone too."""
    with mesh.joined(torch.device("cpu")):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert not dist.is_initialized()


def test_a_group_of_another_size_is_refused(ranks):
    with pytest.raises(AssertionError, match="ring 3 need 3 processes, not 2"):
        ranks(2, places, ParallelConfig(ring=3))
