"""A network spread over processes is the network: output and gradients of one process, exactly.

Every check runs the network whole as well, on one process or on each, and returns the largest
difference of any tensor, relative to that tensor's largest magnitude.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from fastvideo import registry
from fastvideo.attention import Dense, Pattern, Sta, Vsa, plan, select
from fastvideo.models.dit.wan import Conditioning, Config, DiT
from fastvideo.parallel import mesh, rules
from fastvideo.parallel.collectives import sum_gradients
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.parallel.sequence import spread
from fastvideo.shapes import LatentShape
from tests.drawn import drawn

BOUND = 1e-5
LATENTS = (5, 10, 14)  # 175 tokens: no multiple of 2, 3 or 4
THIN = (7, 2, 22)  # 77, in grids of one row
DENSE, VSA = Dense(), Vsa(sparsity=0.5, tile=(2, 2, 3))
SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 6,
    "num_layers": 2,
    "ffn_dim": 40,
    "text_dim": 12,
    "freq_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
}


def sta(heads: int) -> Sta:
    """Make windows of which no two neighbours are alike."""
    sizes = [(1, 3, 3), (3, 1, 2), (2, 3, 1), (3, 3, 3)]
    return Sta(tuple(sizes[i % 4] for i in range(heads)), tile=(2, 2, 3))


@dataclass(frozen=True)
class Case:
    """One call of a network: what it is given, and how it attends."""

    net: Any
    x: Tensor
    t: Tensor
    cond: Any
    told: dict[str, Any]
    direction: Tensor


def case(
    heads: int,
    pattern: Pattern,
    batch: int,
    *,
    is_prepared: bool = False,
    per_frame: bool = False,
    dtype: torch.dtype = torch.float32,
    latents: tuple[int, int, int] = LATENTS,
) -> Case:
    config = Config(**{**SMALL, "num_attention_heads": heads})
    net = drawn(DiT(dataclasses.replace(config, gate_compress=isinstance(pattern, Vsa))))
    net = net.to(dtype)
    g = torch.Generator().manual_seed(1)
    x, direction = (torch.randn(batch, 4, *latents, generator=g) for _ in range(2))
    t = 1000 * torch.rand(batch, latents[0] if per_frame else 1, generator=g)
    # Words of unlike lengths: of like ones, a bias of all keys would make almost no difference.
    text = torch.randn(batch, 7, 12, generator=g) * torch.linspace(0.1, 3, 7)[:, None]
    cond = Conditioning(text.to(dtype))
    grid = LatentShape(*latents).tokens(net.config.patch_size)
    layout = plan(pattern, grid)
    attend = select(
        layout=layout,
        num_text_tokens=7,
        dtype=dtype,
        device="cpu",
        needs_grad=True,
        head_dim=6,
    )
    told = {"attend": attend, "layout": layout}
    cond = net.prepare(cond) if is_prepared else cond
    return Case(net, x.to(dtype).requires_grad_(), t, cond, told, direction)


def found(case: Case, call: Callable[..., Tensor], meshes: mesh.Meshes) -> dict[str, Tensor]:
    """Return the output and all gradients of one call and its backward pass."""
    v = call(case.x, case.t, case.cond, **case.told)
    v.backward(case.direction.to(v.dtype), retain_graph=True)  # prepared text is used twice
    sum_gradients(case.net.parameters(), meshes.axis("sequence"))
    return {"output": v.detach(), **gradients(case)}


def gradients(case: Case) -> dict[str, Tensor]:
    """Take all gradients away."""
    named = {**dict(case.net.named_parameters()), "latents": case.x}
    grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    for p in named.values():
        p.grad = None
    return grads


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    assert actual.keys() == expected.keys()
    return max(
        (((actual[name] - x).abs().max() / x.abs().max()).item(), name)
        for name, x in expected.items()
    )


def built(degrees: ParallelConfig) -> mesh.Meshes:
    return mesh.build(degrees, torch.device("cpu"))


Key = tuple[int, Pattern, int, tuple[int, int, int]]


def of_key(key: Key) -> Case:
    """Make a call; one of a batch of 2 has its text prepared, and times for each frame."""
    heads, pattern, batch, latents = key
    return case(
        heads, pattern, batch, is_prepared=batch == 2, per_frame=batch == 2, latents=latents
    )


@functools.cache
def alone(key: Key) -> dict[str, np.ndarray]:
    """Find what one process does, once for every number of processes."""
    one = of_key(key)
    results = found(one, one.net, mesh.alone())
    assert results["output"].shape == one.x.shape
    assert {"blocks.0.to_gate_compress.weight"} <= results.keys() or key[1] != VSA
    return {name: x.numpy() for name, x in results.items()}


def of_one_process(
    heads: tuple[int, ...],
    batches: tuple[int, ...],
    sizes: tuple[tuple[int, int, int], ...],
    is_dense: bool,
) -> dict[Key, dict[str, np.ndarray]]:
    """Return what one process finds for each with each."""
    results = {}
    for num_heads, batch, latents in itertools.product(heads, batches, sizes):
        sparse = [VSA] if latents == THIN else [VSA, sta(num_heads)]  # which needs longer sides
        for pattern in [DENSE] if is_dense else [DENSE, *sparse]:
            key = (num_heads, pattern, batch, latents)
            results[key] = alone(key)
    return results


def compared(
    rank: int, size: int, degrees: ParallelConfig, wanted: dict[Key, dict[str, np.ndarray]]
) -> list[tuple[float, str]]:
    meshes, errors = built(degrees), []
    for key, arrays in wanted.items():
        one = of_key(key)
        expected = {name: torch.from_numpy(x) for name, x in arrays.items()}
        error, name = worst(found(one, spread(one.net, meshes), meshes), expected)
        errors.append((error, f"{name} of {key}"))
    return errors


def in_bfloat16(
    rank: int, size: int, degrees: ParallelConfig, pattern: Pattern
) -> tuple[float, str]:
    """Return how many times as far from float32 a tensor is as on one process, at most."""
    one, exact = (case(3, pattern, 1, dtype=t) for t in (torch.bfloat16, torch.float32))
    meshes = built(degrees)
    ours = found(one, spread(one.net, meshes), meshes)
    assert all(x.dtype == torch.bfloat16 for x in ours.values())
    rough, right = (found(x, x.net, mesh.alone()) for x in (one, exact))
    assert ours.keys() == rough.keys() == right.keys()
    apart = {n: [(x[n] - right[n]).norm().item() for x in (ours, rough)] for n in right}
    return max((a / b, name) for name, (a, b) in apart.items())


def in_a_row(rank: int, size: int, degrees: ParallelConfig) -> tuple[float, str]:
    """Give a call's result to a second call, so that gradients pass through latents."""
    one, meshes = case(3, VSA, 1), built(degrees)

    def twice(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: Any, **told: Any) -> Tensor:
            middle = x - 0.3 * call(x, *args, **told)
            return middle - 0.5 * call(middle, *args, **told)

        return run

    expected = found(one, twice(one.net), mesh.alone())
    return worst(found(one, twice(spread(one.net, meshes)), meshes), expected)


def checkpointed(
    rank: int, size: int, degrees: ParallelConfig, pattern: Pattern
) -> tuple[float, str]:
    one, meshes = case(3, pattern, 1), built(degrees)
    expected = found(one, one.net, mesh.alone())
    for block in one.net.blocks:
        block.forward = again(block.forward)
    return worst(found(one, spread(one.net, meshes), meshes), expected)


def again(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def sharded(rank: int, size: int, degrees: ParallelConfig) -> tuple[float, str]:
    """Shard the weights of a spread network (FSDP2), which averages gradients over processes."""
    one, meshes = case(3, VSA, 1), built(degrees)
    expected = found(one, one.net, mesh.alone())
    weights = meshes.replicas_by_weights["weights"]
    for part in (*one.net.blocks, one.net):
        fully_shard(part, mesh=weights)
    for name in ("embed", "head", "prepare"):
        register_fsdp_forward_method(one.net, name)
    v = spread(one.net, meshes)(one.x, one.t, one.cond, **one.told)
    v.backward(one.direction)
    grads = gradients(one)
    latents = grads.pop("latents")
    sums = {name: size * grad.full_tensor() for name, grad in grads.items()}
    return worst({"output": v.detach(), "latents": latents, **sums}, expected)


def families(rank: int, size: int) -> dict[str, tuple[float, str]]:
    """Compare every family of the library at a small size."""
    meshes, errors = built(ParallelConfig(ulysses=size)), {}
    for name in registry.names("fastvideo.models.dit"):
        family = registry.module("fastvideo.models.dit", name)
        fields = {field.name for field in dataclasses.fields(family.Config)}
        config = family.Config(**{k: v for k, v in SMALL.items() if k in fields})
        net = drawn(family.DiT(config))
        assert sum(p.numel() for p in net.parameters()) < 100_000, f"{name} is not small"
        g = torch.Generator().manual_seed(1)
        x, direction = (torch.randn(1, 4, *LATENTS, generator=g) for _ in range(2))
        cond = family.Conditioning(torch.randn(1, 7, 12, generator=g))
        one = Case(net, x.requires_grad_(), torch.full((1, 1), 500.0), cond, {}, direction)
        expected = found(one, net, mesh.alone())
        errors[name] = worst(found(one, spread(net, meshes), meshes), expected)
    return errors


def refused(rank: int, size: int) -> list[str]:
    one = case(3, VSA, 1)
    few = {"x_BCTHW": one.x[:, :, :1, :2, :2], "attend": one.told["attend"]}
    wrong: list[tuple[ParallelConfig, dict[str, Any]]] = [
        (ParallelConfig(ring=size), {"x_BCTHW": one.x, **one.told}),
        (
            ParallelConfig(ulysses=size),
            {**few, "layout": plan(VSA, LatentShape(1, 2, 2).tokens((1, 2, 2)))},
        ),
    ]
    texts = []
    for degrees, told in wrong:
        with pytest.raises(ValueError) as error:
            spread(one.net, built(degrees))(t_BT=one.t, cond=one.cond, **told)
        texts.append(str(error.value))
    return texts


def worst_of(results: list[Any]) -> tuple[float, str]:
    return max(itertools.chain.from_iterable(results))


@pytest.mark.parametrize("latents", [LATENTS, THIN])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ulysses_equals_one_process_under_every_pattern(ranks, size, latents):
    every = ((12, 10, 3), (1, 2) if latents == LATENTS else (1,), (latents,))
    wanted = of_one_process(*every, False)
    error, name = worst_of(ranks(size, compared, ParallelConfig(ulysses=size), wanted))
    assert error <= BOUND, name


@pytest.mark.parametrize(
    "degrees",
    [
        ParallelConfig(ring=2),
        ParallelConfig(ring=3),
        ParallelConfig(ring=4),
        ParallelConfig(ring=2, ulysses=2),
        ParallelConfig(ring=3, ulysses=2),
    ],
)
def test_a_ring_and_its_product_with_ulysses_equal_one_process(ranks, degrees):
    is_small = degrees.world_size <= 4
    every = ((12, 10, 3), (1, 2), (LATENTS, THIN)) if is_small else ((10, 3), (1, 2), (THIN,))
    wanted = of_one_process(*every, True)
    error, name = worst_of(ranks(degrees.world_size, compared, degrees, wanted))
    assert error <= BOUND, name


def test_a_process_without_heads_takes_part_in_a_ring_of_others(ranks):
    every = ((1,), (2,), (LATENTS,))
    wanted = of_one_process(*every, True)
    error, name = worst_of(ranks(4, compared, ParallelConfig(ring=2, ulysses=2), wanted))
    assert error <= BOUND, name


@pytest.mark.parametrize("degrees", [ParallelConfig(ulysses=4), ParallelConfig(ulysses=3)])
def test_gradients_through_latents_equal_one_process(ranks, degrees):
    error, name = max(ranks(degrees.world_size, in_a_row, degrees))
    assert error <= BOUND, name


@pytest.mark.parametrize(
    "degrees, pattern",
    [
        (ParallelConfig(ulysses=2), VSA),
        (ParallelConfig(ulysses=4), VSA),
        (ParallelConfig(ring=2, ulysses=2), DENSE),
    ],
)
def test_checkpointed_blocks_equal_one_process(ranks, degrees, pattern):
    error, name = max(ranks(degrees.world_size, checkpointed, degrees, pattern))
    assert error <= BOUND, name


@pytest.mark.parametrize(
    "degrees, pattern",
    [
        (ParallelConfig(ulysses=2), VSA),
        (ParallelConfig(ulysses=2), DENSE),
        (ParallelConfig(ring=2), DENSE),
    ],
)
def test_bfloat16_is_as_exact_as_on_one_process(ranks, degrees, pattern):
    times, name = max(ranks(2, in_bfloat16, degrees, pattern))
    assert times <= 3, name


def test_sharded_weights_gather_for_a_spread_network_and_average_its_gradients(ranks):
    error, name = max(ranks(2, sharded, ParallelConfig(ulysses=2)))
    assert error <= BOUND, name


def test_every_family_of_networks_can_be_spread(ranks):
    for errors in ranks(2, families):
        assert errors and all(error <= BOUND for error, _ in errors.values()), errors


def test_one_process_gets_the_network_itself():
    net = case(3, DENSE, 1).net
    assert spread(net, mesh.alone()) is net


def test_calls_that_cannot_be_spread_are_refused(ranks):
    for pattern_text, size_text in ranks(2, refused):
        assert "ring=2 cuts sequences" in pattern_text
        assert "1 tokens cannot be spread over 2 processes" in size_text


def test_patterns_that_need_whole_sequences_are_refused_under_a_ring_before_weights_load():
    for pattern in (VSA, sta(1)):
        with pytest.raises(ValueError, match=r"needs whole; nearest: ulysses=4 without ring"):
            rules.check(ParallelConfig(ring=2, ulysses=2), pattern)
        rules.check(ParallelConfig(ulysses=4), pattern)
    rules.check(ParallelConfig(ring=2), DENSE)


def test_processes_without_heads_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        rules.check(ParallelConfig(ulysses=3), DENSE, num_heads=3)
        assert not caplog.records
        rules.check(ParallelConfig(ulysses=4), DENSE, num_heads=3)
    assert "1 of its processes take no part" in caplog.text
