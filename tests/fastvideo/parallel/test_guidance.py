"""Two halves that run one forward each against one process that runs both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.models.dit.wan import WanConditioning, WanConfig, WanDiT
from fastvideo.parallel import guidance, mesh
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.sample import guide, sample
from fastvideo.schedulers import unipc

CONFIG = WanConfig(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=16, ffn_dim=32, num_layers=2,
)  # fmt: skip
SHAPE = (2, 4, 2, 6, 4)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(dtype: torch.dtype) -> WanDiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit = WanDiT(CONFIG)
        torch.nn.init.normal_(dit.proj_out.weight)  # a fresh head predicts nothing
    return dit.to(dtype).requires_grad_(False)


def texts(dtype: torch.dtype) -> dict[str, Any]:
    cond, uncond = (WanConditioning(draw(seed, 2, 5, 16).to(dtype)) for seed in (1, 2))
    return {"cond": cond, "uncond": uncond, "scale": 3.7}


def run(velocity: Any, dtype: torch.dtype) -> Tensor:
    steps = sample(velocity, unipc.Scheduler(), latents=draw(3, *SHAPE), num_steps=3, dtype=dtype)
    return list(steps)[-1].x


def apart(rank: int, size: int, degrees: ParallelConfig, dtype: torch.dtype) -> tuple[Tensor, int]:
    torch.manual_seed(rank)
    dit, batches = network(dtype), []
    dit.register_forward_hook(lambda *_: batches.append(1))
    axis = mesh.build(degrees, torch.device("cpu")).axis("guidance")
    with torch.no_grad():
        x = run(guidance.guide(dit, axis, **texts(dtype)), dtype)
    return x, len(batches)


def together(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return run(guide(network(dtype), **texts(dtype)), dtype)


def with_gradients(rank: int, size: int) -> str:
    axis = mesh.build(ParallelConfig(guidance=2), torch.device("cpu")).axis("guidance")
    velocity = guidance.guide(network(torch.float32), axis, **texts(torch.float32))
    with pytest.raises(AssertionError, match="would carry no gradient") as error:
        velocity(draw(3, *SHAPE), torch.full((2, 1), 500.0))
    return str(error.value)


@pytest.mark.parametrize(
    ("degrees", "dtype"),
    [
        (ParallelConfig(guidance=2), torch.float32),
        (ParallelConfig(guidance=2), torch.bfloat16),
        (ParallelConfig(guidance=2, ulysses=2), torch.float32),
    ],
    ids=["float32", "bfloat16", "beside-another-axis"],
)
def test_every_rank_runs_one_forward_a_step_and_gets_the_bits_of_both(ranks, degrees, dtype):
    (alone,) = ranks(1, together, dtype)  # with as many threads: other numbers sum in other orders
    for x, count in ranks(degrees.world_size, apart, degrees, dtype):
        assert torch.equal(x, alone)
        assert count == 3


def test_gradients_are_refused_where_they_would_be_lost(ranks):
    assert len(ranks(2, with_gradients)) == 2


def test_an_axis_without_two_processes_is_no_place_for_two_forwards():
    with pytest.raises(AssertionError, match="guidance has size 1"):
        guidance.guide(
            network(torch.float32), mesh.alone().axis("guidance"), **texts(torch.float32)
        )
